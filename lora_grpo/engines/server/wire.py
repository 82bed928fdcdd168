"""From our prompts and settings to completion requests, and from their answers to completions and log-probs."""

import math
from collections.abc import Sequence
from typing import Any

from lora_grpo.engines.requests import sampling_fields
from lora_grpo.errors import DeliveryError, EngineError
from lora_grpo.types import Completion, Sampling

COMPLETIONS = "/v1/completions"


def completion_body(
    ids: Sequence[int], sampling: Sampling, seed: int, placeholders: Sequence[int] = ()
) -> dict[str, Any]:
    """One sample of one prompt, without `placeholders`, of a `model` that is yet to be named. Every setting is said,
    since a server fills in its model's own defaults."""
    body = sampling_fields(sampling, seed, placeholders) | {"prompt": list(ids), "return_token_ids": True}
    return body | {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def scoring_body(ids: Sequence[int]) -> dict[str, Any]:
    """One sequence to be scored as a prompt; a server generates one token after it at least."""
    return completion_body(ids, Sampling(max_tokens=1, temperature=0.0), seed=0) | {"prompt_logprobs": 0}


def to_completion(answer: dict[str, Any], body: dict[str, Any], version: int | None) -> Completion:
    """The completion in an answer. Raises `DeliveryError` for another model's or another prompt's, `EngineError` for
    one that did not end of itself or lacks a token's log-prob."""
    choice = _choice(answer, body)
    token_ids, reason = tuple(choice["token_ids"] or ()), choice["finish_reason"]
    if reason not in ("stop", "length"):
        raise EngineError(f"a completion by {body['model']} ended as {reason!r}, not by stopping")
    if reason == "length" and len(token_ids) < body["max_tokens"]:
        said = f"the server cut a completion at {len(token_ids)} of max_tokens={body['max_tokens']}"
        raise EngineError(f"{said}; start it without --override-generation-config and --generation-config")
    logprobs = tuple((choice["logprobs"] or {}).get("token_logprobs") or ())
    if len(logprobs) != len(token_ids) or not all(_is_finite(value) for value in logprobs):
        raise EngineError(f"a completion by {body['model']} has {len(token_ids)} tokens with log-probs {logprobs}")
    return Completion(choice["text"], token_ids, logprobs, reason, version)


def to_logprobs(answer: dict[str, Any], body: dict[str, Any]) -> list[float]:
    """Log-probs of tokens 1..T-1 of a scored sequence. Raises as `to_completion`."""
    entries = _choice(answer, body)["prompt_logprobs"] or []
    ids = body["prompt"]
    try:
        logprobs = [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], ids[1:], strict=True)]
    except (ValueError, KeyError, TypeError):
        logprobs = [None]
    if not all(_is_finite(value) for value in logprobs):
        raise EngineError(f"{body['model']} did not score every token of a prompt of {len(ids)}")
    return logprobs


def _choice(answer: dict[str, Any], body: dict[str, Any]) -> Any:
    if answer.get("model") != body["model"]:
        said = f"{body['model']} was asked and {answer.get('model')!r} answered"
        raise DeliveryError(f"{said}; is a proxy in between, or VLLM_SKIP_MODEL_NAME_VALIDATION set on the server?")
    choices = answer.get("choices") or [{}]
    needed = {"text", "token_ids", "logprobs", "finish_reason", "prompt_token_ids", "prompt_logprobs"}
    if missing := needed - set(choices[0]):
        raise EngineError(f"an answer by {body['model']} lacks {', '.join(sorted(missing))}; is it a vLLM server?")
    if choices[0]["prompt_token_ids"] != body["prompt"]:
        raise DeliveryError(f"{body['model']} completed another prompt than the one it was sent")
    return choices[0]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
