"""`GRPOTrainer`: prompts, rewards and a LoRA model in, better versions out; every rollout from a proven version."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from lora_grpo.adapters.asking.view import best_metric
from lora_grpo.adapters.upkeep.opening import Recovered
from lora_grpo.adapters.version import AdapterVersion, Target
from lora_grpo.config import EngineConfig, KeepConfig, ModelConfig
from lora_grpo.data import PromptDataset, Rows
from lora_grpo.engines.base import Engine
from lora_grpo.errors import ConfigError
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.metrics.curves import plot_run
from lora_grpo.metrics.reporter import Reporter
from lora_grpo.reference import keep_reference
from lora_grpo.rewards import RewardFunction
from lora_grpo.rollback import RollbackReport
from lora_grpo.trainer import loop
from lora_grpo.trainer.assembly import Assembly, Crew, Unheard, call, led, seed_everything, untouched_when_stopped
from lora_grpo.trainer.guards import Guard
from lora_grpo.trainer.models import Shared, Sharing
from lora_grpo.trainer.preflight import MemberSpec, Preflight, RolloutFunc
from lora_grpo.trainer.run import Run, roll_back, run_info, summary
from lora_grpo.trl_names import CONFIG, TRL_ARGUMENTS


class GRPOTrainer(Run, AbstractContextManager["GRPOTrainer"]):
    """Trains a LoRA adapter with GRPO: each step samples from the version that the last step published and proved.

    With `config.max_staleness` above 0, it samples while earlier steps are trained, from a version that is at most
    that many versions old. Timing then decides which version: such a run can resume, but not repeat bit by bit.

    It builds what you do not give: the engine on `model`, the PEFT model, the store. With `accelerate launch` or
    `torchrun`, every process builds and calls the same. The first one runs the trainer and writes the run; each has
    its own engine (or all share the first one's server). The steps equal those of one process with the same number
    of rows in an update.

    `model` is a hub name, a directory or a `ModelConfig` (with `peft_config`, a `peft.LoraConfig`), or a PeftModel
    on one of them. `reward_funcs` have TRL's signature, `f(prompts, completions, **columns) -> list[float]`.
    `train_dataset` and `eval_dataset` (held out) are a `datasets.Dataset`, a list of dicts with "prompt" or a file.
    `engine_config` is for the engine that it starts, `keep` says which versions stay, `run_dir` is the durable
    directory and `store_root` the folder on tmpfs (default: a new one). `rollout_func(prompts, engine, version)`
    replaces the engine's `generate`. `view=False` shows nothing on the terminal.
    `processing_class` is the tokenizer that renders prompts (default: the checkpoint's); its end token, and those
    of the model's generation config, end completions. An `engine` that you give stays open when the trainer closes.
    `shared` is what the trainers of a `Population` share instead of an engine. `guard` rolls back automatically when
    training goes wrong. With `share_base_weights`, trainer and engine use one copy of the base, in the engine's
    dtype: "auto" shares it if that costs nothing (CUDA, unquantized, same dtype), True also on the CPU, where
    decoding is then slower.

    Raises `ConfigError`, `UnsupportedAdapter`, `DeliveryError`, or `StoreLocked` with the process that has the run
    open, before anything is trained.

    >>> with GRPOTrainer(base, reward, GRPOConfig(total_steps=2), rows, peft_config=lora, run_dir="runs/a") as trainer:
    ...     result = trainer.train()
    ...     print(result["steps"], trainer.version, trainer.save_model("my-adapter", which="best:reward"))
    2 v3 v...
    """

    def __init__(
        self,
        model: str | Path | ModelConfig | nn.Module,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        config: GRPOConfig | None = None,
        train_dataset: Rows | PromptDataset | str | Path | None = None,
        *,
        eval_dataset: Rows | PromptDataset | str | Path | None = None,
        peft_config: Any = None,
        processing_class: Any = None,
        engine: Engine | None = None,
        engine_config: EngineConfig | None = None,
        keep: KeepConfig | None = None,
        run_dir: str | Path = "runs/grpo",
        store_root: str | Path | None = None,
        rollout_func: RolloutFunc | None = None,
        guard: Guard | None = None,
        share_base_weights: Sharing = "auto",
        view: bool = True,
        shared: Shared | None = None,
        **unknown: Any,
    ) -> None:
        _refuse_unknown(unknown, config)
        crew = Crew((config or GRPOConfig()).ddp_timeout)
        spec = MemberSpec(
            run_dir,
            reward_funcs,
            config or GRPOConfig(),
            train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            processing_class=processing_class,
            keep=keep,
            store_root=store_root,
            rollout_func=rollout_func,
            guard=guard,
        )
        named = ModelConfig(name=str(model)) if isinstance(model, str | Path) else model
        engine = engine if shared is None else shared.engine
        made_of = Preflight(named, spec, engine, engine_config or EngineConfig(), crew.processes.count)
        self._view, self._shared = view, shared
        self.at_work: Callable[[], AbstractContextManager[None]] = nullcontext  # a member's own random state
        self._build(crew, made_of, share_base_weights)

    def _build(self, crew: Crew, made_of: Preflight, sharing: Sharing) -> None:
        """Closed again when a part of it fails; nothing costly starts before all is checked."""
        self.result: dict[str, Any] = {}
        self.config, self.run_dir = made_of.config, Path(made_of.spec.run_dir)
        with (
            untouched_when_stopped(self.run_dir, made_of.spec.store_root) if crew.leads else nullcontext(),
            self._reporting() if crew.leads else nullcontext(Unheard()) as reporter,
            ExitStack() as self._closing,
        ):
            crew.processes.first(made_of.check)
            crew.parts = Assembly(self._closing, reporter, crew, made_of, sharing, self._shared).parts()
            room = getattr(crew.parts.engine, "max_model_len", None)
            reporter.message(crew.processes.first(lambda: made_of.check_prompts(room)))
            super().__init__(crew, made_of)
            self._closing.callback(self.source.close)
            self._closing = self._closing.pop_all()

    @led
    def train(self) -> dict[str, Any]:
        """Train until `config.total_steps`; returns a summary. Ctrl-C and errors leave the last version intact.

        Raises `ConfigError` if the run directory holds a run and you did not call `resume`.
        """
        with self.running() as reporter:
            loop.train(self, reporter)
        return self.result

    @contextmanager
    def running(self) -> Iterator[Reporter]:
        """Put your own steps of a run inside this block: its first version is ready; at the end `result` is set."""
        started = time.perf_counter()
        with self._reporting(quiet=self._shared is None) as reporter:
            reporter.start(run_info(self), step=self.steps_done)
            try:
                self._begin(reporter)
                with self.source.running():
                    yield reporter
            finally:
                self.store.flush()
            self.result = summary(self, time.perf_counter() - started)
            reporter.end(self.result)
        plot_run(self.run_dir)

    @led
    def rollback(self, to: Target) -> RollbackReport:
        """Take engine and trainer back to an earlier version: its number, "parent", "best", "best:METRIC" or itself.

        Weights, optimizer, schedule, random state and step are those of that version. The prompts do not go back and
        every sampling seed changes, so the next batches differ from those that led to the bad version. A learning rate
        that a guard has lowered stays low. If any part fails, nothing changes.
        """
        with self.at_work():
            return roll_back(self, to)

    @led
    def save_model(self, directory: str | Path, which: Target = "last") -> AdapterVersion:
        """Write a version as a plain PEFT folder that `PeftModel.from_pretrained` and vLLM load.

        "last" is the current version, "best" the one with the highest held-out reward (training reward if none was
        measured), "best:METRIC" the best by another metric; a number or a version names itself. Says on stderr which
        version it chose and why. Raises `ConfigError` for any other word.
        """
        named = {"last": "head", "best": f"best:{best_metric(self.store)}"}.get(str(which), which)
        version = self.store.get(named)
        weights = self.sync.export(version, Path(directory))
        with self._reporting() as reporter:
            reporter.message(f"saved {version} ({named}) to {directory}, weights {weights}")
        return version

    def close(self) -> None:
        """Close the store, and the engine if this trainer started it. A second call does nothing."""
        self._closing.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, reporter: Reporter) -> None:
        for sentence in _what_was_found(self.store.recovered):
            reporter.message(sentence)
        if self.store.head is None:
            self.crew(seed_everything, self.config.seed)
            keep_reference(self.run_dir, self.crew(call, "policy.reference.weights_now"))
            loop.publish(self, 0)
        elif not self.taken_up:
            raise ConfigError(f"{self.run_dir} holds a run at {self.version}; resume it, or choose another run_dir")
        loop.make_good(self, reporter)
        self.taken_up = True
        if not self.evaluations and self.steps_done == 0:
            loop.held_out(self, reporter)

    def _reporting(self, *, quiet: bool = True) -> Reporter:
        steps, trackers = self.config.total_steps, self.config.report_to
        return Reporter(self.run_dir, steps, view=self._view, trackers=trackers, quiet=quiet)


def _refuse_unknown(arguments: dict[str, Any], config: Any) -> None:
    for name in arguments:
        if name not in TRL_ARGUMENTS:
            raise TypeError(f"GRPOTrainer has no argument {name!r}")
        raise ConfigError(f"GRPOTrainer has no argument {name!r}: {TRL_ARGUMENTS[name]}")
    if not isinstance(config, GRPOConfig | None):
        raise ConfigError(f"config is a {type(config).__module__}.{type(config).__qualname__}: {CONFIG}")


def _what_was_found(recovered: Recovered) -> Iterator[str]:
    said = {
        "lost before they reached the archive: versions": recovered.lost,
        "trainer states lost before they reached the archive, of versions": recovered.lost_states,
        "damaged, differing from what was published: versions": recovered.damaged,
        "brought to the archive now: versions": recovered.unarchived,
        "unreadable, so that what they said of metrics and pins is lost: journal lines": recovered.damaged_lines,
        "deleted, half-written by a process that was killed: folders": recovered.swept,
        "tmpfs was out of date; what the archive has not got of it is yours to delete, in": recovered.set_aside,
    }
    yield from (f"{words} {', '.join(map(str, found))}" for words, found in said.items() if found)
    if recovered.head_moved is not None:
        before, now = recovered.head_moved
        yield f"HEAD was v{before}, which is lost; it is {'nowhere' if now is None else f'v{now}'} now"
    if recovered.copied_from is not None:
        yield f"a copy of the run in {recovered.copied_from}, which does not change"
