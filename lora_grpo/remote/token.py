"""The bearer token that a store server and its clients share; never on a command line, where every user sees it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lora_grpo.errors import ConfigError

TOKEN_VARIABLE = "LORA_GRPO_STORE_TOKEN"
TOKEN_FILE_VARIABLE = "LORA_GRPO_STORE_TOKEN_FILE"


def read_token(file: str | Path | None = None) -> str:
    """The token in `file`, else in the file that LORA_GRPO_STORE_TOKEN_FILE names, else LORA_GRPO_STORE_TOKEN itself.

    Raises `ConfigError` when there is none, or when it could not travel in a header.
    """
    named = file or os.environ.get(TOKEN_FILE_VARIABLE)
    if named:
        try:
            text, where = Path(named).read_text(), str(named)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the token file {named} cannot be read: {error}") from error
    else:
        text, where = os.environ.get(TOKEN_VARIABLE, ""), TOKEN_VARIABLE
    token = text.strip()
    if not token:
        raise ConfigError(
            f"there is no store token in {where}; write a long random one into a file (such as with "
            f"'openssl rand -hex 32'), owner-only, and name it in {TOKEN_FILE_VARIABLE} on both sides"
        )
    if not re.fullmatch("[!-~]+", token):
        raise ConfigError(f"the store token in {where} must be one word of printable ASCII; make it hex digits")
    return token
