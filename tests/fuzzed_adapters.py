"""Adapters that are broken in every way that a seed can think of: a sound one with other bytes, header or config."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeAlias

Json: TypeAlias = Any
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
PREFIX = "base_model.model."
VALUES: tuple[Json, ...] = (
    None, True, 0, -1, 1, 3, 10**9, 10**30, 1.5, 1e999, -0.0, "", "F32", "BF16", "x" * 5000, "\ud800", "r\0", [], [[]],
    [1, 2], [1, "2"], [2, 2, 2], [-2, 4], [1.5, 2], [0, 64], [64, 0], [None], {}, {"r": 8}, {"": None}, {"dtype": 3},
)  # fmt: skip


def sound(rank: int = 2) -> tuple[dict[str, Json], bytes, dict[str, Json]]:
    """Header, payload and config of a small adapter in serving form."""
    header: dict[str, Json] = {}
    start = 0
    for module in MODULES:
        for kind, shape in (("A", [rank, 4]), ("B", [6, rank])):
            end = start + 4 * shape[0] * shape[1]
            entry = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
            header[f"{PREFIX}{module}.lora_{kind}.weight"] = entry
            start = end
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(MODULES), "bias": "none",
        "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    return header, bytes(range(start % 256)) + bytes(start - start % 256), config


def weights(header: Json, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def fuzzed(seed: int) -> tuple[bytes, bytes]:
    """Weights file and config file of one broken (or, rarely, still sound) adapter; the same for the same seed."""
    draw = random.Random(seed)
    header, payload, config = sound()
    change = draw.choice(CHANGES)
    return change(draw, header, payload, config)


def _bytes(draw: random.Random, header: Json, payload: bytes, config: Json) -> tuple[bytes, bytes]:
    """Flipped, cut, doubled or random bytes in either file."""
    files = [weights(header, payload), json.dumps(config).encode()]
    which = draw.randrange(2)
    content = bytearray(files[which])
    for _ in range(draw.choice((1, 1, 1, 3, 30))):
        match draw.randrange(5):
            case 0 if content:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            case 1:
                del content[draw.randrange(len(content) + 1) :]
            case 2:
                place = draw.randrange(len(content) + 1)
                content[place:place] = draw.randbytes(draw.randrange(1, 9))
            case 3 if content:
                start = draw.randrange(len(content))
                del content[start : start + draw.randrange(1, 20)]
            case 4:
                content[:8] = draw.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(content))).to_bytes(8, "little")
    files[which] = bytes(content)
    return files[0], files[1]


def _spoiled(draw: random.Random, document: Json) -> Json:
    """`document` with one value, key or item somewhere in it replaced, taken out or put in."""
    if draw.random() < 0.1 or not isinstance(document, dict | list) or not document:
        return deepcopy(draw.choice(VALUES))
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = draw.choice(keys)
    match draw.randrange(5):
        case 0:
            document[key] = deepcopy(draw.choice(VALUES))
        case 1:
            del document[key]
        case 2 if isinstance(document, dict):
            name = draw.choice(("", "r", "x.lora_A.weight", f"{PREFIX}m.lora_B.weight", "__metadata__"))
            document[name] = deepcopy(draw.choice((document[key], *VALUES)))
        case _:
            document[key] = _spoiled(draw, document[key])
    return document


def _header(draw: random.Random, header: Json, payload: bytes, config: Json) -> tuple[bytes, bytes]:
    for _ in range(draw.choice((1, 1, 2, 5))):
        header = _spoiled(draw, header)
    return weights(header, payload), json.dumps(config).encode()


def _config(draw: random.Random, header: Json, payload: bytes, config: Json) -> tuple[bytes, bytes]:
    for _ in range(draw.choice((1, 1, 2, 5))):
        config = _spoiled(draw, config)
    return weights(header, payload), json.dumps(config).encode()


def _text(draw: random.Random, header: Json, payload: bytes, config: Json) -> tuple[bytes, bytes]:
    """Documents that JSON's readers disagree about, or that are no JSON."""
    depth = draw.choice((10, 900, 1_000, 5_000, 100_000))
    broken = draw.choice(
        (
            b"", b"null", b"[]", b'"text"', b"NaN", b"1", b"{}", b"[" * depth, b'{"a":' * depth, b"{" * depth,
            b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"9" * depth, b"\xff\xfe{\x00}\x00",
            b"\xef\xbb\xbf{}", b'{"r": 1e999}', b'{"a": 1, "a": 2}', b"\x00" * depth, b'{"\\ud800": 1}',
        )
    )  # fmt: skip
    if draw.random() < 0.5:
        return weights(broken, payload), json.dumps(config).encode()
    return weights(header, payload), broken


CHANGES: tuple[Callable[[random.Random, Json, bytes, Json], tuple[bytes, bytes]], ...] = (
    _bytes,
    _header,
    _config,
    _text,
)
