"""Every setting of a run.

Fields carry TRL's names wherever the meaning is TRL's. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lora_grpo.errors import ConfigError
from lora_grpo.sections import Section

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class GRPOConfig(Section):
    """The algorithm and its optimisation. One step is one rollout: generate, reward, update, publish."""

    seed: int = Field(42, ge=0, description="seed of the run; every request's own seed derives from it")
    total_steps: int = Field(100, ge=1, description="rollout steps to run")
    max_steps_without_signal: int | None = Field(
        None, ge=1, description="steps in a row with equal rewards in every group that end a run; default: none do"
    )

    num_generations: int = Field(8, ge=2, description="completions for each prompt (a group)")
    generation_batch_size: int | None = Field(
        None, ge=2, description="completions in a step, over all processes; default: one optimizer batch"
    )
    per_device_train_batch_size: int = Field(8, ge=1, description="completions in a micro-batch, on each process")
    max_tokens_per_micro_batch: int | None = Field(
        None,
        ge=1,
        description="most tokens in a micro-batch, instead of per_device_train_batch_size completions; default on "
        "CUDA: what so many of the longest ones take, as found at the run's first start",
    )
    gradient_accumulation_steps: int = Field(8, ge=1, description="micro-batches in one optimizer update")
    num_iterations: int = Field(1, ge=1, description="passes over each rollout batch")

    max_staleness: int = Field(
        0, ge=0, description="versions that a batch may lag; above 0, sampling goes on while the optimizer steps"
    )
    stall_timeout_s: float = Field(
        1800.0, gt=0, description="with max_staleness: seconds without a sign of life that end the run"
    )

    ddp_timeout: float = Field(1800.0, gt=0, description="most seconds that several processes wait for each other")

    max_prompt_length: int | None = Field(
        None, ge=1, description="most tokens in a prompt; default: what max_completion_length leaves of max_model_len"
    )
    overlong_prompts: Literal["error", "drop"] = Field(
        "error", description="a longer prompt is an error before the start, or is left out and counted"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="more arguments for the chat template, such as enable_thinking; a column of this name wins",
    )
    max_completion_length: int = Field(256, ge=1, description="most tokens in a completion")
    temperature: float = Field(1.0, gt=0, description="temperature of the sampler and of the trainer's log-probs")
    top_p: float = Field(1.0, description="1 only: filtered sampling is not corrected for in the loss")
    top_k: int = Field(0, description="0 only: filtered sampling is not corrected for in the loss")
    min_p: float = Field(0.0, description="0 only: filtered sampling is not corrected for in the loss")

    loss_type: LossType = Field("dapo", description="how token losses are formed and averaged")
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token", description="'sequence' is GSPO's length-normalised ratio"
    )
    epsilon: float = Field(0.2, ge=0, description="lower clip of the ratio (1 - epsilon)")
    epsilon_high: float | None = Field(
        None, ge=0, description="upper clip (1 + epsilon_high); default: epsilon. For cispo the bound itself, e.g. 5"
    )
    delta: float | None = Field(None, gt=0, description="two-sided clip: the ratio's upper bound before clipping")
    beta: float = Field(
        0.0, ge=0, description="weight of the KL to the adapter as it was at the start; 0 spends nothing on it"
    )
    use_bias_correction_kl: bool = Field(True, description="weight the KL by the ratio: its unbiased gradient")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="divide advantages by the deviation of rewards in the group, in the batch, or not at all"
    )
    reward_weights: tuple[float, ...] | None = Field(None, description="one weight for each reward function; default 1")
    reward_retries: int = Field(
        1, ge=0, description="how often a reward function is called again after a timeout or a failed connection"
    )
    reward_timeout_s: float | None = Field(
        None, gt=0, description="seconds that one call of a reward function may take; default: no limit"
    )
    mask_truncated_completions: bool = Field(False, description="leave completions cut at the limit out of the loss")
    vllm_importance_sampling_correction: bool = Field(True, description="correct for trainer/sampler mismatch")
    vllm_importance_sampling_mode: CorrectionMode = Field("sequence_mask", description="how it is corrected")
    vllm_importance_sampling_clip_max: float = Field(3.0, gt=0, description="largest ratio kept or truncated to")
    vllm_importance_sampling_clip_min: float | None = Field(None, ge=0, description="smallest ratio kept")

    learning_rate: float = Field(1e-6, gt=0, description="AdamW's learning rate, at its highest")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="how the learning rate goes on after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="optimizer updates of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay, on every adapter tensor")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's mean gradient")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of AdamW's mean squared gradient")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to AdamW's denominator")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0 turns it off")
    gradient_checkpointing: bool | None = Field(
        None,
        description="compute activations twice to hold fewer; default: where they would not fit otherwise (False in a "
        "Policy of your own)",
    )

    canary_every: int = Field(10, ge=1, description="steps between full canaries (one extra forward of a few rows)")
    eval_every: int | None = Field(None, ge=1, description="steps between held-out evaluations; default: ends only")
    log_completions_every: int | None = Field(None, ge=1, description="steps between shown samples")
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
        names = [value] if isinstance(value, str) else value or ()
        return () if list(names) == ["none"] else tuple(names)

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
        if self.max_staleness and not self.vllm_importance_sampling_correction:
            raise ValueError(
                f"max_staleness={self.max_staleness} trains on completions of earlier versions, which only the "
                "correction accounts for; set vllm_importance_sampling_correction=True"
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
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="the trainer's base dtype")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    quantization: Literal["nf4"] | None = Field(
        None,
        description="'nf4' (QLoRA): of an unquantized base, on both sides; what a checkpoint says is followed",
    )


class LoraSettings(Section):
    """The adapter to train; what `peft.LoraConfig` calls the same."""

    r: int = Field(16, ge=1, description="rank")
    lora_alpha: float = Field(32, gt=0, description="the update is scaled by lora_alpha / r")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear", description="names of the linear layers that get an adapter"
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input, in training only")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead (rsLoRA)")
    rank_pattern: dict[str, int] = Field(default_factory=dict, description="ranks of single modules, by name or regex")
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="alphas of single modules, by name or regex"
    )

    @property
    def largest_rank(self) -> int:
        return max([self.r, *self.rank_pattern.values()])


class EngineConfig(Section):
    """The vLLM engine: in this process, or with `urls` the servers there, which have the other settings themselves."""

    urls: tuple[str, ...] = Field(
        (), description="vLLM servers (lora-grpo serve) to generate with, instead of an engine in this process"
    )
    on_failure: Literal["raise", "drop"] = Field(
        "raise", description="when one server fails to load a version: end the run, or go on without that server"
    )
    store_address: str | None = Field(
        None, description="host:port to serve versions at, for `urls` that share no disk with the trainer"
    )
    concurrency: int = Field(256, ge=1, description="most requests at the same time on each of `urls`; others wait")
    timeout_s: float = Field(
        600.0, gt=0, description="seconds that one request to `urls` may take, waiting in the server's queue included"
    )
    patience_s: float = Field(300.0, gt=0, description="seconds to wait for one of `urls` that went away")
    max_lora_rank: int | None = Field(None, ge=1, description="default: the adapter's rank, rounded up to vLLM's set")
    max_loras: int = Field(2, ge=1, description="adapter slots: versions that one batch can mix")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the engine's weights and adapters"
    )
    max_model_len: int | None = Field(None, ge=8, description="prompt plus completion, tokens; default: the model's")
    gpu_memory_utilization: float = Field(0.35, gt=0, le=1, description="vLLM's share of the GPU, trainer beside it")
    max_num_seqs: int = Field(256, ge=1, description="most completions sampled at the same time")
    max_num_batched_tokens: int | None = Field(
        None, ge=64, description="most tokens in one engine step; default: vLLM's"
    )
    enforce_eager: bool = Field(False, description="no compiled model, no CUDA graphs")
    enable_prefix_caching: bool = Field(True, description="prompts that begin alike share their KV cache")

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        if self.store_address is None:
            return self
        host, _, port = self.store_address.rpartition(":")
        if not (host and port.isdigit() and int(port) < 65536):
            raise ValueError(f"store_address={self.store_address!r} must be host:port, such as '10.0.0.5:8731'")
        if not self.urls:
            raise ValueError(
                f"store_address={self.store_address!r} serves versions to the servers in urls, and there are none; "
                "name them, or leave store_address out"
            )
        return self


class DataConfig(Section):
    """Where prompts come from: a hub name, a JSONL or Parquet file."""

    train: str = Field(description="hub dataset name, or a .jsonl/.json/.parquet file")
    train_split: str = Field("train", description="split of `train`, if it is on the hub")
    name: str | None = Field(None, description="hub configuration, e.g. 'main' for openai/gsm8k")
    eval: str | None = Field(None, description="held-out prompts, as `train`")
    eval_split: str = Field("test", description="split of `eval`, if it is on the hub")
    eval_limit: int | None = Field(None, ge=1, description="most held-out prompts used")
    prompt_column: str = Field("prompt", description="text, or a list of chat messages")
    system_prompt: str | None = Field(
        None, description="makes chats of text prompts, with this system message (none if empty)"
    )


class RewardConfig(Section):
    """One reward function: a ready-made name, or 'package.module:function'."""

    name: str = Field(description="exact, numeric, regex, format, or your own 'package.module:function'")
    weight: float = Field(1.0, description="weight in the sum of rewards")
    options: dict[str, Any] = Field(
        default_factory=dict, description="a ready-made reward's options, or keyword arguments for your function"
    )


class KeepConfig(Section):
    """Which versions are kept, and where."""

    on_tmpfs: int = Field(
        8, ge=1, description="how many of the latest versions stay on tmpfs; HEAD, pinned and loaded ones stay too"
    )
    archived: int | None = Field(
        None, ge=1, description="how many of the latest and of the best adapters stay on disk; default: all"
    )
    trainer_states: int = Field(
        5, ge=1, description="how many of the latest trainer states stay; those of the best versions stay too"
    )
    trainer_state_every: int = Field(1, ge=1, description="steps between kept trainer states")
    budget_bytes: int | None = Field(None, ge=1, description="most bytes that versions may take on tmpfs")


class GuardConfig(Section):
    """Automatic rollback; off while none of `non_finite`, `reward_drop`, `logprob_gap` and `kl` is set."""

    non_finite: bool = Field(False, description="go back when a loss, gradient or weight is not finite")
    reward_drop: float | None = Field(None, gt=0, description="go back when the reward falls this far below its mean")
    reward_window: int = Field(10, ge=1, description="steps of that mean")
    reward_patience: int = Field(2, ge=1, description="steps in a row that must be that far below")
    logprob_gap: float | None = Field(None, gt=0, description="go back above this trainer/sampler gap, nats a token")
    kl: float | None = Field(None, gt=0, description="go back above this KL to the reference, nats a token (beta > 0)")
    to: int | str = Field(
        "best:reward", description="version to go back to: a number, 'parent', 'best' or 'best:METRIC'"
    )
    max_rollbacks: int = Field(3, ge=1, description="rollbacks after which the next reason ends the run")
    learning_rate_factor: float = Field(
        1.0, gt=0, le=1, description="the learning rate is multiplied by this at each rollback"
    )


class RunConfig(Section):
    """Everything `lora-grpo train` reads from one file."""

    output_dir: str = Field(description="the run's durable directory")
    model: ModelConfig = Field(description="the base model")
    lora: LoraSettings = Field(LoraSettings(), description="the adapter")
    data: DataConfig = Field(description="the prompts")
    rewards: tuple[RewardConfig, ...] = Field(min_length=1, description="the reward functions, one [[rewards]] each")
    engine: EngineConfig = Field(EngineConfig(), description="the engine")
    keep: KeepConfig = Field(KeepConfig(), description="which versions are kept")
    grpo: GRPOConfig = Field(GRPOConfig(), description="the algorithm")
    guard: GuardConfig = Field(GuardConfig(), description="automatic rollback")
    store_root: str | None = Field(None, description="tmpfs directory of the versions; default: under /dev/shm")
