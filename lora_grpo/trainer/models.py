"""The holders of a base model: the vLLM engine, and on the same device a trainer's PEFT model, or several trainers'."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, set_seed

from lora_grpo.adapters.peft_form.checks import NF4, Scheme, active_adapter, check_servable, scheme_of
from lora_grpo.adapters.peft_form.modules import LoraModule, keep_trainable, lora_modules, peft_model_of
from lora_grpo.config import EngineConfig, ModelConfig
from lora_grpo.engines.base import Engine
from lora_grpo.engines.delivery.probe import Proofs
from lora_grpo.engines.local.targets import checkpoint_config, model_class, served_scheme, skeleton
from lora_grpo.errors import ConfigError, UnsupportedAdapter
from lora_grpo.sections import nearest_key

ALL_LINEAR = "target_modules='all-linear' is every linear layer of the language model"
Model: TypeAlias = ModelConfig | nn.Module  # a checkpoint, or a PeftModel on one
Sharing: TypeAlias = Literal["auto"] | bool  # whether trainer and engine hold one copy of the base
_OF_SERVERS = ("on_failure", "concurrency", "timeout_s", "patience_s")


@dataclass(frozen=True)
class Shared:
    """`base` is a transformers model that nothing trains; each trainer adapts modules of its own on its tensors."""

    engine: Engine
    base: Any
    checkpointing: bool = False  # whether activations are computed twice, for trainers whose settings leave it open
    proofs: Proofs = field(default_factory=dict)

    def own_modules(self) -> Any:
        """A model like the base, whose parameters and buffers are the base's own tensors. PEFT puts a trainer's adapter
        into its modules, so that nothing of one trainer is seen by another: no active adapter, no dropout, no mode."""
        tensors = [*self.base.parameters(), *self.base.buffers()]
        # bitsandbytes keeps a weight's scales beside it.
        states = [getattr(tensor, "quant_state", None) for tensor in tensors]
        return deepcopy(self.base, {id(one): one for one in [*tensors, *states] if one is not None})


def default_device() -> torch.device:
    """The process's CUDA device when there is one (`cuda:0` of a single process): trainer and engine share it."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def checkpoint_of(model: Model) -> ModelConfig:
    if isinstance(model, ModelConfig):
        return model
    config = peft_model_of(model).base_model.model.config
    if not (name := getattr(config, "_name_or_path", "")):
        raise ConfigError("the model does not know its checkpoint; build VLLMEngine(name) yourself and pass engine=")
    return ModelConfig(name=str(name), quantization="nf4" if scheme_of(config) == "nf4" else None)


def build_engine(model: Model, config: EngineConfig, leaves: list[str] | None = None, share: bool = False) -> Engine:
    """A `VLLMEngine` on the model's checkpoint, or the servers that `config.urls` names; `max_lora_rank` is to be set.
    `leaves` are the last names of the layers to be adapted, each of which costs decoding time (None: all linear)."""
    checkpoint = checkpoint_of(model)
    if config.urls:
        from lora_grpo.engines.server.engine import VLLMServerEngine

        asked = config.model_dump(include={"max_loras", *_OF_SERVERS})
        asked |= {"model": checkpoint.name, "trust_remote_code": checkpoint.trust_remote_code}
        return VLLMServerEngine(config.urls, adapters="path" if config.store_address is None else "resolver", **asked)
    from lora_grpo.engines.vllm_local import VLLMEngine

    asked = config.model_dump(exclude={"urls", "store_address", *_OF_SERVERS}) | checkpoint.loading
    asked |= {"quantization": checkpoint.quantization, "share_base_weights": share}
    return VLLMEngine(checkpoint.name, target_modules=leaves, **asked)


def quantization_of(model: ModelConfig) -> Scheme | None:
    """How the weights that a run serves are kept. Raises `ConfigError` where that is not proven."""
    return served_scheme(model.name, model.quantization, **model.loading)


def load_base(model: ModelConfig, device: torch.device | None = None) -> Any:
    """A transformers model on `device`, else the default one: nf4 as it is, other quantized weights as plain values."""
    config = checkpoint_config(model.name, **model.loading)
    dtype = "auto" if model.dtype == "auto" else getattr(torch, model.dtype)
    own = getattr(config, "quantization_config", None)
    asked: dict[str, Any] = {}
    if quantization_of(model) != "nf4" and own is not None:
        config.quantization_config = {**own, "dequantize": True}
        asked["config"] = config
    elif model.quantization == "nf4" and own is None:
        compute = config.get_text_config().dtype or torch.float32 if dtype == "auto" else dtype
        asked["quantization_config"] = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=compute)
    base: Any = model_class(config).from_pretrained(model.name, dtype=dtype, **model.loading, **asked)
    keep_trainable(base)
    return base.to(device or default_device())


def build_policy_model(model: Model, peft_config: Any, seed: int, base: Any = None) -> nn.Module:
    """The PEFT model to train: as it is given, or with an adapter in fp32 drawn from `seed`, on `base` or a copy."""
    config = _lora_config(model, peft_config)
    if isinstance(model, nn.Module):
        return model
    base = load_base(model) if base is None else base
    set_seed(seed)
    policy = _with_adapter(base, config, model.name, autocast_adapter_dtype=True, revision=model.revision)
    for module in check_servable(policy, active_adapter(policy)):
        module.a_RI.data, module.b_OR.data = module.a_RI.data.float(), module.b_OR.data.float()
    return policy


