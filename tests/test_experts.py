"""LoRA on a mixture's experts: what vLLM makes of the tensors, by its own code, is PEFT's update of each expert."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from lora_grpo.adapters.peft_form.files import PREFIX
from lora_grpo.adapters.peft_form.modules import LoraModule, lora_modules
from lora_grpo.errors import UnsupportedAdapter
from tests.experts import gate_and_up, of_each_expert, served_experts
from tests.families import build, trainer_model

EXPERTS = 4


def adapted(family: str, folder: Path, names: list[str], **settings: Any) -> list[LoraModule]:
    """Wrappers of a tiny mixture's experts with random A and B."""
    return adapted_model(family, build(family, folder), names, **settings)[1]


def adapted_model(
    family: str, directory: Path, names: list[str], *, rank: int = 2, scale: float = 1.0, **settings: Any
) -> tuple[Any, list[LoraModule]]:
    config = LoraConfig(r=rank, target_modules=[], target_parameters=[f"experts.{name}" for name in names], **settings)
    model = get_peft_model(trainer_model(family, directory), config).eval()
    modules = lora_modules(model, "default")
    generator = torch.Generator().manual_seed(0)
    for module in modules:
        for factor in (module.a_RI, module.b_OR):
            factor.data = scale * torch.randn(factor.shape, generator=generator)
    return model, modules


@pytest.mark.parametrize("names", [["gate_up_proj", "down_proj"], ["down_proj", "gate_up_proj"]])
@pytest.mark.parametrize(("family", "settings"), [("qwen3_moe", {"lora_alpha": 6}), ("gpt_oss", {"use_rslora": True})])
def test_vllm_makes_of_it_what_peft_adds_to_each_expert(
    family: str, settings: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    modules = adapted(family, tmp_path, names, **settings)
    tensors = served_experts(modules)
    assert len(tensors) == 2 * len(modules) == 8
    for layer in (0, 1):
        path = f"model.layers.{layer}.mlp.experts"
        deltas = {m.layer.parameter_name: m.layer for m in modules if m.path.startswith(path)}
        # PEFT's own merge, as (experts, out, in).
        wanted = {name: wrapper.get_delta_weight("default") for name, wrapper in deltas.items()}
        if family == "gpt_oss":
            wanted = {name: delta.transpose(1, 2) for name, delta in wanted.items()}
        for (a_ERI, b_EOR), (name, vllms) in zip(
            by_vllm(tensors, path), (("gate_up_proj", ".base_layer"), ("down_proj", "")), strict=True
        ):
            torch.testing.assert_close(b_EOR @ a_ERI, wanted[name])
            ours = (tensors[f"{PREFIX}{path}{vllms}.lora_{kind}.weight"] for kind in "AB")
            for own, theirs in zip(of_each_expert(*ours, EXPERTS), (a_ERI, b_EOR), strict=True):
                assert torch.equal(own, theirs)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_vllm_cuts_gate_and_up_apart_where_they_are_two(family: str, tmp_path: Path) -> None:
    """Which rows are whose is the model's own: GPT-OSS computes gate from the even ones."""
    modules = adapted(family, tmp_path, ["gate_up_proj", "down_proj"])
    tensors = served_experts(modules)
    path = "model.layers.0.mlp.experts"
    a, b = by_vllm_in_two(tensors, path, AutoConfig.from_pretrained(tmp_path))
    _, b_EOR = of_each_expert(*(tensors[f"{PREFIX}{path}.base_layer.lora_{kind}.weight"] for kind in "AB"), EXPERTS)
    gate, up = gate_and_up(b_EOR, interleaved=family == "gpt_oss")
    assert torch.equal(b[0], gate)
    assert torch.equal(b[2], up)
    assert torch.equal(a[0], a[2])


@pytest.mark.parametrize("names", [["gate_up_proj"], ["down_proj"]])
def test_one_of_the_two_alone_is_refused(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedAdapter, match=rf"mlp\.experts: .* together, and the adapter has {names[0]}; name both"
    ):
        served_experts(adapted("qwen3_moe", tmp_path, names))


def by_vllm(tensors: dict[str, torch.Tensor], path: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of gate_up_proj and down_proj as vLLM stacks them for a model of 3-D experts."""
    from vllm.lora.model_manager import LoRAModelManager

    module = SimpleNamespace(w13_lora_a_stacked=[torch.empty(1, EXPERTS)], global_num_experts=EXPERTS, ep_rank=0)
    loaded = layers(tensors)
    LoRAModelManager._stack_moe_lora_weights(manager(loaded), SimpleNamespace(loras=loaded), module, path)
    return list(zip(loaded[path].lora_a, loaded[path].lora_b, strict=True))


def by_vllm_in_two(tensors: dict[str, torch.Tensor], path: str, config: Any) -> Any:
    from vllm.lora.model_manager import LoRAModelManager

    module = SimpleNamespace(local_num_experts=EXPERTS, global_num_experts=EXPERTS, ep_rank=0)
    loaded = layers(tensors)
    standing = manager(loaded, model=SimpleNamespace(config=config))
    LoRAModelManager._convert_3d_to_2d_moe_lora(standing, SimpleNamespace(loras=loaded), module, path)
    return loaded[path].lora_a, loaded[path].lora_b


def manager(loaded: dict[str, Any], **others: Any) -> Any:
    own = {"_get_lora_layer_weights": lambda _, name: loaded.get(name), "_pop_lora_weights": lambda *_: None}
    return SimpleNamespace(_is_3d_moe_model=True, **own, **others)


def layers(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """By module, as vLLM's own reader of names and its loader have them."""
    from vllm.lora.lora_weights import LoRALayerWeights
    from vllm.lora.utils import parse_fine_tuned_lora_name

    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        path, is_a = parse_fine_tuned_lora_name(name)
        layer = found.setdefault(path, LoRALayerWeights(path, 2, 2, None, None))
        setattr(layer, "lora_a" if is_a else "lora_b", tensor.clone())
    return found
