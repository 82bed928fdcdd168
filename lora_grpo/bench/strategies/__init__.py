"""The ways from trainer to engine that are compared; the only place of this package where anything is merged.

A strategy of your own is named as `package.module:Class`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lora_grpo.config import nearest_key
from lora_grpo.errors import ConfigError

if TYPE_CHECKING:
    from lora_grpo.bench.strategies.base import Strategy

NATIVE, BASE = "native", "base"

_HOMES = {
    "native": "native:Native",
    "native-disk": "native_disk:NativeDisk",
    "by-hand": "by_hand:ByHand",
    "merge-trl": "merge_trl:MergeTRL",
    "merge-touched": "merge_touched:MergeTouched",
    "merge-out-of-place": "merge_out_of_place:MergeOutOfPlace",
    "merge-fold": "merge_fold:MergeFold",
    "base": "base_only:BaseOnly",
}
STRATEGIES = tuple(name for name in _HOMES if name != BASE)
"""What is compared; `base`, the engine without any adapter, is only decoded with."""


def check_name(name: str) -> str:
    """Raises `ConfigError` with the nearest name for a strategy that there is not."""
    if name not in _HOMES and ":" not in name:
        raise ConfigError(f"unknown strategy {name!r}; {nearest_key(name, _HOMES)}")
    return name


def load_strategy(name: str) -> type[Strategy]:
    """The class of a strategy."""
    home = f"{__name__}.{_HOMES[check_name(name)]}" if name in _HOMES else name
    module, _, attribute = home.partition(":")
    strategy: type[Strategy] = getattr(importlib.import_module(module), attribute)
    return strategy
