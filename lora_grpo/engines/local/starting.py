"""Starts vLLM in this process with LoRA on, and what must be in place before it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from lora_grpo.engines import compat
from lora_grpo.engines.boundary import vllm_boundary
from lora_grpo.engines.local import lora_kernels
from lora_grpo.engines.local.beside import classes_kept, make_expert_group
from lora_grpo.engines.local.cpu_with_lora import can_compile, compiled_with_lora, experts_without_lora, marked
from lora_grpo.engines.local.held import join
from lora_grpo.engines.local.shared_weights import check_shareable, plain_cpu_weights
from lora_grpo.engines.local.sleeping import check_can_ever_sleep
from lora_grpo.engines.local.targets import serving_arguments
from lora_grpo.errors import ConfigError


def adapter_room(max_loras: int, max_cpu_loras: int | None) -> int:
    """How many versions stay loaded: two more than slots by default. Raises `ConfigError` for what cannot work."""
    room = max_loras + 2 if max_cpu_loras is None else max_cpu_loras
    if not 1 <= max_loras <= room:
        raise ConfigError(f"max_loras={max_loras} must be between 1 and max_cpu_loras={room}")
    if room < 2:
        raise ConfigError("max_cpu_loras=1: a version that fails to load would push out the served one; set at least 2")
    return room


def _lora_in_the_models_dtype(arguments: Mapping[str, Any]) -> bool:
    """Whether slots and activations are of one dtype, which our kernels need; vLLM's own convert."""
    return arguments.get("lora_dtype") in (None, "auto", arguments.get("dtype"))


def _compiled_or_eager(arguments: dict[str, Any], may_compile: bool) -> tuple[dict[str, Any], bool]:
    """vLLM's arguments, and whether it compiles the model with our own LoRA kernels in it."""
    if may_compile and not arguments.get("enforce_eager") and can_compile():
        return marked(arguments, "add_cpu_lora"), True
    # Not told so, vLLM leaves its fused operators to the compiler, and then calls none with LoRA.
    return arguments | ({"enforce_eager": True} if compat.is_cpu() else {}), False


def start_llm(
    model: str,
    *,
    target_modules: Sequence[str] | None,
    cpu_lora_kernels: bool,
    share_base_weights: bool,
    revision: str | None,
    trust_remote_code: bool,
    **arguments: Any,
) -> tuple[Any, bool]:
    """A `vllm.LLM`, and whether its LoRA kernels leave base rows alone in a batch with adapter rows.

    Raises `UnsupportedVersion`, `ConfigError` for a model without LoRA in vLLM, weights that could not be shared or a
    sleep mode that there is not, or `EngineError`.
    """
    vllm = compat.import_vllm()
    code: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    arguments = join(serving_arguments(model, arguments.pop("quantization", None), target_modules, **code) | arguments)
    check_can_ever_sleep(arguments)
    if share_base_weights:
        check_shareable(arguments)
    own = cpu_lora_kernels and lora_kernels.applies()
    kernels = own and _lora_in_the_models_dtype(arguments)
    arguments, compiles = _compiled_or_eager(arguments, kernels and not share_base_weights)
    make_expert_group()
    with (
        vllm_boundary(f"start on {model}"),
        plain_cpu_weights() if share_base_weights and compat.is_cpu() else nullcontext(),
        lora_kernels.products_by_segment() if kernels else nullcontext(),
        compiled_with_lora() if compiles else nullcontext(),
        experts_without_lora() if compat.is_cpu() else nullcontext(),
        classes_kept(),
    ):
        arguments |= {"enable_lora": True, "logprobs_mode": "processed_logprobs"}
        llm = vllm.LLM(model=model, **code, **arguments)
    return llm, kernels or compat.base_rows_are_safe()
