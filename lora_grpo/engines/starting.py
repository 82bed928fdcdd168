"""Starts vLLM in this process with LoRA on, and what must be in place before it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_grpo.engines import compat, lora_kernels
from lora_grpo.engines.shared_weights import check_shareable, plain_cpu_weights
from lora_grpo.engines.targets import linear_leaves
from lora_grpo.errors import EngineError


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

    Raises `UnsupportedVersion`, `ConfigError` for weights that could not be shared, or `EngineError`.
    """
    vllm = compat.import_vllm()
    if share_base_weights:
        check_shareable(arguments)
    wrapped = (
        list(target_modules)
        if target_modules
        else linear_leaves(model, revision=revision, trust_remote_code=trust_remote_code)
    )
    mixes_base = (cpu_lora_kernels and lora_kernels.install()) or compat.base_rows_are_safe()
    try:
        with plain_cpu_weights(share_base_weights and compat.is_cpu()):
            llm = vllm.LLM(
                model=model,
                revision=revision,
                trust_remote_code=trust_remote_code,
                enable_lora=True,
                lora_target_modules=wrapped,
                logprobs_mode="processed_logprobs",
                **arguments,
            )
    except Exception as error:
        raise EngineError(f"vLLM could not start on {model}: {type(error).__name__}: {error}") from error
    return llm, mixes_base
