"""Stands in for torchvision where it is not installed. vLLM's multimodal classes import it, and text never calls it.

PyPI's torchvision does not fit a CPU build of torch.
"""

from __future__ import annotations

import sys
from enum import Enum
from types import ModuleType
from typing import Any

__version__ = "0.28.0"


class InterpolationMode(Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class ImageReadMode(Enum):
    UNCHANGED, GRAY, GRAY_ALPHA, RGB, RGB_ALPHA = range(5)


def _called(*arguments: Any, **keywords: Any) -> None:
    raise NotImplementedError("an image reached this stand-in: install torchvision")


_FUNCTIONS = ("read_image", "decode_image", "batched_nms", "masks_to_boxes", "pil_to_tensor", "to_pil_image")

for _path in ("transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional", "io", "ops.boxes"):
    _above = sys.modules[__name__]
    for _part in _path.split("."):
        _name = f"{_above.__name__}.{_part}"
        _module = sys.modules.setdefault(_name, ModuleType(_name))
        vars(_module).update(
            dict.fromkeys(_FUNCTIONS, _called), InterpolationMode=InterpolationMode, ImageReadMode=ImageReadMode
        )
        setattr(_above, _part, _module)
        _above = _module
