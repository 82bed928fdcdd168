"""TRL's GRPOTrainer without merging: versions are published, proven and sampled from, and come back in one call.

    from lora_grpo.integrations.trl import NativeGRPOTrainer as GRPOTrainer

in place of `from trl import GRPOTrainer` is all that a script with `use_vllm=True, vllm_mode="colocate"` needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lora_grpo.adapters.peft_form.checks import active_adapter, check_servable
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.retention import keeps_state, retention
from lora_grpo.config import KeepConfig, ModelConfig
from lora_grpo.engines.local.targets import check_is_base
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError
from lora_grpo.integrations.trl_internals import Backend, HookedTrainer, generation_by
from lora_grpo.integrations.trl_rollouts import NativeRollouts
from lora_grpo.integrations.trl_settings import check_arguments, check_reference, check_types, sampling_of, vllm_args
from lora_grpo.metrics.reporter import check_folder
from lora_grpo.rollback import RollbackReport, Target
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.assembly import untouched_when_stopped
from lora_grpo.trainer.models import adapted_leaves, check_same_device, lora_rank


class NativeGRPOTrainer(HookedTrainer):
    """`trl.GRPOTrainer` whose completions come from proven adapter versions; nothing is merged on the way.

    Rewards, data, losses, logging, checkpoints and callbacks are TRL's. `native` holds the engine, the store and the
    sync; `rollback` works from a callback's `on_step_end`, `on_log` or `on_evaluate`. `lora-grpo rollback` and its like
    on the run's directory are answered before the next step.
    """

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
        own = {"keep": keep, "engine_args": engine_args, "run_dir": run_dir, "store_root": store_root}
        check_types({"model": model, "reward_funcs": reward_funcs, "train_dataset": dataset, **own})
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
            given = {**keywords, "revision": said["revision"]}
            sampling = sampling_of(given, args.seed, self.eos_token_ids)
            engine, sync = _assemble(self._closing, given, engine_args or {}, keep or KeepConfig(), folder, store_root)
            self.native = NativeRollouts(engine, sync, sampling, args.per_device_train_batch_size)
            return Backend(self)

        with untouched_when_stopped(folder, store_root), ExitStack() as on_failure:
            on_failure.callback(self._closing.close)
            with generation_by(build):
                super().__init__(model, reward_funcs, args, *others, **named)
            on_failure.pop_all()
        self.add_callback(self.native)
        weakref.finalize(self, self._closing.close)

    def rollback(self, to: Target) -> RollbackReport:
        """Engine and trainer go on from an earlier version: its number, "parent", "best", "best:METRIC" or itself.

        Weights, optimizer, schedule and random state are those of that version; completions sampled from later ones
        are thrown away. TRL's step counter and the order of the prompts go on.
        """
        return self.native.sync.rollback(to)

    def close(self) -> None:
        """Close the engine and the store; happens at exit by itself. A second call does nothing."""
        self._closing.close()


def _assemble(
    closing: ExitStack,
    given: Mapping[str, Any],
    engine_args: Mapping[str, Any],
    keep: KeepConfig,
    run_dir: Path,
    store_root: str | Path | None,
) -> tuple[VLLMEngine, NativeSync]:
    """Engine and sync of a trainer; what cannot be served is refused before the engine starts."""
    model = given["model"]
    if not hasattr(model, "peft_config"):
        raise ConfigError(
            "full fine-tuning has no adapter to swap: pass peft_config=LoraConfig(...), or use trl.GRPOTrainer"
        )
    check_servable(model, active_adapter(model))
    # Each wrapped layer costs decoding time, whether an adapter uses it or not.
    adapted = {"target_modules": adapted_leaves(model, None)}
    keywords = vllm_args(given, lora_rank(model, None), {**adapted, **engine_args})
    check_folder(run_dir)
    store = AdapterStore(store_root, archive=run_dir, retention=retention(keep), budget_bytes=keep.budget_bytes)
    closing.callback(store.close)
    engine = VLLMEngine(keywords.pop("model"), **keywords)
    closing.callback(engine.close)
    check_same_device(model, engine)
    tokenizer = given["processing_class"]
    sync = NativeSync(model, engine, store, keep_state=keeps_state(keep), tokenizer=tokenizer)
    closing.callback(sync.close)
    return engine, sync
