"""Checkpoints in fewer bits, made of tiny plain ones: fp8 in blocks, and compressed-tensors' packed int4."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
BLOCK, GROUP = 128, 32


def to_fp8(directory: Path, block: int = BLOCK) -> Path:
    """Every projection of the checkpoint in fp8, with one scale for each block."""

    def quantize(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        assert not rows % block
        assert not columns % block
        blocks = weight.float().view(rows // block, block, columns // block, block)
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        values = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
        return {f"{name}.weight": values, f"{name}.weight_scale_inv": scale}

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    return _rewritten(directory, quantize, settings)


def to_int4(directory: Path) -> Path:
    """Every projection of the checkpoint in packed int4 (W4A16), with one scale for each group of a row."""

    def quantize(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        groups = weight.float().view(rows, columns // GROUP, GROUP)
        scale = (groups.abs().amax(2) / 7).to(torch.bfloat16)
        values = (groups / scale.float()[:, :, None]).round().clamp(-8, 7).to(torch.int64).view(rows, -1, 8) + 8
        packed = (values << torch.arange(0, 32, 4)).sum(2).to(torch.int32)
        shape = torch.tensor([rows, columns])
        return {f"{name}.weight_packed": packed, f"{name}.weight_scale": scale, f"{name}.weight_shape": shape}

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights}},
    }
    return _rewritten(directory, quantize, settings)


def _rewritten(
    directory: Path,
    quantize: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
    settings: Mapping[str, Any],
) -> Path:
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / WEIGHTS).items():
        layer = name.removesuffix(".weight")
        tensors |= quantize(layer, tensor) if layer.endswith("_proj") else {name: tensor}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return directory
