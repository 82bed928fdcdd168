"""The trainer's side, the same for every strategy: a frozen bf16 base and an fp32 adapter that moves at each step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from lora_grpo.adapters.peft_form.modules import LoraModule, lora_modules
from lora_grpo.bench.plan import Subject

ADAPTER = "default"


class Trainer:
    """A PEFT model with alpha = 2r. What training would do to the adapter is done to it by random signs."""

    def __init__(self, subject: Subject, base: Any = None) -> None:
        """On `base`, or on a copy of its own."""
        if base is None:
            base = AutoModelForCausalLM.from_pretrained(subject.model, dtype=torch.bfloat16).to(subject.device)
            for parameter in base.parameters():
                # On the CPU they are views of the mapped file, whose pages count when they are first touched, whoever
                # does.
                parameter.data = parameter.data.clone()
        torch.manual_seed(subject.seed)
        config = LoraConfig(r=subject.rank, lora_alpha=2 * subject.rank, target_modules=subject.target_modules)
        self.model: PeftModel = get_peft_model(base, config, autocast_adapter_dtype=True)
        self.modules: list[LoraModule] = lora_modules(self.model, ADAPTER)
        self.device = torch.device(subject.device)
        self._generator = torch.Generator(self.device).manual_seed(subject.seed)

    def step(self, learning_rate: float = 1e-5) -> None:
        """Move every entry of A and B by the learning rate, up or down: what AdamW does to them at first."""
        with torch.no_grad():
            for tensor in self.tensors():
                tensor.add_(self._signs(tensor), alpha=learning_rate)

    def nudge(self, size: float = 1e-5) -> None:
        """Move every entry by the same: a change that takes next to no time."""
        with torch.no_grad():
            torch._foreach_add_(list(self.tensors()), size)

    def reset(self, b_size: float) -> None:
        """A as PEFT draws it, every entry of B at plus or minus `b_size`."""
        with torch.no_grad():
            for module in self.modules:
                nn.init.kaiming_uniform_(module.a_RI, a=5**0.5)
                module.b_OR.copy_(self._signs(module.b_OR) * b_size)

    def randomise(self, size: float, seed: int | None = None) -> None:
        """A with unit gain on its input; B normal, so that B A x is of order `size` after scaling. With a seed, the
        same on every trainer of a model."""
        if seed is not None:
            self._generator.manual_seed(seed)
        with torch.no_grad():
            for module in self.modules:
                a, b = module.a_RI, module.b_OR
                a.copy_(self._normal(a) / a.shape[1] ** 0.5)
                b.copy_(self._normal(b) * size / (module.scaling * b.shape[1] ** 0.5))

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of all A and B."""
        return [tensor.detach().clone() for tensor in self.tensors()]

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for tensor, saved in zip(self.tensors(), snapshot, strict=True):
                tensor.copy_(saved)

    def tensors(self) -> Iterator[nn.Parameter]:
        """A, B, A, B, ... by module."""
        for module in self.modules:
            yield module.a_RI
            yield module.b_OR

    @property
    def adapter_elements(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors())

    def base_weight(self, module: LoraModule) -> torch.Tensor:
        """The frozen weight that a module adapts, as it is now."""
        return module.layer.get_base_layer().weight.detach()

    def update_of(self, module: LoraModule) -> torch.Tensor:
        """s B A in fp32: what the adapter adds to the weight."""
        a_RI, b_OR = module.a_RI.detach().float(), module.b_OR.detach().float()
        return module.scaling * (b_OR @ a_RI)

    @property
    def base_bytes(self) -> int:
        """Bytes of one copy of the base; tied weights count once."""
        own = (p for name, p in self.model.named_parameters() if "lora_" not in name)
        return sum(parameter.numel() * parameter.element_size() for parameter in own)

    def drop_base(self) -> None:
        """Let go of the base's weights; the model cannot be used afterwards."""
        for name, module in self.model.named_modules():
            if "lora_" not in name:
                module._parameters.clear()

    def _signs(self, like: torch.Tensor) -> torch.Tensor:
        bits = torch.randint(0, 2, like.shape, generator=self._generator, device=self.device)
        return bits.to(like.dtype).mul_(2).sub_(1)

    def _normal(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=self._generator, device=self.device)


def checkpoint_name(name: str) -> str:
    """A parameter of a PEFT model's base as the checkpoint names it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")
