"""Every setting of a run, those of the algorithm apart. Nothing here imports torch."""

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from lora_grpo.errors import ConfigError
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.sections import Section


class ModelConfig(Section):
    """The base model and how the trainer holds it.

    >>> ModelConfig(name="Qwen/Qwen2.5-0.5B-Instruct", dtype="bfloat16").revision is None
    True
    """

    name: str = Field(description="hub name or local directory")
    revision: str | None = Field(None, description="hub revision")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="the trainer's base dtype")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    quantization: Literal["nf4"] | None = None
    """'nf4' (QLoRA): quantize an unquantized base, in trainer and engine"""

    @property
    def loading(self) -> dict[str, Any]:
        """What transformers and vLLM are told beside the name."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


class LoraSettings(Section):
    """The adapter to train; what `peft.LoraConfig` calls the same."""

    r: int = Field(16, ge=1, description="rank")
    lora_alpha: float = Field(32, gt=0, description="the adapter's output is scaled by lora_alpha / r")
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """names of the linear layers that get an adapter"""
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input, in training only")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead (rsLoRA)")
    rank_pattern: dict[str, int] = Field({}, description="ranks of single modules, by name or regex")
    alpha_pattern: dict[str, float] = Field({}, description="alphas of single modules, by name or regex")


def check_quantization(asked: str | None) -> None:
    """Raises `ConfigError` for what no trainer is proven to compute alike, whatever vLLM would make of it."""
    if asked not in (None, "nf4", "bitsandbytes"):
        raise ConfigError(f"quantization={asked!r} is not proven to match: set 'nf4', or leave it to the checkpoint")


def server_addresses(urls: Sequence[str]) -> list[str]:
    """Servers' addresses without the `/v1` that one may end in. Raises `ConfigError` for text that is none, and for a
    server that is there twice."""
    for url in urls:
        if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", url):
            raise ConfigError(f"urls: {url!r} is no server's address; write one such as http://127.0.0.1:8000")
    addresses = [url.rstrip("/").removesuffix("/v1") for url in urls]
    if len(set(addresses)) < len(addresses):
        raise ConfigError(f"urls={list(urls)} must name each server once")
    return addresses


class EngineConfig(Section):
    """The vLLM engine: in this process, or with `urls` the servers there, which have the other settings themselves.

    >>> EngineConfig(max_model_len=1024).max_num_seqs
    256
    """

    urls: tuple[str, ...] = ()
    """vLLM servers (lora-grpo serve) to generate with, instead of an engine in this process"""
    on_failure: Literal["raise", "drop"] = "raise"
    """when one server fails to load a version: end the run, or go on without that server"""
    store_address: str | None = None
    """host:port where the trainer serves versions, for `urls` that cannot read its disk"""
    concurrency: int = Field(256, ge=1, description="most requests at the same time on each of `urls`; others wait")
    timeout_s: float = Field(600.0, gt=0)
    """most seconds for one request to `urls`, with its wait in the server's queue"""
    patience_s: float = Field(300.0, gt=0, description="seconds to wait for one of `urls` that went away")
    max_lora_rank: int | None = Field(None, ge=1, description="default: the adapter's rank, rounded up for vLLM")
    max_loras: int = Field(2, ge=1, description="adapter slots: versions that one batch can mix")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the engine's weights and adapters"""
    max_model_len: int | None = Field(None, ge=8, description="most tokens, prompt + completion; default: the model's")
    gpu_memory_utilization: float = Field(0.35, gt=0, le=1, description="vLLM's share of the GPU, beside the trainer")
    max_num_seqs: int = Field(256, ge=1, description="most completions sampled at the same time")
    max_num_batched_tokens: int | None = Field(None, ge=64)
    """most tokens in one engine step; default: vLLM's"""
    enforce_eager: bool = Field(False, description="no compiled model, no CUDA graphs")
    enable_prefix_caching: bool = Field(True, description="prompts with the same beginning share its KV cache")

    @model_validator(mode="after")
    def _check(self) -> "EngineConfig":
        server_addresses(self.urls)
        if self.store_address is None:
            return self
        host, _, port = self.store_address.rpartition(":")
        if not (host and port.isdigit() and int(port) < 65536):
            raise ValueError(f"store_address={self.store_address!r} must be host:port, such as '10.0.0.5:8731'")
        if not self.urls:
            fix = "set urls, or leave it out"
            raise ValueError(f"store_address={self.store_address!r} is for servers, and there are none: {fix}")
        return self


