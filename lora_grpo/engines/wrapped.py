"""Engines as a trainer uses them: from several threads, from several processes, with its own tokenizer.

Engines in the trainers' own processes are one a process: each loads and proves every version, prompts are split. Any
other engine (a server, a fake) is asked by the first process alone, and the others are told what it said."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch

from lora_grpo.adapters.peft_form.serving import Held
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import Adapters, Engine, LoadReceipt, Samplings
from lora_grpo.engines.requests import adapters_by_prompt, sampling_by_prompt, token_prompts
from lora_grpo.errors import ConfigError, DeliveryError
from lora_grpo.grpo.forward import mean_abs_difference
from lora_grpo.grpo.processes import Processes
from lora_grpo.types import Group, LogProbs, Prompt, Rendered, Sampling, Sequences
from lora_grpo.worker import Worker

T = TypeVar("T")

AGREEMENT_NATS = 0.03
"""By how much the engines of two processes may differ, mean over tokens."""


def _asked(name: str) -> Any:
    def method(self: Any, *given: Any, **named: Any) -> Any:
        return self._ask(lambda engine: getattr(engine, name)(*given, **named))

    return method


class OwnedEngine:
    """An engine that steps, for use from any thread. `worker` owns it: rollouts are its jobs, all else its calls, made
    between two steps, so a load waits for one step at most. After a step that never ended it holds nothing, and is left
    as it is until the process ends."""

    def __init__(self, engine: Any, worker: Worker) -> None:
        self.worker, self._engine, self._loaded = worker, engine, engine.loaded()
        engine.between_steps = worker.poll
        if engine.device is not None and engine.device.type == "cuda":
            # A new thread's current device is the first one.
            worker.call(partial(torch.cuda.set_device, engine.device))

    def __getattr__(self, name: str) -> Any:
        """What does not step, such as `tokenizer`; calls are not for use while the thread is at work."""
        return getattr(self._engine, name)

    load, unload, generate, logprobs = _asked("load"), _asked("unload"), _asked("generate"), _asked("logprobs")
    describe_base, read_base = _asked("describe_base"), _asked("read_base")

    def _ask(self, act: Callable[[Any], T]) -> T:
        def noting() -> T:
            try:
                return act(self._engine)
            finally:
                self._loaded = self._engine.loaded()

        return self.worker.call(noting)

    def loaded(self) -> tuple[AdapterVersion, ...]:
        # As after the last call that ended, without waiting for the thread.
        return () if self.worker.hangs else self._loaded

    def release(self) -> bool:
        """End the thread: the engine is again its caller's alone. False when it hangs in a step."""
        self.worker.end()
        if ended := self.worker.join():
            self._engine.between_steps = None
        return ended

    def close(self) -> None:
        if self.release():
            self._engine.close()


def owned(engine: Engine, patience_s: float) -> Engine:
    """`engine` for use from several threads: one that steps gets a thread that owns it, any other is left alone."""
    steps = hasattr(engine, "between_steps")
    return OwnedEngine(engine, Worker("generator", patience_s=patience_s)) if steps else engine


def joint(engine: Engine | None, processes: Processes) -> Engine:
    """`engine` as all processes use it; `ConfigError` where only some have one of their own, or the first has none."""
    if processes.count == 1:
        return _there(engine)
    here = engine is not None and engine.device is not None
    having = [index for index, has in enumerate(processes.gather(here)) if has]
    if engine is not None and len(having) == processes.count:
        return EngineInEach(engine, processes)
    if having:
        fix = "build one in every process, or use a server (with a VLLMServerEngine in the first process)"
        raise ConfigError(f"{having} of {processes.count} processes have their own engine: {fix}")
    return EngineOfFirst(engine, processes)


class EngineOfFirst:
    """The first process's, which computes in none of them; what only servers have is only asked of servers."""

    def __init__(self, own: Engine | None, processes: Processes) -> None:
        self._own, self._processes = own, processes
        self.device = None if own is None else own.device
        said = self._ask(lambda its: (its.proof, its.max_lora_rank, its.lora_dtype, getattr(its, "pulls", False)))
        self.proof, self.max_lora_rank, self.lora_dtype, self.pulls = said

    load, unload, loaded, generate = _asked("load"), _asked("unload"), _asked("loaded"), _asked("generate")
    logprobs, describe_base, read_base = _asked("logprobs"), _asked("describe_base"), _asked("read_base")
    logprobs_of_each, keep_probe = _asked("logprobs_of_each"), _asked("keep_probe")

    def close(self) -> None:
        if self._own is not None:
            self._own.close()

    def _ask(self, act: Callable[[Engine], T]) -> T:
        return self._processes.first(lambda: act(_there(self._own)))


class EngineInEach(EngineOfFirst):
    _own: Engine

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
                said = f"the engines of processes 0 and {index} differ by {apart:.4f} nats per token for"
                fix = "start them with the same settings, on devices of one kind"
                raise DeliveryError(f"{said} {adapter or 'the base'}: {fix}")
        return answers[0]

    def logprobs_of_each(self, sequences: Sequences, *, adapter: AdapterVersion | None) -> list[LogProbs]:
        return self._processes.gather(self._ask(lambda engine: engine.logprobs(sequences, adapter=adapter)))

    def _ask(self, act: Callable[[Engine], T]) -> T:
        return self._processes.each(lambda: act(self._own))


def _there(engine: Engine | None) -> Engine:
    if engine is None:
        raise ConfigError("there is no engine: pass engine= (with several processes, in the first one)")
    return engine


class RenderingEngine:
    """`engine` with prompts encoded by `tokenizer`, ended by `stop_token_ids` too unless end tokens are ignored."""

    def __init__(self, engine: Engine, tokenizer: Any, stop_token_ids: Sequence[int]) -> None:
        self._engine, self.tokenizer, self._stop = engine, tokenizer, tuple(stop_token_ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompts: Sequence[Prompt], sampling: Samplings, *, adapter: Adapters) -> list[Group]:
        asked = self._ended(sampling) if isinstance(sampling, Sampling) else [self._ended(one) for one in sampling]
        groups = self._engine.generate(self._encoded(prompts), asked, adapter=adapter)
        return [replace(group, prompt=prompt) for group, prompt in zip(groups, prompts, strict=False)]

    def rendered(self, prompts: Sequence[Prompt], sampling: list[Sampling]) -> tuple[list[Rendered], list[Sampling]]:
        """What the engine itself is asked: the prompts' token ids, and how each is sampled."""
        return self._encoded(prompts), list(map(self._ended, sampling))

    def _encoded(self, prompts: Sequence[Prompt]) -> list[Rendered]:
        ids_P = token_prompts(self.tokenizer, prompts)
        return [Rendered.of(ids, prompt) for ids, prompt in zip(ids_P, prompts, strict=True)]

    def _ended(self, sampling: Sampling) -> Sampling:
        stop = () if sampling.ignore_eos else self._stop
        return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *stop))


def rendering(engine: Engine, tokenizer: Any, model: Any) -> Engine:
    """`engine` as a trainer of `model` asks it; itself where there is no `tokenizer`."""
    if tokenizer is None:
        return engine
    return cast(Engine, RenderingEngine(engine, tokenizer, end_tokens(tokenizer, model)))


def end_tokens(tokenizer: Any, model: Any) -> list[int]:
    """The ids that end a completion: the tokenizer's end token, and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = getattr(tokenizer, "eos_token_id", None)
    found = [*(configured if isinstance(configured, list | tuple) else [configured]), own]
    return sorted({int(token) for token in found if token is not None})