def lora_rank(model: Model, peft_config: Any = None) -> int:
    config = _lora_config(model, peft_config)
    return max([config.r, *config.rank_pattern.values()])


def expects_one_copy(choice: Sharing, model: Model, config: EngineConfig) -> bool:
    """Whether memory is planned for one copy of the base: "auto" hopes for it where nothing known stands against it."""
    same_dtype = isinstance(model, ModelConfig) and model.dtype == config.dtype
    may_share = _may_share(choice, model) and quantization_of(checkpoint_of(model)) is None
    return choice is True or (may_share and same_dtype and not config.urls)


def shared_base(choice: Sharing, model: Model, engine: Engine, tell: Callable[[str], None]) -> Any | None:
    """The engine's weights as the trainer's base, or None for a copy of its own. "auto" takes them on CUDA in the dtype
    that a copy would have, or else tells why not. True raises `ConfigError` or `UnsupportedAdapter` with the reason."""
    if not (choice is True or (_may_share(choice, model) and hasattr(engine, "shared_model"))):
        return None
    try:
        if not isinstance(model, ModelConfig):
            raise ConfigError("share_base_weights=True builds its model: pass the checkpoint's name, not a PeftModel")
        if (share := getattr(engine, "shared_model", None)) is None:
            raise ConfigError(f"share_base_weights=True needs a VLLMEngine, not a {type(engine).__name__}")
        served, wanted = engine.describe_base().dtype, str(model.dtype)
        if wanted == "auto":
            wanted = str(checkpoint_config(model.name, **model.loading).dtype or torch.float32).removeprefix("torch.")
        if served != wanted:
            fix = f"set model.dtype={served!r}"
            raise ConfigError(f"the engine's base is {served}, the trainer's would be {wanted}: {fix}")
        return share()
    except (ConfigError, UnsupportedAdapter) as reason:
        if choice is True:
            raise
        tell(f"the trainer has its own copy of the base: {reason}")
        return None


def _may_share(choice: Sharing, model: Model) -> bool:
    return choice == "auto" and isinstance(model, ModelConfig) and torch.cuda.is_available()


def adapted_leaves(model: Model, peft_config: Any) -> list[str] | None:
    """Last names of the layers to be adapted; None for all linear ones, which is the engine's own default."""
    leaves = {module.path.rsplit(".", 1)[-1] for module in adapted_modules(model, peft_config)}
    return None if isinstance(model, ModelConfig) and peft_config.target_modules == "all-linear" else sorted(leaves)


def adapted_modules(model: Model, peft_config: Any) -> list[LoraModule]:
    """The layers to be adapted. Raises `ConfigError` or `UnsupportedAdapter` for what no engine would serve."""
    if isinstance(model, nn.Module):
        return lora_modules(model, active_adapter(model))
    return check_servable(without_memory(model, peft_config), "default")


def without_memory(model: Model, peft_config: Any) -> PeftModel:
    """The PEFT model that is trained, on the meta device."""
    config = deepcopy(_lora_config(model, peft_config))
    if isinstance(model, ModelConfig):
        name, empty = model.name, skeleton(model.name, **model.loading)
        paths = [path for path, _ in empty.named_modules()]
        for target in () if isinstance(config.target_modules, str | None) else config.target_modules:
            # PEFT skips it where another one is a layer's.
            if not any(path == target or path.endswith(f".{target}") for path in paths):
                near = nearest_key(target, _linear(empty))
                raise ConfigError(f"target_modules: {name} has no layer {target!r}; {near}")
    else:
        base = peft_model_of(model).get_base_model()
        with torch.device("meta"):
            name, empty = type(base).__name__, type(base)(deepcopy(base.config))
    empty.config.quantization_config = None  # of weights that are not there
    return _with_adapter(empty, config, name, low_cpu_mem_usage=True)


def _with_adapter(base: Any, config: LoraConfig, name: str, **settings: Any) -> PeftModel:
    targets, linear = config.target_modules, ", ".join(sorted(_linear(base)))  # before PEFT changes both
    try:
        return get_peft_model(base, config, **settings)
    except ValueError as error:
        fix = f"its linear layers are {linear}" if targets else ALL_LINEAR
        raise ConfigError(f"target_modules={targets!r} on {name}: {str(error).rstrip('.')}; {fix}") from error


def _linear(model: nn.Module) -> set[str]:
    return {path.rsplit(".", 1)[-1] for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def check_same_device(model: nn.Module, engine: Engine) -> None:
    trainer, served = next(model.parameters()).device, engine.device
    if served is not None and (trainer.type, trainer.index or 0) != (served.type, served.index or 0):
        told = f"the trainer is on {trainer} but the engine on {served}; move the model with model.to('{served}')"
        raise ConfigError(f"{told}, or serve there with `vllm serve` and use VLLMServerEngine")


def _lora_config(model: Model, peft_config: Any) -> LoraConfig:
    if isinstance(model, nn.Module):
        if peft_config is not None:
            raise ConfigError("model is a PeftModel already: leave peft_config out, or pass the checkpoint's name")
        return peft_model_of(model).peft_config[active_adapter(model)]
    if peft_config is None:
        raise ConfigError("model is a checkpoint name: pass peft_config=LoraConfig(...) to adapt it")
    return peft_config
