"""Whether the Hugging Face hub can be reached: libraries that ask it in vain try again for minutes, for each file."""

import math
import os
import time

from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

ASK_AGAIN_S = 60.0
_asked_at, _answer = -math.inf, ""


def out_of_reach() -> str:
    """Why nothing can be had from the hub, as a clause; "" where it can be reached.

    As long as it cannot, HF_HUB_OFFLINE is set in this process: all libraries then take what is in their caches, at
    once. The hub is asked again after a minute."""
    global _asked_at, _answer
    if constants.HF_HUB_OFFLINE and not _answer:
        return "HF_HUB_OFFLINE forbids to ask the hub"
    if time.monotonic() - _asked_at > ASK_AGAIN_S:
        _set_offline(False)
        _answer = _no_connection()
        _set_offline(bool(_answer))
        _asked_at = time.monotonic()
    return _answer


def is_cached(model: str, revision: str | None) -> bool:
    try:
        return isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str)
    except HFValidationError:
        return False


def _no_connection() -> str:
    """A hub that answers slowly, or with an error, is there all the same."""
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HTTPError as error:
        if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError"):
            return f"{constants.ENDPOINT} cannot be reached ({error})"
    return ""


def _set_offline(offline: bool) -> None:
    if offline != constants.HF_HUB_OFFLINE:
        constants.HF_HUB_OFFLINE = offline
        os.environ["HF_HUB_OFFLINE"] = str(int(offline))  # for processes that are started
