"""LoRA on a mixture's experts, computed by vLLM's own kernels: with `--device cuda:0`. Its names and its arithmetic are
tested without in test_experts.py; nothing of the package serves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_grpo.engines.local.weights import PlainEngine
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from tests.conftest import ENGINE_ARGS
from tests.experts import gate_and_up, of_each_expert, served_experts
from tests.families import VOCAB, build
from tests.test_experts import EXPERTS, adapted_model

pytestmark = pytest.mark.vllm

RANK = 8
PARAMETERS = ["gate_up_proj", "down_proj"]
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "as the model has them": ("gpt_oss", {}),
    "in one tensor": ("qwen3_moe", {"enable_mixed_moe_lora_format": True}),
    "one by one": ("qwen3_moe", {}),
}
"""A family, and what vLLM is started with to take its experts so."""


@pytest.mark.parametrize("way", WAYS)
def test_vllm_computes_what_peft_does(device: str, way: str, tmp_path: Path, record_property: Any) -> None:
    from vllm.lora.request import LoRARequest

    if device == "cpu":
        pytest.skip("vLLM's kernels for LoRA on experts are a GPU's")
    family, arguments = WAYS[way]
    directory = build(family, tmp_path / "base")
    model, modules = adapted_model(family, directory, PARAMETERS, rank=RANK, scale=0.1)
    sequences = torch.randint(4, VOCAB - 4, (4, 32), generator=torch.Generator().manual_seed(7)).tolist()
    policy = teacher_logprobs(model, sequences)
    with model.disable_adapter():
        base = teacher_logprobs(model, sequences)
    tensors = served_experts(modules)
    write(tmp_path / "adapter", one_by_one(tensors) if way == "one by one" else tensors)
    engine = PlainEngine(directory, lora_rank=RANK, **ENGINE_ARGS, **arguments)
    try:
        noise = mean_abs_difference(engine.logprobs(sequences), base)
        engine.serve(LoRARequest("experts", 1, str(tmp_path / "adapter"), is_3d_lora_weight=way != "one by one"))
        gap, signal = (mean_abs_difference(engine.logprobs(sequences), other) for other in (policy, base))
    finally:
        engine.close()
    for name, value in (("noise", noise), ("gap", gap), ("signal", signal)):
        record_property(f"{name}_nats", round(value, 5))
    assert signal >= 10 * noise
    assert gap <= 3 * noise


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    save_file(
        {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["experts"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def one_by_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By each expert's layers' names, as adapters of older releases of transformers have them."""
    found = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        path = name.removesuffix(".lora_A.weight")
        a_ERI, b_EOR = of_each_expert(tensors[name], tensors[f"{path}.lora_B.weight"], EXPERTS)
        parent, _, below = path.partition(".experts")
        layers = (
            {"down_proj": b_EOR}
            if not below
            else dict(zip(("gate_proj", "up_proj"), gate_and_up(b_EOR, interleaved=False), strict=True))
        )
        for layer, b in layers.items():
            for expert in range(EXPERTS):
                found[f"{parent}.experts.{expert}.{layer}.lora_A.weight"] = a_ERI[expert]
                found[f"{parent}.experts.{expert}.{layer}.lora_B.weight"] = b[expert]
    return found
