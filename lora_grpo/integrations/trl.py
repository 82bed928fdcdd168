"""TRL's GRPOTrainer without merging: versions are published, proven and sampled from, and come back in one call.

    from lora_grpo.integrations.trl import NativeGRPOTrainer as GRPOTrainer

in place of `from trl import GRPOTrainer` is all that a script with `use_vllm=True, vllm_mode="colocate"` needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lora_grpo.adapters.files.digest import digest_buffers
from lora_grpo.adapters.peft_form.checks import active_adapter, check_servable
from lora_grpo.adapters.peft_form.modules import lora_modules
from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.config import KeepConfig, ModelConfig
from lora_grpo.engines.local.targets import check_is_base
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.processes import Processes
from lora_grpo.grpo.reach import Reach
from lora_grpo.integrations.own_loop import answer_requests
from lora_grpo.integrations.trl_internals import Backend, HookedTrainer, generation_by
from lora_grpo.integrations.trl_settings import Given, check_arguments, check_reference, check_types
from lora_grpo.metrics import check_folder
from lora_grpo.metrics.render import BACKLOG
from lora_grpo.rollback import RollbackReport, Target
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.assembly import keeps_state, retention, untouched_when_stopped
from lora_grpo.trainer.models import adapted_leaves, check_same_device
from lora_grpo.types import Completion, Sampling, derive_seed

CANARY_EVERY = 10
"""Generations between full canaries, each an extra forward of a few rows."""
CANARY_ROWS = 16


class NativeRollouts:
    """What a TRL trainer samples through: each call from the version that holds its weights, and says which."""

    def __init__(self, engine: VLLMEngine, sync: NativeSync, sampling: Sampling, batch_rows: int) -> None:
        self.engine, self.sync, self.store = engine, sync, sync.store
        self._sampling, self._batch_rows = sampling, batch_rows
        self._found = self.store.head
        self._current: AdapterVersion | None = None
        self._moved = False
        self._calls = (-1, 0)
        self._generations = 0
        self._earned: dict[tuple[int, str], tuple[float, int]] = {}

    @property
    def max_model_len(self) -> int:
        """Prompt plus completion, tokens at most."""
        return self.engine.max_model_len

    @property
    def rolled_back(self) -> bool:
        """Whether `HEAD` went back since the last publication or generation."""
        return self._current is not None and self.store.head != self._current

    @property
    def sampled(self) -> int:
        """The number of the version that was sampled from last."""
        return (self._current or self.sync.head).number

    def begin(self, step: int) -> None:
        """Raises `ConfigError` when training starts from nothing in a directory that holds a run."""
        if self._found is not None and step == 0:
            raise ConfigError(
                f"{self.store.archive} holds a run at {self._found}; go on with train(resume_from_checkpoint=True), "
                "or name another output_dir"
            )

    def answer_requests(self, optimizer: Any, scheduler: Any) -> None:
        """Do what other processes ask of the run, rollbacks among it; between two optimizer steps."""
        self.sync.optimizer, self.sync.scheduler = optimizer, scheduler
        answer_requests(self.sync)

    def stepped(self) -> None:
        """The optimizer has stepped: there is no need to look whether the weights are still `HEAD`'s."""
        self._moved = True

    def publish(self, step: int, optimizer: Any = None, scheduler: Any = None) -> AdapterVersion:
        """The proven version that holds the trainer's weights: `HEAD` where they did not change, else a new one."""
        self.sync.optimizer, self.sync.scheduler = optimizer, scheduler
        head = self.store.head
        surely_new = self._moved and not self.rolled_back
        if head is None or surely_new or head not in self.engine.loaded() or not self._trainer_holds(head):
            head = self.sync.push(step)
        self._current, self._moved = head, False
        return head

    def _trainer_holds(self, version: AdapterVersion) -> bool:
        dtype = getattr(torch, self.engine.lora_dtype)
        return digest_buffers(ServingForm(self.sync.model, self.sync.adapter, dtype).files()) == version.digest

    def generate(self, prompts: Sequence[Sequence[int]], step: int) -> list[Completion]:
        """One completion a prompt, all by `HEAD`; a prompt near the model's limit gets the tokens that are left.

        Seeds derive from the run's, the step and the call within it, so that a resumed run samples alike.
        """
        self._current = version = self.sync.head
        self._calls = (step, self._calls[1] + 1 if self._calls[0] == step else 0)
        limits = [min(self._sampling.max_tokens, max(1, self.max_model_len - len(ids))) for ids in prompts]
        made: dict[int, Completion] = {}
        for limit in sorted(set(limits), reverse=True):
            rows = [row for row, own in enumerate(limits) if own == limit]
            seed = derive_seed(self._sampling.seed or 0, *self._calls, limit)
            sampling = replace(self._sampling, max_tokens=limit, seed=seed)
            groups = self.engine.generate([prompts[row] for row in rows], sampling, adapter=version)
            self._canary(groups)
            made |= {row: group.completions[0] for row, group in zip(rows, groups, strict=True)}
        return [made[row] for row in range(len(prompts))]

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
        receipt = self.sync.last_receipt
        timings = {f"sync/{phase}_s": seconds for phase, seconds in receipt.seconds.items()} if receipt else {}
        return {"version": float(number), **timings, BACKLOG: float(self.store.archive_backlog_bytes)}

    def _canary(self, groups: Sequence[Any]) -> None:
        """At its cadence, where sampler and trainer describe one distribution. Raises `DeliveryError`."""
        due, plain = self._generations % CANARY_EVERY == 0, self._sampling
        self._generations += 1
        filtered = (plain.top_p, plain.top_k, plain.min_p) != (1.0, 0, 0.0)
        if due and plain.temperature > 0 and not filtered and self.sync.probe is not None:
            self.sync.canary(groups[:CANARY_ROWS], temperature=plain.temperature, batch_rows=self._batch_rows)


