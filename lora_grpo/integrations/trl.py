"""TRL's GRPOTrainer without merging: versions are published, proven and sampled from, and come back in one call.

Every touch of TRL's internals is in this file. Relied on in TRL 1.16: `trl.trainer.grpo_trainer` looks
`VLLMGeneration`, `create_model_from_path` (which takes an `architecture`) and `AutoProcessor` up when a trainer is
built, and of what the first makes the trainer uses `sync_weights()`, `generate(...)` and, with tools,
`llm.llm_engine.model_config.max_model_len`; by then `eos_token_ids` holds the tokenizer's end token and those of the
model's generation config; `_tokenize_prompts` returns token ids first, of texts or of chats; `sync_weights` is called
before the first generation after every optimizer step; `_calculate_rewards` gets one row a completion and returns
rewards by function; `_buffered_inputs` set to None makes the next step generate anew."""

import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer
from transformers.utils.versions import require_version

from lora_grpo.adapters.peft_form.checks import active_adapter, check_servable
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.retention import keeps_state, retention
from lora_grpo.adapters.version import AdapterVersion, Target
from lora_grpo.config import KeepConfig, ModelConfig
from lora_grpo.engines.compat.patching import replaced
from lora_grpo.engines.local.targets import check_is_base, checkpoint_config, full_class, model_class
from lora_grpo.engines.requests import one_bos
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError, UnsupportedVersion
from lora_grpo.integrations.callback import NativeRollouts
from lora_grpo.integrations.trl_settings import check_arguments, check_reference, check_types, sampling_of, vllm_args
from lora_grpo.metrics.reporter import check_folder
from lora_grpo.rollback import RollbackReport
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.assembly import untouched_when_stopped
from lora_grpo.trainer.models import adapted_leaves, check_same_device, lora_rank

REQUIREMENT = "trl>=1.16,<1.17"


def check_release() -> None:
    """Raises `UnsupportedVersion` unless the TRL that is installed is one that this file was read against."""
    try:
        require_version(REQUIREMENT)
    except ImportError as error:
        instead = "install lora-grpo[trl], or train with lora_grpo.GRPOTrainer, which needs no TRL"
        raise UnsupportedVersion(f"{REQUIREMENT} is needed ({error}): {instead}") from error


check_release()

from trl.trainer import grpo_trainer  # noqa: E402  the release is checked before any of it is imported


