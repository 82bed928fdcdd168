"""Versions of a LoRA adapter out of any `transformers.Trainer`: for serving, and for going back."""

from typing import Any

from transformers import TrainerCallback

from lora_grpo.adapters.peft_form.serving import Held
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion, Target
from lora_grpo.engines.base import Engine, LoadReceipt
from lora_grpo.engines.fake import FakeEngine
from lora_grpo.errors import ConfigError
from lora_grpo.integrations.trl_settings import check_optimizer
from lora_grpo.rollback import RollbackReport
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.run import answer_requests

DTYPES = ("bfloat16", "float16", "float32")


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
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
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

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, lr_scheduler: Any, **_: Any
    ) -> None:
        """Check that the adapter can be served and publish it as it is. Raises `ConfigError`, `UnsupportedAdapter`."""
        if args.world_size > 1 or args.deepspeed or args.fsdp:
            raise ConfigError("one process publishes its own weights; train without torchrun, DeepSpeed and FSDP")
        check_optimizer(args)
        self.sync = NativeSync(model, self.engine, self.store, optimizer=optimizer, scheduler=lr_scheduler)
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

    def load(self, version: AdapterVersion, *, held: Held | None = None) -> LoadReceipt:
        return LoadReceipt("none", {}, 0, 0)

    def unload(self, version: AdapterVersion) -> None:
        """Nothing is loaded."""

    def _not_here(self, *_: Any, **__: Any) -> Any:
        raise ConfigError("versions are served elsewhere; pass PublishAdapter an engine to sample or compute here")

    generate = logprobs = describe_base = _not_here
