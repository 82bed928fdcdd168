"""Every touch of TRL's internals: what is read, replaced or overridden in TRL 1.16's GRPOTrainer, and nothing else.

Relied on: `trl.trainer.grpo_trainer` looks `VLLMGeneration`, `create_model_from_path` (which takes an `architecture`)
and `AutoProcessor` up when a trainer is built, and of what the first makes the
trainer uses `sync_weights()`, `generate(...)` and, with tools, `llm.llm_engine.model_config.max_model_len`; by then
`eos_token_ids` holds the tokenizer's end token and those of the model's generation config; `_tokenize_prompts` returns
token ids first, of texts or of chats; `sync_weights` is called before the first generation after every optimizer step;
`_calculate_rewards` gets one row a completion and returns rewards by function; `_buffered_inputs` set to None makes the
next step generate anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer
from transformers.utils.versions import require_version

from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.local.targets import checkpoint_config, full_class, model_class
from lora_grpo.engines.requests import one_bos
from lora_grpo.errors import ConfigError, UnsupportedVersion
from lora_grpo.integrations.trl_rollouts import NativeRollouts

REQUIREMENT = "trl>=1.16,<1.17"


def check_release() -> None:
    """Raises `UnsupportedVersion` unless the TRL that is installed is one that this file was read against."""
    try:
        require_version(REQUIREMENT)
    except ImportError as error:
        raise UnsupportedVersion(
            f"no other TRL than {REQUIREMENT} was run with or read against ({error}): install lora-grpo[trl], or train "
            "with lora_grpo.GRPOTrainer, which needs no TRL"
        ) from error


check_release()

from trl.trainer import grpo_trainer  # noqa: E402  the release is checked before any of it is imported


class Backend:
    """Stands where TRL keeps its `VLLMGeneration`; merges nothing and pushes no weights."""

    def __init__(self, trainer: HookedTrainer) -> None:
        self._trainer = trainer
        model_config = SimpleNamespace(max_model_len=trainer.native.engine.max_model_len)
        self.llm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=model_config))
        """All of vLLM that TRL looks at from outside; sampling past `generate` would not name a version."""

    def sync_weights(self) -> None:
        self._trainer.publish()

    def generate(
        self,
        prompts: list[list[int]],
        images: Sequence[Any] | None,
        num_generations: int,
        profiler: AbstractContextManager[Any] | None = None,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float | None]]], list[list[list[int]]]]:
        """TRL's form: (prompt ids, completion ids, log-probs B T 1, their token ids B T 1), one row a prompt given.

        `prompts` holds each prompt `num_generations` times already. A log-prob that is not a number is None.
        """
        if images is not None and any(images):
            raise ConfigError("images cannot be sampled with an adapter yet; train on text prompts")
        with profiler or nullcontext():
            training = self._trainer.model.training
            made = self._trainer.native.generate(prompts, self._trainer.state.global_step, training=training)
        return (
            [list(ids) for ids in prompts],
            [list(completion.token_ids) for completion in made],
            [[[None if math.isnan(logp) else logp] for logp in completion.logprobs] for completion in made],
            [[[token] for token in completion.token_ids] for completion in made],
        )


@contextmanager
def generation_by(make: Callable[..., Backend]) -> Iterator[None]:
    """Meanwhile a TRL trainer that is built calls `make` with the keywords of `VLLMGeneration` instead of that, and
    loads the language model alone of a multimodal checkpoint, with its tokenizer."""
    stock = {
        name: getattr(grpo_trainer, name) for name in ("VLLMGeneration", "create_model_from_path", "AutoProcessor")
    }
    load = partial(_load, stock["create_model_from_path"])
    try:
        # With a processor of images, TRL would take every batch for one of images.
        vars(grpo_trainer).update(VLLMGeneration=make, create_model_from_path=load, AutoProcessor=AutoTokenizer)
        yield
    finally:
        vars(grpo_trainer).update(stock)


def _load(create: Callable[..., Any], name: str, **keywords: Any) -> Any:
    known = {key: keywords[key] for key in ("revision", "trust_remote_code") if keywords.get(key)}
    config = checkpoint_config(name, **known)
    return create(name, architecture=None if full_class(config) is None else model_class(config), **keywords)


class HookedTrainer(grpo_trainer.GRPOTrainer):
    """TRL's trainer with provenance: rewards go to the version that earned them, stale rollouts are not trained on."""

    native: NativeRollouts

    def publish(self) -> AdapterVersion:
        """The proven version that holds the weights as they are now, for sampling through `native.engine`."""
        return self.native.publish(self.state.global_step, self.optimizer, self.lr_scheduler)

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
            raise ConfigError(
                f"{resume_from_checkpoint} has no trainer_state.json, which is written last, so its save was "
                "interrupted; delete it, and resume again"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if "ref" in getattr(model, "peft_config", {}):
            # With an adapter in a sub-folder, transformers loads that one alone, and training would begin anew.
            model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
            model.set_adapter("default")

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        rewards_BF = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        names, weights = self.reward_func_names, self.reward_weights
        metrics = self.native.record(rewards_BF, names, weights, training=self.model.training)
        self._log_completion_extra("version", [self.native.sampled] * len(prompts))
        for name, value in metrics.items():
            self._log_metric(name, value)
        return rewards_BF