class NativeGRPOTrainer(grpo_trainer.GRPOTrainer):
    """`trl.GRPOTrainer` whose completions come from proven adapter versions; nothing is merged on the way.

    Rewards, data, losses, logging, checkpoints and callbacks are TRL's. `native` holds the engine, the store and the
    sync; `rollback` works from a callback's `on_step_end`, `on_log` or `on_evaluate`. `lora-grpo rollback` and its like
    on the run's directory are answered before the next step."""

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
        `DeliveryError` when the probe does not arrive."""
        dataset = named.get("train_dataset", next(iter(others), None))
        own = {"keep": keep, "engine_args": engine_args, "run_dir": run_dir, "store_root": store_root}
        check_types({"model": model, "reward_funcs": reward_funcs, "train_dataset": dataset, **own})
        check_arguments(args, named.get("peft_config"))
        code = {name: (args.model_init_kwargs or {}).get(name) for name in ("revision", "trust_remote_code")}
        _check_base(model, named.get("peft_config"), code)
        check_reference(model, args)
        self._closing, self._keep, self._engine_args = ExitStack(), keep or KeepConfig(), engine_args or {}
        folder = Path(run_dir or Path(args.output_dir) / "native")
        build = partial(self._backend, args, folder, store_root, code["revision"])
        load = partial(_load, grpo_trainer.create_model_from_path)
        with untouched_when_stopped(folder, store_root), ExitStack() as on_failure:
            on_failure.callback(self._closing.close)
            # With a processor of images, TRL would take every batch for one of images.
            stand_ins = {"VLLMGeneration": build, "create_model_from_path": load, "AutoProcessor": AutoTokenizer}
            with replaced(grpo_trainer, **stand_ins):
                super().__init__(model, reward_funcs, args, *others, **named)
            on_failure.pop_all()
        self.add_callback(self.native)
        weakref.finalize(self, self._closing.close)

    def publish(self) -> AdapterVersion:
        """The proven version that holds the weights as they are now, for sampling through `native.engine`."""
        return self.native.publish(self.state.global_step, self.optimizer, self.lr_scheduler)

    def rollback(self, to: Target) -> RollbackReport:
        """Engine and trainer go on from an earlier version: its number, "parent", "best", "best:METRIC" or itself.

        Weights, optimizer, schedule and random state are those of that version; completions sampled from later ones
        are thrown away. TRL's step counter and the order of the prompts go on."""
        return self.native.sync.rollback(to)

    def close(self) -> None:
        """Close the engine and the store; happens at exit by itself. A second call does nothing."""
        self._closing.close()

    # What TRL calls

    def _backend(self, args: Any, run_dir: Path, store_root: Any, revision: Any, **given: Any) -> SimpleNamespace:
        """In place of its `VLLMGeneration`; what cannot be served is refused before the engine starts."""
        sampling, model, keep = sampling_of(given, args.seed, self.eos_token_ids), given["model"], self._keep
        if not hasattr(model, "peft_config"):
            raise ConfigError("full fine-tuning has no adapter: pass peft_config=LoraConfig(), or use trl.GRPOTrainer")
        check_servable(model, active_adapter(model))
        # Each wrapped layer costs decoding time, whether an adapter uses it or not.
        adapted = {"target_modules": adapted_leaves(model, None)}
        keywords = vllm_args({**given, "revision": revision}, lora_rank(model, None), {**adapted, **self._engine_args})
        check_folder(run_dir)
        store = AdapterStore(store_root, archive=run_dir, retention=retention(keep), budget_bytes=keep.budget_bytes)
        self._closing.callback(store.close)
        engine = VLLMEngine(keywords.pop("model"), **keywords)
        self._closing.callback(engine.close)
        check_same_device(model, engine)
        sync = NativeSync(model, engine, store, keep_state=keeps_state(keep), tokenizer=given["processing_class"])
        self._closing.callback(sync.close)
        self.native = NativeRollouts(engine, sync, sampling, args.per_device_train_batch_size)
        # All of vLLM that TRL looks at; sampling past `generate` would not name a version.
        config = SimpleNamespace(max_model_len=engine.max_model_len)
        llm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=config))
        return SimpleNamespace(llm=llm, sync_weights=self.publish, generate=self._complete)

    def _complete(self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None) -> Any:
        """TRL's form: (prompt ids, completion ids, log-probs B T 1, their token ids B T 1), one row a prompt given.
        `prompts` holds each prompt `num_generations` times already. A log-prob that is not a number is None."""
        if images is not None and any(images):
            raise ConfigError("images cannot be sampled with an adapter yet; train on text prompts")
        with profiler or nullcontext():
            made = self.native.generate(prompts, self.state.global_step, training=self.model.training)
        return (
            [list(ids) for ids in prompts],
            [list(completion.token_ids) for completion in made],
            [[[None if math.isnan(logp) else logp] for logp in completion.logprobs] for completion in made],
            [[[token] for token in completion.token_ids] for completion in made],
        )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self.native.rolled_back:
            # What is buffered was sampled from the version that was left.
            self._buffered_inputs = None
        return super()._prepare_inputs(generation_batch)

    def _tokenize_prompts(self, prompts: Any) -> Any:
        prompt_ids, *others = super()._tokenize_prompts(prompts)
        if isinstance(prompts[0], str):
            prompt_ids = [list(one_bos(self._tokenizer, ids)) for ids in prompt_ids]
        return prompt_ids, *others

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not (Path(resume_from_checkpoint) / "trainer_state.json").is_file():
            said = f"{resume_from_checkpoint} has no trainer_state.json, which is written last"
            raise ConfigError(f"{said}, so its save was interrupted; delete it, and resume again")
        if not (Path(resume_from_checkpoint) / "optimizer.pt").is_file():
            lost = f"{resume_from_checkpoint} has no optimizer.pt: optimizer and schedule start anew"
            warnings.warn(f"{lost}; to resume exactly, save with save_only_model=False", RuntimeWarning, stacklevel=2)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if "ref" in getattr(model, "peft_config", {}):
            # With an adapter in a sub-folder, transformers loads that one alone, and training would begin anew.
            model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
            model.set_adapter("default")

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        rewards_BF = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        names, weights = self.reward_func_names, self.reward_weights
        for name, value in self.native.record(rewards_BF, names, weights, training=self.model.training).items():
            self._log_metric(name, value)
        self._log_completion_extra("version", [self.native.sampled] * len(prompts))
        return rewards_BF


def _check_base(model: Any, peft_config: Any, code: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for an adapter in place of a base, or layers that it does not have."""
    by_name = isinstance(model, str | Path)
    if by_name:
        check_is_base(model, revision=code["revision"])
    checkpoint = str(model) if by_name else getattr(model, "name_or_path", "")
    if checkpoint and peft_config is not None:
        known = {name: value for name, value in code.items() if value is not None}
        adapted_leaves(ModelConfig(name=checkpoint, **known), peft_config)


def _load(create: Callable[..., Any], name: str, **keywords: Any) -> Any:
    """By TRL's `create_model_from_path`; of a multimodal checkpoint the language model alone."""
    known = {key: keywords[key] for key in ("revision", "trust_remote_code") if keywords.get(key)}
    config = checkpoint_config(name, **known)
    return create(name, architecture=None if full_class(config) is None else model_class(config), **keywords)
