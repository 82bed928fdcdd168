"""What is asked of the suite: which parts, and how, from options or a TOML file with `[all]` and a table a part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from lora_grpo.bench.shapes import shape_config
from lora_grpo.bench.strategies import NATIVE, STRATEGIES, check_name
from lora_grpo.config_file import read_settings
from lora_grpo.errors import ConfigError
from lora_grpo.sections import Section, nearest_key

_DEFAULTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "sync": (20, STRATEGIES),
    "memory": (1, (*STRATEGIES, "native-shared")),
    "decode": (2, ("base", "native", "native-stock", "native-shared", "merge-trl", "merge-fold")),
    "fidelity": (1, ("native", "by-hand", "merge-trl", "merge-out-of-place", "merge-fold")),
    "step": (2, ("native", "merge-trl", "merge-fold")),
    "rollback": (6, ("native", "by-hand", "merge-trl", "merge-fold")),
    "endurance": (1, ("native",)),
}
"""Of each part, in the order in which `all` makes them: `repeat` and `strategies`."""
PARTS = tuple(_DEFAULTS)
_PAIRED = ("decode", "step", "rollback")
"""Those that measure nothing of native alone."""


class Settings(Section):
    """How one part is measured."""

    shape: str | None = Field("qwen2.5-0.5b", description="model shape with random weights")
    model: str | None = Field(None, description="hub name or directory, in place of a shape")
    device: str = Field("cpu", description="where trainer and engine are: cpu or cuda:0")
    strategies: tuple[str, ...] = Field((), description="what is compared; native is always measured beside it")
    rank: int = Field(16, ge=1, description="LoRA rank")
    targets: str = Field("all-linear", description="LoRA targets: all-linear, attention or names joined with +")
    repeat: int = Field(ge=1, description="measurements of each strategy")
    seed: int = Field(0, ge=0, description="of weights, adapters and prompts")
    graphs: bool | Literal["alone"] = Field(False, description="CUDA graphs, compiled (slow); alone: not compiled")
    in_turn: bool = Field(False, description="one strategy alive at a time, native first and last; always so on a GPU")
    max_model_len: int = Field(512, ge=16, description="tokens of prompt and completion at most")
    max_num_seqs: int = Field(64, ge=1, description="rows that an engine takes at once")
    truth: bool = Field(True, description="sync, decode: check that what was timed serves the right policy")
    canary_rows: tuple[int, ...] = Field((8, 32), description="sync: completions of a canary whose cost is measured")
    sweep_ranks: tuple[int, ...] = Field((8, 64), description="sync: further ranks")
    sweep_targets: tuple[str, ...] = Field(("attention",), description="sync: further targets")
    sweep_strategies: tuple[str, ...] = Field(("merge-trl",), description="sync: what is swept beside native")
    rows: tuple[int, ...] = Field((1, 8, 32), min_length=1, description="decode: batch sizes")
    prompt_tokens: int = Field(32, ge=1, description="decode, step, canary: tokens a prompt")
    lengths: tuple[int, ...] = Field((16, 48), min_length=1, description="decode: completion tokens")
    least_s: float = Field(1.5, ge=0, description="decode: seconds that each size and length is measured for at least")
    step_rows: int = Field(8, ge=2, description="step: completions a step")
    step_tokens: int = Field(32, ge=1, description="step: tokens a completion")
    group: int = Field(4, ge=2, description="step: completions a prompt")
    learning_rates: tuple[float, ...] = Field((1e-6, 1e-5, 1e-4), description="fidelity: of the update served")
    updates: tuple[int, ...] = Field((1, 100), description="fidelity: optimizer steps that the update stands for")
    cycles: tuple[int, ...] = Field((1, 10, 100, 1000), description="fidelity: syncs after which drift is looked at")
    drift_strategies: tuple[str, ...] = Field(
        ("native", "merge-trl", "merge-out-of-place", "merge-fold"), description="fidelity: whose drift"
    )

    endurance_syncs: int = Field(1000, ge=20, description="endurance: syncs of one engine")

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.step_rows % self.group:
            raise ValueError(f"step_rows={self.step_rows} must be a multiple of group={self.group}")
        longest = self.prompt_tokens + max(*self.lengths, self.step_tokens)
        if longest > self.max_model_len:
            raise ValueError(f"prompt and completion reach {longest} tokens, above max_model_len={self.max_model_len}")
        return self

    @property
    def takes_turns(self) -> bool:
        """Whether one strategy is alive at a time, which makes ratios those of unpaired medians."""
        return self.in_turn or self.device != "cpu"

    @property
    def each_way(self) -> int:
        """Measurements of each strategy there, and as many back."""
        return -(-self.repeat // 2)

    @property
    def others(self) -> list[str]:
        """The strategies that native is measured beside."""
        return [name for name in self.strategies if name != NATIVE]

    @property
    def engine(self) -> str:
        """How engines run, in a word for tables: nothing is captured or compiled, graphs alone, or vLLM's default."""
        if self.graphs == "alone":
            return "eager" if self.device == "cpu" else "graphs alone"
        return "compiled" if self.graphs else "eager"

    @property
    def label(self) -> str:
        return self.model or str(self.shape)


def plan_parts(part: str, scenario: Path | None, options: Mapping[str, Any]) -> dict[str, Settings]:
    """Settings by part, in order; `options` win over the file. Raises `ConfigError` for what cannot be."""
    if part != "all" and part not in PARTS:
        raise ConfigError(f"unknown part {part!r}; {nearest_key(part, (*PARTS, 'all'))}")
    tables = {} if scenario is None else read_settings(scenario)
    for name in tables:
        if name not in ("all", *PARTS):
            raise ConfigError(f"{scenario}: unknown table [{name}]; {nearest_key(name, (*PARTS, 'all'))}")
    named = [name for name in PARTS if name in tables] or list(PARTS)
    parts = {}
    for name in named if part == "all" else [part]:
        usual = dict(zip(("repeat", "strategies"), _DEFAULTS[name], strict=True))
        parts[name] = Settings(**{**usual, **tables.get("all", {}), **tables.get(name, {}), **options})
        for strategy in parts[name].strategies:
            check_name(strategy)
        if parts[name].model is None:
            shape_config(str(parts[name].shape))
    if part in _PAIRED and not parts[part].others:
        raise ConfigError(f"{part} measures strategies beside {NATIVE}: name another, such as --strategies merge-trl")
    return parts
