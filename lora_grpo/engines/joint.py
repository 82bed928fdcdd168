"""An engine that several processes use together: every call is made by all of them, and ends alike for all.

Engines in the trainers' own processes are one a process: each loads and proves every version, prompts are split. Any
other engine (a server, a fake) is asked by the first process alone, and the others are told what it said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

from lora_grpo.adapters.peft_form.serving import Held
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import Adapters, Engine, LoadReceipt, RemoteEngine, Samplings
from lora_grpo.engines.requests import adapters_by_prompt, sampling_by_prompt
from lora_grpo.errors import ConfigError, DeliveryError
from lora_grpo.grpo.processes import Processes
from lora_grpo.scoring import mean_abs_difference
from lora_grpo.types import Group, LogProbs, Prompt, Sequences

T = TypeVar("T")

AGREEMENT_NATS = 0.03
"""By how much the engines of two processes may differ, mean over tokens."""


def joint(engine: Engine | None, processes: Processes) -> Engine:
    """`engine` as all processes use it; itself where there is one process.

    Raises `ConfigError` in all for an in-process engine that only some of them have, or none in the first.
    """
    if processes.count == 1:
        return _there(engine)
    here = engine is not None and engine.device is not None
    having = [index for index, has in enumerate(processes.gather(here)) if has]
    if engine is not None and len(having) == processes.count:
        return EngineInEach(engine, processes)
    if having:
        raise ConfigError(
            f"{having} of {processes.count} processes have their own engine: build one in every process, or "
            "use a server (with a VLLMServerEngine in the first process)"
        )
    return EngineOfFirst(engine, processes)


def _asked(name: str) -> Any:
    """The engine's method of that name, called by all processes together."""

    def method(self: EngineOfFirst, *given: Any, **named: Any) -> Any:
        return self._ask(lambda engine: getattr(engine, name)(*given, **named))

    return method


class EngineOfFirst:
    """The first process's, which computes in none of them: it is asked, and the others are told what it said. It can
    do what that one can: a `RemoteEngine`'s verbs are only asked of one."""

    def __init__(self, own: Engine | None, processes: Processes) -> None:
        self._own, self._processes = own, processes
        said = self._ask(lambda engine: (engine.proof, engine.max_lora_rank, engine.lora_dtype))
        self.proof, self.max_lora_rank, self.lora_dtype = said

    load, unload, loaded = _asked("load"), _asked("unload"), _asked("loaded")
    generate, logprobs = _asked("generate"), _asked("logprobs")
    describe_base, read_base = _asked("describe_base"), _asked("read_base")
    logprobs_of_each, keep_probe = _asked("logprobs_of_each"), _asked("keep_probe")

    @property
    def pulls(self) -> bool:
        return self._ask(lambda engine: cast(RemoteEngine, engine).pulls)

    @property
    def device(self) -> torch.device | None:
        return None

    def close(self) -> None:
        """Only this process's."""
        if self._own is not None:
            self._own.close()

    def _ask(self, act: Callable[[Engine], T]) -> T:
        return self._processes.first(lambda: act(_there(self._own)))


class EngineInEach(EngineOfFirst):
    _own: Engine

    @property
    def device(self) -> torch.device | None:
        return self._own.device

    def load(self, version: AdapterVersion, *, held: Held | None = None) -> LoadReceipt:
        try:
            return self._ask(lambda engine: engine.load(version, held=held))
        except BaseException:
            if version in self._own.loaded():
                self._own.unload(version)
            raise

    def generate(self, prompts: Sequence[Prompt], sampling: Samplings, *, adapter: Adapters) -> list[Group]:
        """All groups, in every process; each process's engine makes those of its part of the prompts."""
        sampling_P = self._processes.share(sampling_by_prompt(sampling, len(prompts)))
        part, adapter_P = self._processes.part(len(prompts)), adapters_by_prompt(adapter, len(prompts))
        own = (prompts[part], sampling_P[part])
        made = self._ask(lambda engine: engine.generate(*own, adapter=adapter_P[part]) if prompts[part] else [])
        return [group for groups in self._processes.gather(made) for group in groups]

    def logprobs(self, sequences: Sequences, *, adapter: AdapterVersion | None) -> LogProbs:
        """The first engine's answer, in every process; raises `DeliveryError` when another engine's differs."""
        answers = self.logprobs_of_each(sequences, adapter=adapter)
        for index, answer in enumerate(answers):
            apart = mean_abs_difference(answer, answers[0])
            if not apart <= AGREEMENT_NATS:
                raise DeliveryError(
                    f"the engines of processes 0 and {index} differ by {apart:.4f} nats per token for "
                    f"{adapter or 'the base'}: start them with the same settings, on devices of one kind"
                )
        return answers[0]

    def logprobs_of_each(self, sequences: Sequences, *, adapter: AdapterVersion | None) -> list[LogProbs]:
        return self._processes.gather(self._ask(lambda engine: engine.logprobs(sequences, adapter=adapter)))

    def _ask(self, act: Callable[[Engine], T]) -> T:
        return self._processes.each(lambda: act(self._own))


def _there(engine: Engine | None) -> Engine:
    if engine is None:
        raise ConfigError("there is no engine: pass engine= (with several processes, in the first one)")
    return engine
