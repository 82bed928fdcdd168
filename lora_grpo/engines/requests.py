"""From our prompts and settings to vLLM's requests, and from its outputs to completions."""

import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain, islice
from numbers import Integral
from typing import Any, NamedTuple

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import Adapters, BaseDescription, Samplings, require_version
from lora_grpo.errors import ConfigError, EngineError
from lora_grpo.types import Completion, Group, LogProbs, Prompt, Sampling, Sequences, derive_seed, text_problem

ENCODING = threading.Lock()
"""A fast tokenizer raises "Already borrowed" when two threads use it."""
_NEVER = -100.0
"""A logit's bias, vLLM's smallest, that leaves its token a probability of 0 in float32."""


def token_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt. Raises `ConfigError` for what is no list of prompts, and as `render` does."""
    if isinstance(prompts, str | bytes | Mapping):
        raise ConfigError(f"prompts={prompts!r:.80} is one prompt, not a list of them; pass [prompt]")
    with ENCODING:
        return [render(tokenizer, prompt, f"prompt {index}") for index, prompt in enumerate(prompts)]


def render(tokenizer: Any, prompt: Prompt, called: str) -> list[int]:
    """A prompt's token ids. Raises `ConfigError`, which calls it `called`, for what cannot be rendered."""
    ids: Any = prompt
    listed = isinstance(prompt, Sequence) and not isinstance(prompt, bytes)
    if isinstance(prompt, str):
        require_tokenizer(tokenizer, f"{called} is text")
        try:
            ids = one_bos(tokenizer, tokenizer.encode(prompt))
        except (TypeError, UnicodeError) as error:
            raise ConfigError(f"{called}: {text_problem(prompt) or error}") from error
    elif isinstance(prompt, Mapping | Integral):
        kind = "a message" if isinstance(prompt, Mapping) else "a token"
        raise ConfigError(f"{called} ({prompt!r:.80}) is {kind}, but a prompt is a list of them; pass [prompt]")
    elif listed and prompt and isinstance(prompt[0], Mapping):
        ids = _render_chat(tokenizer, prompt, called)
    elif not listed or not all(isinstance(token, Integral) for token in prompt):
        raise ConfigError(f"{called} ({prompt!r:.80}) must be text, a list of token ids, or a list of chat messages")
    if not ids:
        raise ConfigError(f"{called} ({prompt!r}) has no tokens; every prompt needs at least one")
    return list(ids)


def require_tokenizer(tokenizer: Any, said: str) -> None:
    """Raises `ConfigError` where text cannot be encoded. Of a folder without a tokenizer, transformers makes up one
    that knows special tokens alone, and turns all text into nothing or "unknown"."""
    special = getattr(tokenizer, "all_special_ids", None)
    if tokenizer is None or (special is not None and len(tokenizer) <= len(special)):
        folder = getattr(tokenizer, "name_or_path", None) or "the model's folder"
        said += f", but {folder} has no tokenizer: write tokenizer.json and tokenizer_config.json there"
        raise ConfigError(f"{said} (AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)), or pass token ids")