class DataConfig(Section):
    """Where prompts come from: a hub name, a JSONL, JSON, CSV or Parquet file, or a folder of `save_to_disk`."""

    train: str = Field(description="hub dataset name, or a .jsonl/.json/.csv/.parquet file")
    train_split: str = Field("train", description="split of `train`, if it is on the hub")
    name: str | None = Field(None, description="hub configuration, e.g. 'main' for openai/gsm8k")
    eval: str | None = Field(None, description="held-out prompts, in the same form as `train`")
    eval_split: str = Field("test", description="split of `eval`, if it is on the hub")
    eval_limit: int | None = Field(None, ge=1, description="most held-out prompts used")
    prompt_column: str = Field("prompt", description="column of prompts: text or chat messages")
    system_prompt: str | None = None
    """turns text prompts into chats with this system message (none if empty)"""


class RewardConfig(Section):
    """One reward function: a ready-made name, or 'package.module:function'."""

    name: str = Field(description="exact, numeric, regex, format, or your own 'package.module:function'")
    weight: float = Field(1.0, description="weight in the sum of rewards")
    options: dict[str, Any] = Field({})
    """a ready-made reward's options, or keyword arguments for your function"""


class KeepConfig(Section):
    """Which versions are kept, and where.

    >>> KeepConfig(on_tmpfs=0)
    Traceback (most recent call last):
    lora_grpo.errors.ConfigError: on_tmpfs: must be an integer, at least 1 (got 0)
    """

    on_tmpfs: int = Field(8, ge=1)
    """how many of the latest versions stay on tmpfs; HEAD, pinned and loaded ones stay too"""
    archived: int | None = Field(None, ge=1)
    """how many of the latest and of the best adapters stay on disk; default: all"""
    trainer_states: int = Field(5, ge=1)
    """how many of the latest trainer states stay; those of the best versions stay too"""
    trainer_state_every: int = Field(1, ge=1, description="steps between kept trainer states")
    budget_bytes: int | None = Field(None, ge=1, description="most bytes that versions may take on tmpfs")


class GuardConfig(Section):
    """Automatic rollback; off while none of `non_finite`, `reward_drop`, `logprob_gap` and `kl` is set."""

    non_finite: bool = Field(False, description="go back when a loss, gradient or weight is not finite")
    reward_drop: float | None = Field(None, gt=0, description="go back when the reward falls this far below its mean")
    reward_window: int = Field(10, ge=1, description="number of steps in that mean")
    reward_patience: int = Field(2, ge=1, description="steps in a row that must be that far below")
    logprob_gap: float | None = Field(None, gt=0, description="go back above this trainer/sampler gap, nats per token")
    kl: float | None = Field(None, gt=0, description="go back above this KL, nats per token (beta > 0)")
    to: int | str = Field("best:reward", description="where to: a version's number, 'parent', 'best' or 'best:METRIC'")
    max_rollbacks: int = Field(3, ge=1, description="after this many rollbacks, the next reason ends the run")
    learning_rate_factor: float = Field(1.0, gt=0, le=1, description="a rollback multiplies the learning rate by this")


class RunConfig(Section):
    """Everything `lora-grpo train` reads from one file.

    >>> data, rewards = {"train": "rows.jsonl"}, [{"name": "exact"}]
    >>> run = RunConfig(output_dir="runs/a", model={"name": base}, data=data, rewards=rewards)
    >>> run.lora.r, run.grpo.num_generations
    (16, 8)
    """

    output_dir: str = Field(description="the run's directory on disk")
    model: ModelConfig = Field(description="the base model")
    lora: LoraSettings = Field(LoraSettings(), description="the adapter")
    data: DataConfig = Field(description="the prompts")
    rewards: tuple[RewardConfig, ...] = Field(min_length=1, description="the reward functions, one [[rewards]] each")
    engine: EngineConfig = Field(EngineConfig(), description="the engine")
    keep: KeepConfig = Field(KeepConfig(), description="which versions are kept")
    grpo: GRPOConfig = Field(GRPOConfig(), description="the algorithm")
    guard: GuardConfig = Field(GuardConfig(), description="automatic rollback")
    store_root: str | None = Field(None, description="tmpfs directory of the versions; default: under /dev/shm")

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.grpo.reward_weights is not None:
            raise ValueError(f"grpo.reward_weights={list(self.grpo.reward_weights)}: set rewards.N.weight instead")
        return self
