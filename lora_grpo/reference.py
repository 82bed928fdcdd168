"""What the KL is measured to: the adapter as it was when training began, which is TRL's meaning, or the bare base.

TRL copies the adapter of a PeftModel that it is given to a frozen one named "ref". Here the copy lies beside the model,
which is lent its weights for a forward pass. An adapter that changes nothing yet (every B is 0) is the base: it is
switched off instead, and no copy is kept."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.peft_form.checks import active_adapter
from lora_grpo.adapters.peft_form.modules import lora_modules, peft_model_of, reshard, sharded_like
from lora_grpo.adapters.peft_form.serving import restored
from lora_grpo.errors import ConfigError, StoreCorrupt
from lora_grpo.state import TrainerState, adapter_weights, check_state, named_weights

REFERENCE_FILE = "reference.safetensors"


class Reference:
    """The reference of one model's adapter. Every process has one; `weights_now` is called by all."""

    def __init__(self, model: nn.Module, *, wanted: bool) -> None:
        """The adapter as it is now, where it is `wanted`. Raises `ConfigError` for a model with a "ref" of its own."""
        self._model, adapter = model, active_adapter(model)
        self.modules = lora_modules(model, adapter)
        if wanted and "ref" in set(peft_model_of(model).peft_config) - {adapter}:
            meant = f"with beta > 0 the KL is to a copy of {adapter!r} as it is now"
            raise ConfigError(f"the model has an adapter 'ref', but {meant}: call model.delete_adapter('ref')")
        self.set(self.weights_now() if wanted else None)

    def weights_now(self) -> dict[str, torch.Tensor] | None:
        """A and B as they are now, by `weights/MODULE.A` and `.B`, whole and on the CPU; None where every B is 0."""
        weights = adapter_weights(self.modules)
        return weights if any(tensor.any() for name, tensor in weights.items() if name.endswith(".B")) else None

    def set(self, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Take these from now on (None: the base). Raises `StoreCorrupt` for another adapter's."""
        if weights is not None:
            check_state(TrainerState(weights, {}), self.modules)
        pairs = named_weights(self.modules)
        self._weights = None if weights is None else [sharded_like(one, weights[name]) for name, one in pairs]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While inside, the model is the reference; afterwards it is itself again, to the bit."""
        if self._weights is None:
            # Switching a LoRA layer on again makes all its weights trainable: those that were frozen stay so.
            frozen = [parameter for parameter in self._model.parameters() if not parameter.requires_grad]
            try:
                with peft_model_of(self._model).disable_adapter():
                    yield
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(False)
            return
        parameters = [parameter for _, parameter in named_weights(self.modules)]
        reshard(self._model)
        with restored(parameters):
            with torch.no_grad():
                for parameter, values in zip(parameters, self._weights, strict=True):
                    parameter.copy_(values)
            yield


def keep_reference(run_dir: Path, weights: Mapping[str, torch.Tensor] | None) -> None:
    """Write a run's reference down; a file without tensors is the base."""
    path = run_dir / REFERENCE_FILE
    with disk.reported(f"writing {path}"):
        disk.replace_file(path, save(dict(weights or {})), sync=True)


def kept_reference(run_dir: Path) -> dict[str, torch.Tensor] | None:
    """What `keep_reference` wrote. Raises `StoreCorrupt` for a damaged file, or none: no other reference stands in."""
    path = run_dir / REFERENCE_FILE
    content = disk.read_small(path)
    if content is None:
        raise StoreCorrupt(f"{path} is gone, which holds what the KL is measured to: copy it back, or set beta=0")
    try:
        return load(content) or None
    except SafetensorError as error:
        raise StoreCorrupt(f"the reference of the KL in {path} is unreadable: {error}") from error