def one_bos(tokenizer: Any, ids: Sequence[int]) -> Sequence[int]:
    """A text's token ids with one begin token, as models are trained on, where the text began with its own."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if bos is not None and list(ids[:2]) == [bos, bos] else ids


def _render_chat(tokenizer: Any, chat: Any, called: str) -> Any:
    from jinja2 import TemplateError

    require_tokenizer(tokenizer, f"{called} is a chat")
    if not getattr(tokenizer, "chat_template", None):
        fix = "pass text, or a processing_class with one"
        raise ConfigError(f"{called} is a chat, but the tokenizer has no chat template; {fix}")
    kwargs = getattr(chat, "template_kwargs", {})
    try:
        return tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, return_dict=False, **kwargs)
    except (TemplateError, TypeError, ValueError) as error:
        problems = (text_problem(str(message.get("content"))) for message in chat)
        said = next(filter(None, problems), f"the chat template rejects it: {error}")
        raise ConfigError(f"{called}: {said}") from error


def check_fits(ids_P: Sequences, max_tokens_P: Sequence[int], max_model_len: int, vocabulary: int) -> None:
    """Raises `ConfigError` for the first prompt with a token outside the vocabulary, or no room for its completion."""
    for index, (ids, max_tokens) in enumerate(zip(ids_P, max_tokens_P, strict=True)):
        if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
            place, token = next((place, token) for place, token in enumerate(ids) if not 0 <= token < vocabulary)
            said = f"prompt {index} has token {token} at place {place}, but the vocabulary ends at {vocabulary - 1}"
            raise ConfigError(f"{said} ({vocabulary} tokens): encode it with the model's own tokenizer")
        if len(ids) + max_tokens > max_model_len:
            said = f"prompt {index} has {len(ids)} tokens; with max_tokens={max_tokens} that exceeds {max_model_len=}"
            raise ConfigError(f"{said}: shorten it, lower max_tokens or raise max_model_len")


class Asked(NamedTuple):
    """What is asked of an engine with one prompt: a completion for each seed."""

    prompt: Prompt
    ids: list[int]
    sampling: Sampling
    adapter: AdapterVersion | None
    seeds: list[int]


def asked(tokenizer: Any, prompts: Sequence[Prompt], sampling: Samplings, adapter: Adapters) -> list[Asked]:
    """Raises `ConfigError` for what no engine can be asked."""
    ids_P, sampling_P = token_prompts(tokenizer, prompts), sampling_by_prompt(sampling, len(prompts))
    seeds_PG = [[derive_seed(one.seed or 0, one.first_prompt, g) for g in range(one.n)] for one in sampling_P]
    parts = prompts, ids_P, sampling_P, adapters_by_prompt(adapter, len(prompts)), seeds_PG
    return [Asked(*each) for each in zip(*parts, strict=True)]


def check_asked(asked: Sequence[Asked], max_model_len: int, base: BaseDescription) -> None:
    """Raises `ConfigError` for what cannot be asked of this model."""
    max_tokens_P = [one.sampling.max_tokens for one in asked]
    check_fits([one.ids for one in asked], max_tokens_P, max_model_len, base.vocabulary)
    for index, one in enumerate(asked):
        if (found := next((token for token in one.ids if token in base.placeholders), None)) is not None:
            raise ConfigError(f"prompt {index} has token {found}, which stands for an image, video or sound: remove it")


def adapters_by_prompt(adapter: Adapters, prompts: int) -> list[AdapterVersion | None]:
    listed = adapter if isinstance(adapter, list | tuple) else [adapter] * prompts
    if len(listed) != prompts:
        raise ConfigError(f"adapter names {len(listed)} versions for {prompts} prompts; give one, or one for each")
    return [None if one is None else require_version(one) for one in listed]


def mixed_batches(adapter_B: Sequence[AdapterVersion | None], slots: int, mixes_base: bool) -> Iterator[list[int]]:
    """Rows that may share an engine batch: at most `slots` versions, base rows apart where they cannot mix."""
    rows_of: dict[AdapterVersion | None, list[int]] = {}
    for row, adapter in enumerate(adapter_B):
        rows_of.setdefault(adapter, []).append(row)
    base = rows_of.pop(None, [])
    of_versions = list(rows_of.values())
    batches = [[*chain(*of_versions[start : start + slots])] for start in range(0, len(of_versions), slots)]
    if batches and mixes_base:
        batches[0] += base
    elif base:
        batches.append(base)
    return (sorted(rows) for rows in batches)


def sampling_by_prompt(sampling: Samplings, prompts: int) -> list[Sampling]:
    """One a prompt, each with a seed."""
    if isinstance(sampling, Sampling):
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        return [replace(sampling, seed=seed, first_prompt=sampling.first_prompt + p) for p in range(prompts)]
    if len(sampling) != prompts:
        raise ConfigError(f"sampling names {len(sampling)} settings for {prompts} prompts; give one, or one for each")
    return [one if one.seed is not None else replace(one, seed=secrets.randbits(63)) for one in sampling]


def sampling_fields(sampling: Sampling, seed: int, placeholders: Sequence[int] = ()) -> dict[str, Any]:
    """One sample of one prompt in vLLM's words, with its tokens' log-probs; none of `placeholders` is sampled."""
    said = {field.name: getattr(sampling, field.name) for field in fields(sampling) if field.name != "first_prompt"}
    said |= {"stop": list(sampling.stop), "stop_token_ids": list(sampling.stop_token_ids)}
    return said | {"n": 1, "seed": seed, "logit_bias": dict.fromkeys(placeholders, _NEVER) or None, "logprobs": 0}


def sampling_params(sampling: Sampling, seed: int, placeholders: Sequence[int] = (), **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**sampling_fields(sampling, seed, placeholders), **more)


def scoring_params() -> Any:
    return sampling_params(Sampling(max_tokens=1, temperature=0.0), seed=0, prompt_logprobs=0)


def to_completion(output: Any, adapter: AdapterVersion | None) -> Completion:
    """One vLLM output as a completion; raises `EngineError` when it did not end of itself or lacks a log-prob."""
    made = output.outputs[0]
    if made.finish_reason not in ("stop", "length"):
        raise EngineError(f"request {output.request_id} ended as {made.finish_reason!r}, not by stopping")
    token_ids = tuple(made.token_ids)
    logprobs = tuple(entry[token].logprob for entry, token in zip(made.logprobs, token_ids, strict=True))
    return Completion(made.text, token_ids, logprobs, made.finish_reason, None if adapter is None else adapter.number)


def to_groups(asked: Sequence[Asked], completions: Sequence[Completion]) -> list[Group]:
    following = iter(completions)
    return [Group(one.prompt, tuple(one.ids), tuple(islice(following, len(one.seeds)))) for one in asked]


def scored_tokens(outputs: Sequence[Any], sequences: Sequences) -> LogProbs:
    pairs = [(output.prompt_logprobs[1:], ids[1:]) for output, ids in zip(outputs, sequences, strict=True)]
    return [[entry[token].logprob for entry, token in zip(*pair, strict=True)] for pair in pairs]
