"""An engine without a model, to test rewards and loops: the replies are yours, the bookkeeping is the real one's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines import requests
from lora_grpo.engines.base import Adapters, BaseDescription, LoadedVersions, LoadReceipt, Proof, Samplings
from lora_grpo.errors import EngineError
from lora_grpo.types import Completion, Group, LogProbs, Prompt, Sequences

if TYPE_CHECKING:
    from lora_grpo.adapters.peft_form.serving import Held
    from lora_grpo.engines.names import BaseReading

Reply: TypeAlias = Callable[[Prompt, AdapterVersion | None, int], str]
"""(prompt, version or None for the base, the request's seed) -> the completion's text."""


class _Bytes:
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

    proof: Proof = "none"
    device: Any = None
    lora_dtype = "float32"
    max_lora_rank = 512

    def __init__(self, reply: Reply, *, tokenizer: Any = None, max_cpu_loras: int = 4, logprob: float = -1.0) -> None:
        """`reply(prompt, version, seed)` returns the text of one completion: `prompt` as it was passed to `generate`,
        `version` an `AdapterVersion` (None: the base), `seed` the request's own. Without a `tokenizer`, a byte is a
        token. `max_cpu_loras` versions stay loaded.
        """
        self._reply, self._logprob = reply, logprob
        self.tokenizer = tokenizer or _Bytes()
        self._max_cpu_loras = max_cpu_loras
        self._loaded: LoadedVersions[Any] = LoadedVersions()
        self._closed = False
        self.between_steps: Callable[[], None] | None = None
        """Called before each prompt is answered."""

    def load(self, version: AdapterVersion, *, held: Held | None = None) -> LoadReceipt:
        """Take `version` up, so that it can be named. Raises `EngineError` when its directory is not there."""
        self._require_open()
        known = self._loaded.known(version)
        if not version.path.is_dir():
            raise EngineError(f"{version} has no directory {version.path}")
        self._loaded.add(known or SimpleNamespace(version=version))
        for oldest in self._loaded.all()[: -self._max_cpu_loras]:
            self._loaded.remove(oldest)
        return LoadReceipt("none", {"load": 0.0}, 0, 0)

    def unload(self, version: AdapterVersion) -> None:
        self._loaded.remove(self._loaded.find(version))

    def loaded(self) -> tuple[AdapterVersion, ...]:
        return self._loaded.versions

    def generate(self, prompts: Sequence[Prompt], sampling: Samplings, *, adapter: Adapters) -> list[Group]:
        """`VLLMEngine.generate` with your replies, cut at `sampling.max_tokens`."""
        self._require_open()
        asked = requests.asked(self.tokenizer, prompts, sampling, adapter)
        for one in asked:
            self._use(one.adapter)
        completions = []
        for one in asked:
            if self.between_steps is not None:
                self.between_steps()
            completions += [self._complete(one, seed) for seed in one.seeds]
        return requests.to_groups(asked, completions)

    def logprobs(self, sequences: Sequences, *, adapter: AdapterVersion | None) -> LogProbs:
        self._require_open()
        self._use(adapter)
        return [[self._logprob] * (len(ids) - 1) for ids in sequences]

    def describe_base(self) -> BaseDescription:
        return BaseDescription("float32", {}, 256)

    def read_base(self, shapes: Mapping[str, Sequence[int]]) -> list[BaseReading]:
        return []

    def close(self) -> None:
        self._loaded, self._closed = LoadedVersions(), True

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError("this engine is closed; start another")

    def _use(self, version: AdapterVersion | None) -> None:
        if version is not None:
            self._loaded.add(self._loaded.find(version))

    def _complete(self, asked: requests.Asked, seed: int) -> Completion:
        version, sampling = asked.adapter, asked.sampling
        text = self._reply(getattr(asked.prompt, "prompt", asked.prompt), version, seed)
        text = text[: min([len(text), *(found for stop in sampling.stop if (found := text.find(stop)) >= 0)])]
        ids = self.tokenizer.encode(text)
        ids = ids[: 1 + next((place for place, token in enumerate(ids) if token in sampling.stop_token_ids), len(ids))]
        reason = "length" if len(ids) > sampling.max_tokens else "stop"
        kept = tuple(ids[: sampling.max_tokens])
        text = text if reason == "stop" else self.tokenizer.decode(list(kept))
        return Completion(text, kept, (self._logprob,) * len(kept), reason, version.number if version else None)
