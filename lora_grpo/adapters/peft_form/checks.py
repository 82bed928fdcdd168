"""Refuses, before anything is trained, what vLLM would not serve as the trainer computes it."""

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_grpo.adapters.peft_form.modules import LoraModule, clean_name, language_path, lora_modules, peft_model_of
from lora_grpo.errors import UnsupportedAdapter

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PLAIN_INITS = ("gaussian", "eva", "orthogonal")
_NO_HEADS = "vLLM drops or rejects LoRA on heads and embeddings; leave it out of target_modules"
_FOLDED = "kv_b_proj"
Scheme: TypeAlias = Literal["nf4", "fp8", "w4a16"]
"""bitsandbytes' nf4, fp8 in blocks of 128 x 128, and compressed-tensors' packed int4 with plain activations."""

NF4: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
}
"""QLoRA's settings, which are those that vLLM's loader quantizes with."""
_FP8_DEFAULTS = {"activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "float"}
_FP8 = {"weight_block_size": [128, 128], **_FP8_DEFAULTS}
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True}
_FIX = "take the unquantized checkpoint (with [model] quantization = 'nf4' where memory is short)"


def active_adapter(model: nn.Module) -> str:
    active = list(peft_model_of(model).active_adapters)
    if len(active) != 1:
        raise UnsupportedAdapter(f"active adapters {active}: only one is published; choose it: model.set_adapter(name)")
    return str(active[0])


def check_servable(model: nn.Module, adapter: str) -> list[LoraModule]:
    """The adapter's modules; `UnsupportedAdapter` says what stands against serving it faithfully, and the fix."""
    peft_model = peft_model_of(model)
    config = peft_model.peft_config[adapter]
    _check_config(config, adapter)  # first: under prompt learning, base_model is the model itself
    base, modules = peft_model.base_model.model, lora_modules(model, adapter)
    check_trainable(base)
    for name, layer in base.named_modules():
        # PEFT keeps the A and B of an embedding apart from those of other layers.
        if isinstance(layer, LoraLayer) and adapter in layer.lora_embedding_A:
            raise UnsupportedAdapter(f"{clean_name(name)}: {_NO_HEADS}")
    _check_no_experts(config, base, modules)
    _check_language_alone(base, modules)
    _check_order(base.config, modules)
    for module in modules:
        if objection := _objection(module):
            raise UnsupportedAdapter(f"{module.path}{objection}")
    own = {id(parameter) for module in modules for parameter in (module.a_RI, module.b_OR)}
    if others := [name for name, p in peft_model.named_parameters() if p.requires_grad and id(p) not in own]:
        # It would drift away from the engine's base unseen.
        what = f"{others[0]} (and {len(others) - 1} more) would be trained but never published"
        raise UnsupportedAdapter(f"{what}; freeze it with requires_grad_(False), or make it part of the adapter")
    return modules


def check_same_dtype(model: nn.Module, engine_dtype: str) -> None:
    """Refuses one base in two dtypes, neither of which holds the other's values; float32 holds both."""
    embedding = peft_model_of(model).base_model.model.get_input_embeddings().weight
    dtype = str(embedding.dtype).removeprefix("torch.")
    if {dtype, engine_dtype} == {"float16", "bfloat16"}:
        fix = f"load the trainer in {engine_dtype} or float32, or start the engine with dtype={dtype!r}"
        raise UnsupportedAdapter(f"the trainer's base is {dtype} and the engine's {engine_dtype}; {fix}")


def _check_config(config: Any, adapter: str) -> None:
    if not isinstance(config, LoraConfig):
        kind = type(config).__name__
        raise UnsupportedAdapter(f"adapter {adapter!r} is a {kind}; vLLM swaps only LoRA: use peft.LoraConfig")
    refused = {
        "use_dora": "vLLM has no DoRA; set use_dora=False",
        "lora_bias": "vLLM serves no LoRA bias; set lora_bias=False",
        "bias": "vLLM serves no trained bias; set bias='none'",
        "modules_to_save": "whole modules cannot be hot-swapped; leave it None",
        "layer_replication": "vLLM does not replicate layers; leave it None",
        "trainable_token_indices": "vLLM serves no token deltas; leave it None",
        "alora_invocation_tokens": "vLLM has no activated LoRA; leave it None",
    }
    for field, reason in refused.items():
        if (found := getattr(config, field, None)) and found != "none":
            raise UnsupportedAdapter(f"LoraConfig.{field}={found!r}: {reason}")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        fix = f"changes the trainer's base weights, but not the engine's; use True or one of {PLAIN_INITS}"
        raise UnsupportedAdapter(f"LoraConfig.init_lora_weights={init!r} {fix}")


def _check_no_experts(config: LoraConfig, base: nn.Module, modules: list[LoraModule]) -> None:
    """A mixture's experts are parameters, which PEFT's 'all-linear' names too, or modules."""
    named = next((module.path for module in modules if "experts" in module.path.split(".")), None)
    if config.target_parameters:
        named = f"LoraConfig.target_parameters={sorted(config.target_parameters)}"
    if named is not None:
        paths = [name for name, layer in base.named_modules() if isinstance(layer, nn.Linear) and "attn." in name]
        leaves = {path.removesuffix(".base_layer").rsplit(".", 1)[-1] for path in paths if ".lora_" not in path}
        fix = f"name layers beside them, such as target_modules={sorted(leaves - {_FOLDED}) or ATTENTION}"
        raise UnsupportedAdapter(f"{named}: LoRA on a mixture's experts cannot be proven yet; {fix}")


