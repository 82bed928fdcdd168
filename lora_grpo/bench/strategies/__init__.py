"""The ways from trainer to engine that are compared; the only place of this package where anything is merged.

A strategy of your own is named as `package.module:Class`."""

from pkgutil import resolve_name
from typing import Any

from lora_grpo.errors import ConfigError
from lora_grpo.sections import nearest_key

NATIVE, SHARED, STOCK, BASE = "native", "native-shared", "native-stock", "base"
AGAIN = "native again"

_HOMES = {
    NATIVE: "native:Native",
    AGAIN: "native:Native",
    "native-disk": "native:NativeDisk",
    SHARED: "native:NativeShared",
    STOCK: "native:NativeStock",
    "by-hand": "native:ByHand",
    "merge-trl": "merging:MergeTRL",
    "merge-touched": "merging:MergeTouched",
    "merge-out-of-place": "merging:MergeOutOfPlace",
    "merge-fold": "merging:MergeFold",
    BASE: "merging:BaseOnly",
}
STRATEGIES = ("native", "native-disk", "by-hand", "merge-trl", "merge-touched", "merge-out-of-place", "merge-fold")
"""What is compared; the others differ from one of these in what they hold or compute with, not in their syncs."""


def check_name(name: str) -> None:
    """Raises `ConfigError` with the nearest name for a strategy that there is not."""
    if name not in _HOMES and ":" not in name:
        raise ConfigError(f"unknown strategy {name!r}; {nearest_key(name, _HOMES)}")


def load_strategy(name: str) -> Any:
    return resolve_name(f"{__name__}.{_HOMES[name]}" if name in _HOMES else name)
