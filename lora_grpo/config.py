"""Settings: small frozen models, checked once when built; an unknown key is refused with the nearest name.

Fields carry TRL's names wherever the meaning is TRL's. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_grpo.errors import ConfigError

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class Section(BaseModel):
    """A frozen group of settings; building one with a bad value raises `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from None

    def replace(self, **changes: Any) -> Any:
        """A copy with `changes`, checked like a new one."""
        return type(self)(**{**self.model_dump(), **changes})


def _explain(section: type[BaseModel], error: ValidationError) -> str:
    """One sentence a problem: the field, the value, what is wrong, and for an unknown key the nearest name."""
    return "; ".join(_sentence(section, problem) for problem in error.errors())


def _sentence(section: type[BaseModel], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or section.__name__
    if problem["type"] == "extra_forbidden":
        known = sorted(_fields_at(section, problem["loc"][:-1]))
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where!r}: {hint}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    shown = "" if problem["type"] in {"missing", "value_error"} else f" (got {problem['input']!r})"
    return f"{where}: {message}{shown}"


def _fields_at(section: type[BaseModel], path: tuple[Any, ...]) -> set[str]:
    for part in path:
        field = section.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            continue
        section = field.annotation
    return set(section.model_fields)


class GRPOConfig(Section):
    """The algorithm and its optimisation. One step is one rollout: generate, reward, update, publish."""

    seed: int = Field(42, ge=0, description="seed of the run; every request's own seed derives from it")
    total_steps: int = Field(100, ge=1, description="rollout steps to run")

    num_generations: int = Field(8, ge=2, description="completions a prompt (the group)")
    generation_batch_size: int | None = Field(
        None, ge=2, description="completions a step over all processes; default: one optimizer batch"
    )
    per_device_train_batch_size: int = Field(8, ge=1, description="rows a micro-batch on each process")
    gradient_accumulation_steps: int = Field(8, ge=1, description="micro-batches an optimizer update")
    num_iterations: int = Field(1, ge=1, description="passes over each rollout batch")

    max_completion_length: int = Field(256, ge=1, description="tokens a completion at most")
    temperature: float = Field(1.0, gt=0, description="of the sampler, and of the trainer's log-probs")
    top_p: float = Field(1.0, description="1 only: filtered sampling is not corrected for in the loss")
    top_k: int = Field(0, description="0 only: filtered sampling is not corrected for in the loss")
    min_p: float = Field(0.0, description="0 only: filtered sampling is not corrected for in the loss")

    loss_type: LossType = Field("dapo", description="how token losses are formed and averaged")
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token", description="'sequence' is GSPO's length-normalised ratio"
    )
    epsilon: float = Field(0.2, ge=0, description="lower clip of the ratio (1 - epsilon)")
    epsilon_high: float | None = Field(None, ge=0, description="upper clip (1 + epsilon_high); default: epsilon")
    delta: float | None = Field(None, gt=0, description="two-sided clip: the ratio's upper bound before clipping")
    beta: float = Field(0.0, ge=0, description="weight of the KL to the base model; 0 spends nothing on it")
    scale_rewards: Literal["group", "batch", "none"] = Field("group", description="what advantages are divided by")
    reward_weights: tuple[float, ...] | None = Field(None, description="one weight a reward function; default 1")
    mask_truncated_completions: bool = Field(False, description="leave completions cut at the limit out of the loss")
    vllm_importance_sampling_correction: bool = Field(True, description="correct for trainer/sampler mismatch")
    vllm_importance_sampling_mode: CorrectionMode = Field("sequence_mask", description="how it is corrected")
    vllm_importance_sampling_clip_max: float = Field(3.0, gt=0, description="largest ratio kept or truncated to")
    vllm_importance_sampling_clip_min: float | None = Field(None, ge=0, description="smallest ratio kept")

    learning_rate: float = Field(1e-6, gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(0, ge=0, description="optimizer updates of linear warm-up")
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0 turns clipping off")
    gradient_checkpointing: bool = Field(False, description="trade a second forward for activation memory")

    canary_every: int = Field(10, ge=1, description="steps between full canaries (one extra forward of a few rows)")
    eval_every: int | None = Field(None, ge=1, description="steps between held-out evaluations; default: ends only")
    log_completions_every: int | None = Field(None, ge=1, description="steps between shown samples")
    report_to: tuple[str, ...] = Field((), description="accelerate trackers, such as 'tensorboard' or 'wandb'")

    @model_validator(mode="after")
    def _check(self) -> GRPOConfig:
        if (self.top_p, self.top_k, self.min_p) != (1.0, 0, 0.0):
            raise ValueError(
                f"top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p}: filtered sampling makes the sampled "
                "distribution another than the trained one; train with top_p=1, top_k=0, min_p=0"
            )
        if self.generation_batch_size is not None and self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size} must be a multiple of "
                f"num_generations={self.num_generations}"
            )
        return self

    def rows_per_update(self, num_processes: int) -> int:
        """Rows that make one optimizer update, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * num_processes

    def rows_per_step(self, num_processes: int) -> int:
        """Completions a rollout step (B = P*G), checked against groups and optimizer batches."""
        update = self.rows_per_update(num_processes)
        rows = self.generation_batch_size or update
        for name, unit in (("num_generations", self.num_generations), ("one optimizer batch", update)):
            if rows % unit:
                raise ConfigError(
                    f"a step of {rows} completions is no multiple of {name} ({unit}); set generation_batch_size "
                    "(or per_device_train_batch_size and gradient_accumulation_steps) so that it is"
                )
        return rows

    def updates_per_step(self, num_processes: int) -> int:
        """Optimizer updates made from one rollout batch."""
        return self.rows_per_step(num_processes) // self.rows_per_update(num_processes) * self.num_iterations


class ModelConfig(Section):
    """The base model and how the trainer holds it."""

    name: str = Field(description="hub name or local directory")
    revision: str | None = Field(None, description="hub revision")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="the trainer's base dtype")
    trust_remote_code: bool = False


class LoraSettings(Section):
    """The adapter to train; what `peft.LoraConfig` calls the same."""

    r: int = Field(16, ge=1)
    lora_alpha: float = Field(32, gt=0)
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)


class EngineConfig(Section):
    """The in-process vLLM engine."""

    max_lora_rank: int | None = Field(None, ge=1, description="default: the adapter's rank, rounded up to vLLM's set")
    max_loras: int = Field(2, ge=1, description="adapter slots: versions that one batch can mix")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = Field(None, ge=8, description="prompt plus completion, tokens; default: the model's")
    gpu_memory_utilization: float = Field(0.35, gt=0, le=1, description="vLLM's share of the GPU, trainer beside it")
    max_num_seqs: int = Field(256, ge=1)
    max_num_batched_tokens: int | None = Field(None, ge=64)
    enforce_eager: bool = Field(False, description="no CUDA graphs")
    enable_prefix_caching: bool = True


class DataConfig(Section):
    """Where prompts come from: a hub name, a JSONL or Parquet file."""

    train: str = Field(description="hub dataset name, or a .jsonl/.json/.parquet file")
    train_split: str = "train"
    name: str | None = Field(None, description="hub configuration, e.g. 'main' for openai/gsm8k")
    eval: str | None = Field(None, description="held-out prompts, as `train`")
    eval_split: str = "test"
    eval_limit: int | None = Field(None, ge=1, description="held-out prompts used at most")
    prompt_column: str = Field("prompt", description="text, or a list of chat messages")
    system_prompt: str | None = Field(None, description="turns text prompts into chats with this system message")


class RewardConfig(Section):
    """One reward function: a ready-made name, or 'package.module:function'."""

    name: str
    weight: float = 1.0
    options: dict[str, Any] = Field(default_factory=dict, description="passed to a ready-made reward's factory")


class RunConfig(Section):
    """Everything `lora-grpo train` reads from one file."""

    output_dir: str = Field(description="the run's durable directory")
    model: ModelConfig
    lora: LoraSettings = LoraSettings()
    data: DataConfig
    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    engine: EngineConfig = EngineConfig()
    grpo: GRPOConfig = GRPOConfig()
    store_root: str | None = Field(None, description="tmpfs directory of the versions; default: under /dev/shm")
