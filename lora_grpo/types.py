"""What flows between the rooms: sampling settings, completions, groups.

Letters for shapes, here and everywhere: P prompts, G completions a group, B = P*G rows, T tokens, V vocabulary."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias

from lora_grpo.errors import ConfigError

LARGEST_REWARD = (2 - 2**-23) * 2.0**127
"""float32's: what is larger would become infinite in the log, and in a tensor of the user's."""

Message: TypeAlias = Mapping[str, object]
Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or chat messages (rendered with the model's chat template)."""
Sequences: TypeAlias = Sequence[Sequence[int]]
"""Token ids, a row each."""
LogProbs: TypeAlias = list[list[float]]
"""Nats, of tokens 1..T-1 of each of `Sequences`."""


def text_problem(text: str) -> str | None:
    """What is wrong with a prompt's text, with the fix; None if nothing is."""
    found = re.search("[\ud800-\udfff]", text)
    return found and f"it holds {found[0]!r}, half a surrogate pair, which no tokenizer takes; replace it"


class Chat(list[Message]):
    """Chat messages, with what their chat template gets besides (`enable_thinking` and the like)."""

    def __init__(self, messages: Iterable[Message], template_kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__(messages)
        self.template_kwargs = dict(template_kwargs or {})

    def __add__(self, messages: list[Any]) -> "Chat":  # type: ignore[override]
        """A longer chat goes through the same template."""
        return Chat([*self, *messages], self.template_kwargs)


class Rendered(tuple[int, ...]):
    """The token ids of a prompt, which `prompt` keeps as it was asked."""

    prompt: Prompt

    @classmethod
    def of(cls, ids: Iterable[int], prompt: Prompt) -> "Rendered":
        rendered = cls(ids)
        rendered.prompt = prompt
        return rendered


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample the completions of one call.

    `seed` is the seed of the call. Every request gets its own seed, made from it and the indexes of prompt and sample;
    `None` draws a new one. `top_k=0` and `min_p=0.0` mean off. `temperature=0` is greedy.
    `stop_token_ids` end a completion, as the model's own end tokens do. `ignore_eos` ignores those and goes on to
    `max_tokens`, for timings. `first_prompt` is the index of the first prompt, if you split a call into parts.

    >>> Sampling(n=8, max_tokens=256).temperature
    1.0
    """

    n: int = 1
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    first_prompt: int = 0

    def __post_init__(self) -> None:
        rules = {
            "n": (_is(self.n, Integral) and self.n >= 1, "a whole number, at least 1"),
            "max_tokens": (_is(self.max_tokens, Integral) and self.max_tokens >= 1, "a whole number, at least 1"),
            "temperature": (_is(self.temperature, Real) and self.temperature >= 0, "a number, 0 (greedy) or more"),
            "top_p": (_is(self.top_p, Real) and 0 < self.top_p <= 1, "a number in (0, 1]"),
            "top_k": (_is(self.top_k, Integral) and self.top_k >= 0, "a whole number, 0 (off) or more"),
            "min_p": (_is(self.min_p, Real) and 0 <= self.min_p < 1, "a number in [0, 1)"),
            "stop": (_all_are(self.stop, str), "a tuple of strings, such as ('\\n',)"),
            "stop_token_ids": (_all_are(self.stop_token_ids, Integral), "a tuple of token ids, such as (2,)"),
            "seed": (self.seed is None or _is(self.seed, Integral), "a whole number or None"),
            "ignore_eos": (isinstance(self.ignore_eos, bool), "True or False"),
            "first_prompt": (_is(self.first_prompt, Integral), "a whole number"),
        }
        for name, (holds, needed) in rules.items():
            if not holds:
                raise ConfigError(f"Sampling.{name}={getattr(self, name)!r} must be {needed}")


def _is(value: object, kind: type) -> bool:
    """True and False are no numbers here."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _all_are(values: object, kind: type) -> bool:
    return isinstance(values, list | tuple) and all(_is(value, kind) for value in values)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion.

    `logprobs` are from the distribution that was sampled (with temperature), one for each token of `token_ids`.
    `finish_reason` is "stop" (an end token or stop string) or "length" (cut at `max_tokens`).
    `version` is the number of the adapter version that made it; None is the base model.
    `token_mask` says which tokens the policy sampled (multi-turn rollouts also hold tool output); None means all.

    >>> [group] = engine.generate(["6*7="], Sampling(max_tokens=8), adapter=version)
    >>> done = group.completions[0]
    >>> done.text, done.finish_reason, done.version, len(done.logprobs) == len(done.token_ids)
    ('42', 'stop', 2, True)
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    version: int | None
    token_mask: tuple[bool, ...] | None = None

    @property
    def truncated(self) -> bool:
        """Whether it was cut at `max_tokens`."""
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class Group:
    """The G completions of one prompt; `prompt` as it was passed, `prompt_token_ids` as the model saw it.

    >>> [group] = engine.generate(["6*7="], Sampling(n=4), adapter=version)
    >>> group.prompt, len(group.prompt_token_ids), [done.text for done in group.completions]
    ('6*7=', 4, ['42', '42', '42', '42'])
    """

    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2**63) from any number of integers, well mixed and the same on every machine."""
    text = ",".join(str(int(part)) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
