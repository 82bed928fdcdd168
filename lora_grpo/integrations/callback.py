"""Callbacks that publish what another trainer trains: of any `transformers.Trainer`, and what TRL samples through."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from lora_grpo.adapters.peft_form.modules import lora_modules
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.rollbacks import ancestors
from lora_grpo.adapters.version import AdapterVersion, Target
from lora_grpo.engines.base import Engine, LoadReceipt
from lora_grpo.engines.fake import FakeEngine
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.optimizer import Reach
from lora_grpo.grpo.processes import Processes
from lora_grpo.integrations.trl_settings import check_optimizer
from lora_grpo.metrics.render import BACKLOG
from lora_grpo.rollback import RollbackReport
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.run import answer_requests
from lora_grpo.types import Completion, Sampling, derive_seed

CANARY_EVERY = 10  # generations between full canaries, each an extra forward of a few rows
CANARY_ROWS = 16


class PublishAdapter(TrainerCallback):
    """Publishes the adapter when training begins, after every `every`-th optimizer step, and when it ends.

    With an `engine` each version is loaded and proven before it is promoted. Without one nothing here serves: `HEAD` is
    then the trainer's own place, and whoever opens the store with `readonly=True` loads and proves what it finds."""

    def __init__(
        self, store: AdapterStore, *, engine: Engine | None = None, every: int = 1, dtype: str = "bfloat16"
    ) -> None:
        """`dtype` is what versions are written in without an engine: the dtype that the serving one keeps adapters in.

        `store` and `engine` stay the caller's to close."""
        if every < 1:
            raise ConfigError(f"every={every} must be at least 1 optimizer step")
        if dtype not in ("bfloat16", "float16", "float32"):
            raise ConfigError(f"dtype={dtype!r} must be one of bfloat16, float16, float32")
        self.store, self.every = store, every
        self.engine: Engine = Elsewhere(dtype) if engine is None else engine
        self.sync: NativeSync | None = None
        self._published_at: int | None = None

    def rollback(self, to: Target) -> RollbackReport:
        """Trainer (and engine) go on from an earlier version: its number, "parent", "best", "best:METRIC" or itself.

        Weights, optimizer, schedule and random state are that version's where the store has an archive; the trainer's
        step counter and data go on. Call it from `on_step_end`, `on_log` or `on_evaluate`. Evaluation metrics are
        recorded with the version they measured, so "best:-eval_loss" is a target."""
        return self._sync.rollback(to)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **its: Any) -> None:
        """Check that the adapter can be served and publish it as it is. Raises `ConfigError`, `UnsupportedAdapter`."""
        if args.world_size > 1 or args.deepspeed or args.fsdp:
            raise ConfigError("one process publishes its own weights; train without torchrun, DeepSpeed and FSDP")
        check_optimizer(args)
        parts = {"optimizer": its["optimizer"], "scheduler": its["lr_scheduler"]}
        self.sync = NativeSync(model, self.engine, self.store, **parts)
        self._publish(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        answer_requests(self._sync)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self._publish(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, *, metrics: Any = None, **_: Any) -> None:
        """Keep the metrics with the version that holds the weights they were measured on, where there is one."""
        if self._published_at == state.global_step and metrics:
            known = {name: value for name, value in metrics.items() if isinstance(value, int | float | str | bool)}
            self.store.record(self._sync.head, **known)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._published_at != state.global_step:
            self._publish(state.global_step)
        self.store.flush()

    @property
    def _sync(self) -> NativeSync:
        if self.sync is None:
            raise ConfigError("training has not begun, so there is nothing to publish or to roll back")
        return self.sync

    def _publish(self, step: int) -> None:
        self._sync.push(step)
        self._published_at = step


class Elsewhere(FakeEngine):
    """The place of an engine when versions are served by other processes: nothing is loaded, proven or sampled."""

    def __init__(self, dtype: str) -> None:
        super().__init__(self._not_here)
        self.lora_dtype = dtype

    def load(self, version: AdapterVersion, **_: Any) -> LoadReceipt:
        return LoadReceipt("none", {}, 0, 0)

    def unload(self, version: AdapterVersion) -> None:
        """Nothing is loaded."""

    def _not_here(self, *_: Any, **__: Any) -> Any:
        raise ConfigError("versions are served elsewhere; pass PublishAdapter an engine to sample or compute here")

    generate = logprobs = describe_base = _not_here


class NativeRollouts(TrainerCallback):
    """What a TRL trainer samples through: each call from the version that holds its weights, and says which. At the end
    it publishes what was trained last. Raises `UnsupportedAdapter` for layers that the first gradients do not reach."""

    def __init__(self, engine: VLLMEngine, sync: NativeSync, sampling: Sampling, batch_rows: int) -> None:
        self.engine, self.sync, self.store = engine, sync, sync.store
        self._sampling, self._batch_rows = sampling, batch_rows
        self._found = self.store.head
        self._current: AdapterVersion | None = None
        self._moved, self._calls, self._generations = False, (-1, True, 0), 0
        self._earned: dict[tuple[int, str], tuple[float, int]] = {}

    @property
    def rolled_back(self) -> bool:
        """Whether `HEAD` went back since the last publication or generation."""
        return self._current is not None and self.store.head != self._current

    @property
    def sampled(self) -> int:
        return (self._current or self.sync.head).number

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Raises `ConfigError` when training starts from nothing in a directory that holds a run. A resumed one goes on
        from the version that holds its checkpoint's weights, where there is one."""
        if self._found is not None and state.global_step == 0:
            saved = get_last_checkpoint(args.output_dir) is not None
            resume = "go on with train(resume_from_checkpoint=True), or " if saved else "it has no checkpoint yet: "
            raise ConfigError(f"{self.store.archive} holds a run at {self._found}; {resume}name another output_dir")
        if self._found is not None:
            self._adopt(self._found, state.global_step)
        self._modules = lora_modules(model, self.sync.adapter)
        self._reach = Reach(self._modules, Processes())
        self._reach.begin()

    def _adopt(self, found: AdapterVersion, step: int) -> None:
        """Go on from the version of the checkpoint's weights; later ones are no parents of what follows."""
        for version in reversed([version for version in self.store.list() if version.step == step]):
            if self.sync.adopt(version):
                break
        else:
            return
        earlier = (one for one in ancestors(self.store, found.number) if one <= version.number)
        if (number := next(earlier, version.number)) < version.number:
            told = f"{found} comes from a rollback after this checkpoint; training goes on from weights of {version}"
            again = f"to go back again, call rollback(to={number}) in a callback"
            warnings.warn(f"{told}; {again}", RuntimeWarning, stacklevel=2)

    def on_step_begin(self, *_: Any, optimizer: Any, lr_scheduler: Any, **__: Any) -> None:
        self.sync.optimizer, self.sync.scheduler = optimizer, lr_scheduler
        answer_requests(self.sync)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._reach.watching:
            gradients = [module.b_OR.grad for module in self._modules]
            self._reach.check(signal=any(bool(grad.any()) for grad in gradients if grad is not None))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._moved = True  # no need to look, from here on, whether the weights are still `HEAD`'s

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._reach.end()
        # The last steps' weights were not sampled from, and would be no version.
        self.publish(state.global_step, self.sync.optimizer, self.sync.scheduler)
        self.store.flush()

    def publish(self, step: int, optimizer: Any = None, scheduler: Any = None) -> AdapterVersion:
        """The proven version that holds the trainer's weights: `HEAD` where they did not change, else a new one."""
        self.sync.optimizer, self.sync.scheduler = optimizer, scheduler
        head = self.store.head
        surely_new = self._moved and not self.rolled_back
        if head is None or surely_new or head not in self.engine.loaded() or not self.sync.holds(head):
            head = self.sync.push(step)
        self._current, self._moved = head, False
        return head

    def generate(self, prompts: Sequence[Sequence[int]], step: int, *, training: bool = True) -> list[Completion]:
        """One completion a prompt, all by `HEAD`; a prompt near the model's limit gets the tokens that are left.

        A resumed run samples alike, so the calls of an evaluation, which it does not make again, count apart."""
        self._current = version = self.sync.head
        *moment, call = self._calls
        self._calls = (step, training, call + 1 if moment == [step, training] else 0)
        plain, left = self._sampling, [max(1, self.engine.max_model_len - len(ids)) for ids in prompts]
        seeded = replace(plain, seed=derive_seed(plain.seed or 0, *self._calls))
        own = [replace(seeded, max_tokens=min(plain.max_tokens, most), first_prompt=p) for p, most in enumerate(left)]
        groups = self.engine.generate(prompts, own, adapter=version)
        due, self._generations = self._generations % CANARY_EVERY == 0, self._generations + 1
        # Filtered completions come from another distribution than the one that the trainer describes.
        whole = plain.temperature > 0 and (plain.top_p, plain.top_k, plain.min_p) == (1.0, 0, 0.0)
        if due and whole and self.sync.probe is not None:
            self.sync.canary(groups[:CANARY_ROWS], temperature=plain.temperature, batch_rows=self._batch_rows)
        return [group.completions[0] for group in groups]

    def record(self, rewards_BF: Any, names: Sequence[str], weights: Any, *, training: bool) -> dict[str, float]:
        """Keep mean rewards with the version that earned them (`eval/` outside training); returns what to log."""
        prefix, number = "" if training else "eval/", self.sampled
        totals_B = (rewards_BF * weights.to(rewards_BF.device)).nansum(dim=1)
        columns = {"reward": totals_B[~rewards_BF.isnan().all(dim=1)]}
        columns |= {f"rewards/{name}/mean": rewards_BF[:, i] for i, name in enumerate(names)}
        found: dict[str, float] = {}
        for name, values in columns.items():
            total, count = self._earned.get((number, prefix + name), (0.0, 0))
            total, count = total + float(values.nansum()), count + int((~values.isnan()).sum())
            self._earned[number, prefix + name] = (total, count)
            if count:
                found[prefix + name] = total / count
        self.store.record(number, **found)
        pushed = self.sync.last_receipt
        # A version that was rolled back to was not pushed last.
        timings = pushed.metrics if pushed is not None and pushed.version.number == number else {}
        return {"version": float(number), **timings, BACKLOG: float(self.store.archive_backlog_bytes)}