class NativeGRPOTrainer(HookedTrainer):
    """`trl.GRPOTrainer` whose completions come from proven adapter versions; nothing is merged on the way.

    Rewards, data, losses, logging, checkpoints and callbacks are TRL's. `native` holds the engine, the store and the
    sync; `rollback` works from a callback's `on_step_end`, `on_log` or `on_evaluate`. `lora-grpo rollback` and its like
    on the run's directory are answered before the next step.
    """

    native: NativeRollouts

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *others: Any,
        keep: KeepConfig | None = None,
        engine_args: Mapping[str, Any] | None = None,
        run_dir: str | Path | None = None,
        store_root: str | Path | None = None,
        **named: Any,
    ) -> None:
        """TRL's arguments, and: `keep` says which versions are kept, `engine_args` are further keywords of
        `VLLMEngine`, `run_dir` is the durable directory of versions and provenance (default: OUTPUT_DIR/native),
        `store_root` the one on tmpfs.

        Raises `ConfigError` or `UnsupportedAdapter`, with the alternative, for what cannot work without merging, and
        `DeliveryError` when the probe does not arrive.
        """
        dataset = named.get("train_dataset", next(iter(others), None))
        places = {"run_dir": run_dir, "store_root": store_root}
        check_types(model, reward_funcs, dataset, keep, engine_args, places)
        check_arguments(args, named.get("peft_config"))
        said = {name: (args.model_init_kwargs or {}).get(name) for name in ("revision", "trust_remote_code")}
        if isinstance(model, str | Path):
            check_is_base(model, revision=said["revision"])
        checkpoint = str(model) if isinstance(model, str | Path) else getattr(model, "name_or_path", "")
        if checkpoint and named.get("peft_config") is not None:
            known = {name: value for name, value in said.items() if value is not None}
            adapted_leaves(ModelConfig(name=checkpoint, **known), named["peft_config"])
        check_reference(model, args)
        self._closing = ExitStack()

        folder = Path(run_dir or Path(args.output_dir) / "native")

        def build(**keywords: Any) -> Backend:
            revision = (args.model_init_kwargs or {}).get("revision")
            given = Given(keywords["model"], keywords, revision, args.seed, self.eos_token_ids)
            sampling = given.sampling()
            engine, sync = _assemble(self._closing, given, engine_args or {}, keep or KeepConfig(), folder, store_root)
            self.native = self.rollouts = NativeRollouts(engine, sync, sampling, args.per_device_train_batch_size)
            return Backend(self, self.native)

        with untouched_when_stopped(folder, store_root), ExitStack() as on_failure:
            on_failure.callback(self._closing.close)
            with generation_by(build):
                super().__init__(model, reward_funcs, args, *others, **named)
            on_failure.pop_all()
        self.add_callback(_Steps(self.native))
        weakref.finalize(self, self._closing.close)

    def publish(self) -> AdapterVersion:
        """The proven version that holds the weights as they are now, for sampling through `native.engine`."""
        return self.native.publish(self.state.global_step, self.optimizer, self.lr_scheduler)

    def rollback(self, to: Target) -> RollbackReport:
        """Engine and trainer go on from an earlier version: its number, "parent", "best", "best:METRIC" or itself.

        Weights, optimizer, schedule and random state are those of that version; completions sampled from later ones
        are thrown away. TRL's step counter and the order of the prompts go on.
        """
        return self.native.sync.rollback(to)

    def close(self) -> None:
        """Close the engine and the store; happens at exit by itself. A second call does nothing."""
        self._closing.close()


