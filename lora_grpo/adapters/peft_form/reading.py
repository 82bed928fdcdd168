"""Adapter weights back from a published serving form, for good or while something is compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lora_grpo.adapters.peft_form.files import PREFIX
from lora_grpo.adapters.peft_form.modules import LoraModule, assign
from lora_grpo.adapters.peft_form.serving import WEIGHTS_FILE
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.errors import StoreCorrupt


def read_rounded(version: AdapterVersion) -> dict[str, torch.Tensor]:
    """A version's serving form by tensor name, exact but for the serving dtype's rounding."""
    return load_tensors(version.path / WEIGHTS_FILE)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name. Raises `StoreCorrupt` for a file that is none."""
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except (OSError, SafetensorError) as error:
        raise StoreCorrupt(f"{path} cannot be read: {error}") from error


def assign_rounded(tensors: Mapping[str, torch.Tensor], modules: list[LoraModule]) -> None:
    """Set A and B to what `read_rounded` gave, scaling taken out of B again.

    Raises `StoreCorrupt`, before any is set, unless they have these modules' names and shapes.
    """
    for module in modules:
        for kind, parameter in (("A", module.a_RI), ("B", module.b_OR)):
            name = f"{PREFIX}{module.path}.lora_{kind}.weight"
            if name not in tensors or tensors[name].shape != parameter.shape:
                found = tuple(tensors[name].shape) if name in tensors else None
                raise StoreCorrupt(f"{name} is {found} in the version but {tuple(parameter.shape)} in the model")
    for module in modules:
        assign(module.a_RI, tensors[f"{PREFIX}{module.path}.lora_A.weight"])
        assign(module.b_OR, tensors[f"{PREFIX}{module.path}.lora_B.weight"].float() / module.scaling)


@contextmanager
def restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Whatever they are made inside, afterwards they are their own again, to the bit."""
    own = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, own, strict=True):
                parameter.copy_(values)


@contextmanager
def weights_of(version: AdapterVersion, modules: list[LoraModule]) -> Iterator[None]:
    """While inside, A and B are what `version` serves; afterwards they are their own again."""
    with restored([parameter for module in modules for parameter in (module.a_RI, module.b_OR)]):
        assign_rounded(read_rounded(version), modules)
        yield
