"""An engine without a model, to test rewards and loops: the replies are yours, the bookkeeping is the real one's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import Adapters, BaseDescription, LoadReceipt, Proof, Samplings
from lora_grpo.engines.requests import (
    adapters_by_prompt,
    request_seeds,
    require_version,
    sampling_by_prompt,
    token_prompts,
)
from lora_grpo.errors import EngineError, UnknownVersion
from lora_grpo.types import Completion, Group, Prompt, Sampling

if TYPE_CHECKING:
    from lora_grpo.adapters.peft_form.serving import Held
    from lora_grpo.engines.delivery.base_reading import BaseReading

Reply: TypeAlias = Callable[[Prompt, AdapterVersion | None, int], str]
"""(prompt, version or None for the base, the request's seed) -> the completion's text."""


class _Bytes:
    """A tokenizer for when the caller brings none: one id a UTF-8 byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode(errors="backslashreplace"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class FakeEngine:
    """Serves `reply` under the rules of a real engine: versions must be loaded, completions are stamped and cut.

    Its log-probs are all `logprob`, and it proves nothing (`proof` is "none").

    >>> engine = FakeEngine(lambda prompt, version, seed: "42" if version else "no idea")
    >>> engine.generate(["6*7="], Sampling(n=2), adapter=None)[0].completions[1].text
    'no idea'
    """

    def __init__(
        self,
        reply: Reply,
        *,
        tokenizer: Any = None,
        max_cpu_loras: int = 4,
        max_lora_rank: int = 512,
        logprob: float = -1.0,
    ) -> None:
        """`reply(prompt, version, seed)` returns the text of one completion: `prompt` as it was passed to `generate`,
        `version` an `AdapterVersion` (None: the base), `seed` the request's own. Without a `tokenizer`, a byte is a
        token. `max_cpu_loras` versions stay loaded.
        """
        self._reply, self._logprob = reply, logprob
        self.tokenizer = tokenizer or _Bytes()
        self._max_cpu_loras, self._max_lora_rank = max_cpu_loras, max_lora_rank
        self._loaded: dict[Path, AdapterVersion] = {}
        self.between_steps: Callable[[], None] | None = None
        """Called before each prompt is answered."""

    @property
    def proof(self) -> Proof:
        return "none"

    @property
    def device(self) -> None:
        return None

    @property
    def max_lora_rank(self) -> int:
        return self._max_lora_rank

    @property
    def lora_dtype(self) -> str:
        return "float32"

    def load(self, version: AdapterVersion, *, held: Held | None = None) -> LoadReceipt:
        """Take `version` up, so that it can be named. Raises `EngineError` when its directory is not there."""
        if not require_version(version).path.is_dir():
            raise EngineError(f"{version} has no directory {version.path}")
        while version.path not in self._loaded and len(self._loaded) >= self._max_cpu_loras:
            del self._loaded[next(iter(self._loaded))]
        self._loaded.pop(version.path, None)
        self._loaded[version.path] = version
        return LoadReceipt("none", {"load": 0.0}, 0, 0)

    def unload(self, version: AdapterVersion) -> None:
        del self._loaded[self._find(version).path]

    def loaded(self) -> tuple[AdapterVersion, ...]:
        return tuple(self._loaded.values())

    def generate(self, prompts: Sequence[Prompt], sampling: Samplings, *, adapter: Adapters) -> list[Group]:
        """`VLLMEngine.generate` with your replies, cut at `sampling.max_tokens`."""
        ids_P, sampling_P = token_prompts(self.tokenizer, prompts), sampling_by_prompt(sampling, len(prompts))
        adapter_P = [version and self._find(version) for version in adapters_by_prompt(adapter, len(prompts))]
        groups = []
        asked = zip(prompts, ids_P, adapter_P, sampling_P, request_seeds(sampling_P), strict=True)
        for prompt, ids, version, one, seeds in asked:
            if self.between_steps is not None:
                self.between_steps()
            completions = tuple(self._complete(prompt, version, seed, one) for seed in seeds)
            groups.append(Group(prompt, tuple(ids), completions))
        return groups

    def logprobs(self, sequences: Sequence[Sequence[int]], *, adapter: AdapterVersion | None) -> list[list[float]]:
        if adapter is not None:
            self._find(adapter)
        return [[self._logprob] * (len(ids) - 1) for ids in sequences]

    def describe_base(self) -> BaseDescription:
        return BaseDescription("float32", {}, 256)

    def read_base(self, shapes: Mapping[str, Sequence[int]]) -> list[BaseReading]:
        return []

    def close(self) -> None:
        self._loaded.clear()

    def _complete(self, prompt: Prompt, version: AdapterVersion | None, seed: int, sampling: Sampling) -> Completion:
        text = _until(self._reply(getattr(prompt, "prompt", prompt), version, seed), sampling.stop)
        ids = self.tokenizer.encode(text)
        ids = ids[: 1 + next((place for place, token in enumerate(ids) if token in sampling.stop_token_ids), len(ids))]
        reason = "length" if len(ids) > sampling.max_tokens else "stop"
        kept = tuple(ids[: sampling.max_tokens])
        text = text if reason == "stop" else self.tokenizer.decode(list(kept))
        return Completion(text, kept, (self._logprob,) * len(kept), reason, version.number if version else None)

    def _find(self, version: AdapterVersion) -> AdapterVersion:
        if self._loaded.get(require_version(version).path) != version:
            raise UnknownVersion(f"{version} is not loaded; call engine.load(version) first")
        self._loaded[version.path] = self._loaded.pop(version.path)
        return version


def _until(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min([len(text), *(found for string in stop if (found := text.find(string)) >= 0)])]
