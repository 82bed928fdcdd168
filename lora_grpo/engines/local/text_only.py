"""The transformers model of a checkpoint; of a multimodal one its language model alone, under the checkpoint's names.

Its towers are left out when the model is built, so nothing of theirs is read from the files or takes memory, and each
parameter keeps the name that the full checkpoint has for it.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from lora_grpo.adapters.peft_form.modules import is_multimodal
from lora_grpo.errors import ConfigError


def full_class(config: Any) -> Any | None:
    """transformers' class of a multimodal checkpoint's whole model; None for a text-only checkpoint."""
    return AutoModelForImageTextToText._model_mapping.get(type(config), None) if is_multimodal(config) else None


def model_class(config: Any) -> Any:
    """What has `from_config` and `from_pretrained` for a checkpoint. Raises `ConfigError` where there is none."""
    full = full_class(config)
    if full is not None:
        return _language_model_of(full)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping or auto.__name__ in (getattr(config, "auto_map", None) or ()):
            return auto
    raise ConfigError(f"transformers has no language model for a {type(config).__name__}; choose another base")


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
    """All that stands beside the language model, in the model that holds it, is None from now on."""
    decoder = model.get_decoder()
    paths = {module: name for name, module in model.named_modules()}
    parent = paths[decoder].rpartition(".")[0]
    holder = model.get_submodule(parent)
    for name, child in holder.named_children():
        if child is not decoder and child is not model.get_output_embeddings():
            setattr(holder, name, None)
            left_out = re.escape(f"{parent}.{name}.".lstrip("."))
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), left_out}
