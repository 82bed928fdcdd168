"""The settings of the algorithm, by TRL's names wherever the meaning is TRL's. Nothing here imports torch."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lora_grpo.errors import ConfigError
from lora_grpo.sections import Section

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
ScaleRewards = Literal["group", "batch", "none"]
CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class GRPOConfig(Section):
    """The algorithm and its optimisation. One step is one rollout: generate, reward, update, publish.

    >>> config = GRPOConfig(num_generations=8, per_device_train_batch_size=16, gradient_accumulation_steps=8)
    >>> config.rows_per_step(num_processes=1), config.replace(learning_rate=1e-5).learning_rate
    (128, 1e-05)
    """

    seed: int = Field(42, ge=0, description="seed of the run; every request's own seed derives from it")
    total_steps: int = Field(100, ge=1, description="rollout steps to run")
    max_steps_without_signal: int | None = Field(None, ge=1)
    """end the run after so many steps in a row without different rewards; default: never"""

    num_generations: int = Field(8, ge=2, description="completions for each prompt (a group)")
    generation_batch_size: int | None = Field(None, ge=2)
    """completions in a step, over all processes; default: one optimizer batch"""
    per_device_train_batch_size: int = Field(8, ge=1, description="completions in a micro-batch, on each process")
    max_tokens_per_micro_batch: int | None = Field(
        None,
        ge=1,
        description="most tokens in a micro-batch, instead of per_device_train_batch_size completions; default on "
        "CUDA: enough for that many of the longest",
    )
    gradient_accumulation_steps: int = Field(8, ge=1, description="micro-batches in one optimizer update")
    num_iterations: int = Field(1, ge=1, description="passes over each rollout batch")

    max_staleness: int = Field(0, ge=0)
    """how many versions old a batch may be; above 0, sampling goes on during training"""
    stall_timeout_s: float = Field(1800.0, gt=0)
    """with max_staleness: end the run after so many seconds without progress"""

    ddp_timeout: float = Field(1800.0, gt=0, description="most seconds that processes wait for each other")

    max_prompt_length: int | None = Field(None, ge=1)
    """most tokens in a prompt; default: max_model_len - max_completion_length"""
    overlong_prompts: Literal["error", "drop"] = "error"
    """a longer prompt is an error before the start, or is left out and counted"""
    chat_template_kwargs: dict[str, Any] = Field({})
    """more arguments for the chat template, such as enable_thinking; a column of this name wins"""
    max_completion_length: int = Field(256, ge=1, description="most tokens in a completion")
    temperature: float = Field(1.0, gt=0, description="temperature of the sampler and of the trainer's log-probs")
    top_p: float = Field(1.0, description="must be 1: the loss cannot correct for filtered sampling")
    top_k: int = Field(0, description="must be 0: the loss cannot correct for filtered sampling")
    min_p: float = Field(0.0, description="must be 0: the loss cannot correct for filtered sampling")

    loss_type: LossType = Field("dapo", description="how token losses are formed and averaged")
    importance_sampling_level: Literal["token", "sequence"] = Field("token", description="'sequence' is GSPO's ratio")
    epsilon: float = Field(0.2, ge=0, description="lower clip of the ratio (1 - epsilon)")
    epsilon_high: float | None = Field(None, ge=0)
    """upper clip (1 + epsilon_high); default: epsilon. For cispo the limit itself, e.g. 5"""
    delta: float | None = Field(None, gt=0, description="two-sided clip: the ratio's upper bound before clipping")
    beta: float = Field(0.0, ge=0, description="weight of the KL to the adapter at the start; 0: it is not computed")
    use_bias_correction_kl: bool = Field(True, description="weight the KL by the ratio: its unbiased gradient")
    scale_rewards: ScaleRewards = "group"
    """divide advantages by the deviation of rewards in the group, in the batch, or not at all"""
    reward_weights: tuple[float, ...] | None = Field(None, description="one weight for each reward function; default 1")
    reward_retries: int = Field(1, ge=0)
    """how often a reward function is called again after a timeout or a failed connection"""
    reward_timeout_s: float | None = Field(None, gt=0)
    """most seconds for one call of a reward function; default: no limit"""
    mask_truncated_completions: bool = Field(False, description="leave completions cut at the limit out of the loss")
    vllm_importance_sampling_correction: bool = Field(True, description="correct differences of trainer and sampler")
    vllm_importance_sampling_mode: CorrectionMode = Field("sequence_mask", description="how it is corrected")
    vllm_importance_sampling_clip_max: float = Field(3.0, gt=0, description="largest ratio kept or truncated to")
    vllm_importance_sampling_clip_min: float | None = Field(None, ge=0, description="smallest ratio kept")

    learning_rate: float = Field(1e-6, gt=0, description="AdamW's highest learning rate")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """how the learning rate goes on after the warm-up"""
    warmup_steps: int = Field(0, ge=0, description="optimizer updates of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay, on every adapter tensor")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's mean gradient")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of AdamW's mean squared gradient")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to AdamW's denominator")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0 turns it off")
    gradient_checkpointing: bool | None = None
    """compute activations twice to save memory; default: if they would not fit (own Policy: False)"""

    canary_every: int = Field(10, ge=1, description="steps between full canaries (one extra forward of a few rows)")
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; default: only at start and end")
    log_completions_every: int | None = Field(None, ge=1, description="steps between logged completions")
    report_to: tuple[str, ...] = Field((), description="accelerate trackers, such as 'tensorboard' or 'wandb'")

    @field_validator("scale_rewards", mode="before")
    @classmethod
    def _scale(cls, value: Any) -> Any:
        """TRL takes booleans too."""
        return {True: "group", False: "none"}[value] if isinstance(value, bool) else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers(cls, value: Any) -> Any:
        """TRL takes one name too, and "none"."""
        if value in (None, "none", ["none"], ("none",)):
            return ()
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> "GRPOConfig":
        if (self.top_p, self.top_k, self.min_p) != (1.0, 0, 0.0):
            given = f"top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p}"
            raise ValueError(f"{given}: what is filtered is not what is trained; set top_p=1, top_k=0, min_p=0")
        if (rows := self.generation_batch_size) and rows % self.num_generations:
            group = f"num_generations={self.num_generations}"
            raise ValueError(f"generation_batch_size={rows} is not a multiple of {group}")
        if self.max_staleness and not self.vllm_importance_sampling_correction:
            older = f"max_staleness={self.max_staleness} trains on completions of earlier versions"
            raise ValueError(f"{older}: set vllm_importance_sampling_correction=True, which makes up for that")
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
                wrong = f"a step of {rows} completions is not a multiple of {name} ({unit})"
                raise ConfigError(f"{wrong}; change generation_batch_size or gradient_accumulation_steps")
        return rows

    def updates_per_step(self, num_processes: int) -> int:
        """Optimizer updates made from one rollout batch."""
        return self.rows_per_step(num_processes) // self.rows_per_update(num_processes) * self.num_iterations