def _check_language_alone(base: Any, modules: list[LoraModule]) -> None:
    """Of a multimodal model, its language model is what is sampled from; PEFT's names mean layers of its towers too."""
    language = language_path(base)
    if beside := [module.path for module in modules if not module.path.startswith(language)]:
        leaves = {module.path.rpartition(".")[2] for module in modules if module.path not in beside}
        pattern = rf"{re.escape(language)}.*\.({'|'.join(sorted(leaves) or ATTENTION)})"
        what = f"{beside[0]} (and {len(beside) - 1} more) is outside the language model, which alone is trained"
        raise UnsupportedAdapter(f"{what}; name only layers inside it: target_modules=r'{pattern}'")


def _check_order(config: Any, modules: list[LoraModule]) -> None:
    reordered = [module.path for module in modules if module.path.endswith((".q_proj", ".k_proj"))]
    if reordered and config.get_text_config().model_type == "llama4_text":
        why = "vLLM reorders the rows of Llama 4's q_proj and k_proj in the base, but not in an adapter"
        raise UnsupportedAdapter(f"{reordered[0]}: {why}; leave both out of target_modules")


def _objection(module: LoraModule) -> str | None:
    """What stands against serving it, and the fix; goes on from its name."""
    leaf = module.path.rsplit(".", 1)[-1]
    layer: Any = module.layer
    base_layer = layer.get_base_layer()
    if leaf in ("lm_head", "embed_tokens", "embed_in", "embed_out", "wte", "output_layer", "score"):
        return f": {_NO_HEADS}"
    if leaf == _FOLDED:
        return ": vLLM folds it into others on loading, then decodes without its LoRA; leave it out of target_modules"
    if module.adapter in layer.lora_variant:
        variant = type(layer.lora_variant[module.adapter]).__name__
        return f" computes {variant}, vLLM only plain LoRA; leave the option that asks for it out of its LoraConfig"
    if not isinstance(base_layer, nn.Linear):
        kind = type(base_layer).__name__
        return f" is a {kind}; only torch.nn.Linear is served faithfully: leave it out of target_modules"
    if module.idle is not None:
        return f" {module.idle}"
    rank = layer.r[module.adapter]
    found = (tuple(module.a_RI.shape), tuple(module.b_OR.shape))
    expected = ((rank, base_layer.in_features), (base_layer.out_features, rank))
    if found != expected:
        return f": A and B have shapes {found} where rank {rank} of its config needs {expected}; make the adapter anew"
    return None


def check_rank(modules: list[LoraModule], max_lora_rank: int) -> None:
    for module in modules:
        if (rank := module.a_RI.shape[0]) > max_lora_rank:
            fix = f"build it with max_lora_rank={rank}, or start its server with --max-lora-rank {rank}"
            raise UnsupportedAdapter(f"{module.path} has rank {rank}, the engine takes at most {max_lora_rank}; {fix}")


def scheme_of(config: Any) -> Scheme | None:
    """None for plain weights; raises `UnsupportedAdapter` for what no pair of trainer and engine is proven on."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    settings: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    known: dict[str, tuple[Scheme | None, str | None]] = {
        "bitsandbytes": ("nf4", _other_than(NF4, settings)),
        "fp8": ("fp8", _other_than(_FP8, {**_FP8_DEFAULTS, **settings})),
        "compressed-tensors": ("w4a16", _against_compressed(settings)),
    }
    scheme, reason = known.get(method, (None, "trainer and engine are proven to match only for nf4, fp8 and W4A16"))
    if reason is not None:
        raise UnsupportedAdapter(f"the base is quantized by {method}: {reason}; {_FIX}")
    return scheme


def check_trainable(base: Any) -> None:
    """Raises `UnsupportedAdapter` unless a trainer's base is plain or nf4, as gradients need it, and not packed."""
    scheme = scheme_of(base.config)
    if scheme is None and getattr(base, "is_quantized", False):
        raise UnsupportedAdapter(f"the trainer's base is quantized, but its config does not say how; {_FIX}")
    if scheme not in (None, "nf4"):
        loader = "FineGrainedFP8Config" if scheme == "fp8" else "CompressedTensorsConfig"
        fix = f"load it with quantization_config=transformers.{loader}(dequantize=True)"
        raise UnsupportedAdapter(f"the trainer's base is in {scheme}, whose gradients are not proven: {fix}")
    for name, layer in base.named_modules():
        if getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            fix = "load the base again, and do not use it in eval mode before the trainer has it"
            raise UnsupportedAdapter(f"{name}: bitsandbytes has packed it for inference, which loses gradients; {fix}")


def _other_than(proven: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    for name, value in proven.items():
        own = found.get(name)
        if (list(own) if isinstance(own, tuple) else own) != value:
            return f"{name}={own!r}, and {value!r} is proven"
    return None


def _against_compressed(settings: Mapping[str, Any]) -> str | None:
    if settings.get("format") != "pack-quantized":
        return f"format={settings.get('format')!r}, and packed int4 weights with plain activations (W4A16) are proven"
    if settings.get("kv_cache_scheme"):
        return "its KV cache is quantized too"
    for group in settings.get("config_groups", {}).values():
        if group.get("input_activations") or group.get("output_activations"):
            return "its activations are quantized too, which cuts the trainer's gradients"
        weights = group.get("weights") or {}
        if weights.get("actorder") not in (None, "static", "weight"):
            return f"actorder={weights['actorder']!r}, and None is proven"
        if reason := _other_than(_INT4, weights):
            return f"weights: {reason}"
    return None