class _Steps(TrainerCallback):
    """Tells the rollouts when training begins, before each step, and when weights move; makes what was published
    durable when it ends. Raises `UnsupportedAdapter` for layers that the first gradients do not reach."""

    def __init__(self, native: NativeRollouts) -> None:
        self._native = native

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self._native.begin(state.global_step)
        self._modules = lora_modules(model, self._native.sync.adapter)
        self._reach = Reach(self._modules, Processes())
        self._reach.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._reach.watching:
            gradients = [module.b_OR.grad for module in self._modules]
            self._reach.check(signal=any(bool(grad.any()) for grad in gradients if grad is not None))

    def on_step_begin(
        self, args: Any, state: Any, control: Any, *, optimizer: Any, lr_scheduler: Any, **_: Any
    ) -> None:
        self._native.answer_requests(optimizer, lr_scheduler)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._native.stepped()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._reach.end()
        self._native.store.flush()


def _assemble(
    closing: ExitStack,
    given: Given,
    engine_args: Mapping[str, Any],
    keep: KeepConfig,
    run_dir: Path,
    store_root: str | Path | None,
) -> tuple[VLLMEngine, NativeSync]:
    """Engine and sync of a trainer; what cannot be served is refused before the engine starts."""
    if not hasattr(given.model, "peft_config"):
        raise ConfigError(
            "full fine-tuning has no adapter to swap: pass peft_config=LoraConfig(...), or use trl.GRPOTrainer"
        )
    modules = check_servable(given.model, active_adapter(given.model))
    # Each wrapped layer costs decoding time, whether an adapter uses it or not.
    adapted = {module.path.rsplit(".", 1)[-1] for module in modules}
    rank = max(module.a_RI.shape[0] for module in modules)
    keywords = given.engine_args(rank, {"target_modules": sorted(adapted), **engine_args})
    check_folder(run_dir)
    store = AdapterStore(store_root, archive=run_dir, retention=retention(keep), budget_bytes=keep.budget_bytes)
    closing.callback(store.close)
    engine = VLLMEngine(keywords.pop("model"), **keywords)
    closing.callback(engine.close)
    check_same_device(given.model, engine)
    tokenizer = given.keywords["processing_class"]
    sync = NativeSync(given.model, engine, store, keep_state=keeps_state(keep), tokenizer=tokenizer)
    closing.callback(sync.close)
    return engine, sync
