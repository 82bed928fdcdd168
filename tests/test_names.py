"""The map of names on small stand-ins for vLLM's models: renamed, stacked, packed, wrapped, dropped."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lora_grpo.engines.names import NameMap, Place


class Mapper:
    """As vLLM's, of renames by prefix and of stacked parameters."""

    def __init__(self, prefixes: dict[str, str | None], stacked: dict[str, tuple[str, Any]]) -> None:
        self.prefixes, self.stacked = prefixes, stacked

    def _map_name_with_shard(self, name: str) -> tuple[str, Any] | None:
        shard = None
        for part, (fused, found) in self.stacked.items():
            if part in name:
                name, shard = name.replace(part, fused, 1), found
        for old, new in self.prefixes.items():
            if name.startswith(old):
                if new is None:
                    return None
                name = name.replace(old, new, 1)
        return name, shard


class OldMapper:
    """As vLLM's before it knew of stacked parameters."""

    def _map_name(self, name: str) -> str | None:
        return None if name.startswith("mtp.") else name


def fused(*sizes: int) -> nn.Module:
    layer = nn.Linear(4, sum(sizes))
    layer.output_partition_sizes = list(sizes)  # type: ignore[assignment]
    return layer


def wrapped(layer: nn.Module) -> nn.Module:
    wrapper = nn.Module()
    wrapper.base_layer = layer
    return wrapper


def model(mapper: Any = None, inner_mapper: Any = None, packed: dict[str, list[str]] | None = None) -> nn.Module:
    """`model.layer.(qkv_proj | in_proj | o_proj)`, the first of them wrapped for LoRA."""
    layer, inner, outer = nn.Module(), nn.Module(), nn.Module()
    layer.qkv_proj, layer.in_proj, layer.o_proj = wrapped(fused(8, 4, 4)), fused(2, 2, 4, 4), fused(4)
    inner.layer, outer.model = layer, inner
    for owner, known in ((outer, mapper), (inner, inner_mapper)):
        if known is not None:
            owner.hf_to_vllm_mapper = known
    outer.packed_modules_mapping = packed or {}
    return outer


STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".in_qkv": (".in_proj", (0, 1, 2)),
    ".in_z": (".in_proj", 3),
    ".shared": (".in_proj", [0, 1]),
}


@pytest.mark.parametrize("inside", [False, True], ids=["the model's own", "its inner model's"])
def test_stacked_parameters(inside: bool) -> None:
    """One tensor may fill several slices."""
    mapper = Mapper({}, STACKED)
    names = NameMap(model(None, mapper) if inside else model(mapper))
    assert names.tensor("model.layer.k_proj.bias") == Place("model.layer.qkv_proj.bias", (1,))
    assert names.tensor("model.layer.in_qkv.weight") == Place("model.layer.in_proj.weight", (0, 1, 2))
    assert names.tensor("model.layer.in_z.weight") == Place("model.layer.in_proj.weight", (3,))
    assert names.module("model.layer.q_proj") == Place("model.layer.qkv_proj", (0,))


def test_the_rows_of_a_tensor() -> None:
    names = NameMap(model(Mapper({}, STACKED)))
    place = names.tensor("model.layer.in_qkv.weight")
    assert place is not None
    assert names.rows(place, (8, 4), (12, 4)) == {0: (0, 2), 1: (2, 2), 2: (4, 4)}
    assert names.rows(place, (7, 4), (12, 4)) is None
    assert names.rows(place, (8, 3), (12, 4)) is None
    whole = Place("model.layer.qkv_proj.weight")
    assert names.rows(whole, (16, 4), (16, 4)) == {0: (0, 8), 1: (8, 4), 2: (12, 4)}
    assert names.rows(Place(whole.name, (3,)), (4, 4), (16, 4)) is None


def test_only_a_vocabulary_is_padded() -> None:
    outer = model()
    outer.embed, outer.norm = nn.Embedding(64, 4), nn.LayerNorm(64)
    outer.embed.org_vocab_size = 50
    names = NameMap(outer)
    assert names.rows(Place("embed.weight"), (50, 4), (64, 4)) == {0: (0, 50)}
    assert names.rows(Place("norm.weight"), (50,), (64,)) is None
    assert names.rows(Place("norm.weight"), (64,), (64,)) == {0: (0, 64)}


def test_a_tensor_whose_values_are_in_several_slices_has_no_place() -> None:
    assert NameMap(model(Mapper({}, STACKED))).tensor("model.layer.shared.weight") is None


def test_a_wrappers_renames_come_before_the_inner_models_stacking() -> None:
    outer = model(Mapper({"model.language_model.": "model.", "mtp.": None}, {}), Mapper({}, STACKED))
    names = NameMap(outer)
    assert names.tensor("model.language_model.layer.v_proj.weight") == Place("model.layer.qkv_proj.weight", (2,))
    assert names.tensor("mtp.layer.o_proj.weight") is None


def test_a_mapper_that_outer_and_inner_model_share_renames_once() -> None:
    mapper = Mapper({}, {".o_proj": (".o_proj.o_proj", None)})
    outer: Any = model(mapper, mapper)
    outer.model.layer.o_proj.o_proj = nn.Linear(4, 4)
    assert NameMap(outer).tensor("model.layer.o_proj.weight") == Place("model.layer.o_proj.o_proj.weight")


def test_what_the_loader_computes_has_no_place() -> None:
    def composed_weight_loader() -> Any:
        return lambda parameter, loaded: parameter.data.copy_(-loaded.exp())

    outer: Any = model()
    outer.model.layer.o_proj.weight.weight_loader = composed_weight_loader()
    assert NameMap(outer).tensor("model.layer.o_proj.weight") is None
    assert NameMap(outer).tensor("model.layer.o_proj.bias") == Place("model.layer.o_proj.bias")


def test_rows_that_the_loader_reorders_have_no_place() -> None:
    outer: Any = model(Mapper({}, STACKED))
    outer.model.permute_qk_weight_for_rotary = None
    names = NameMap(outer)
    assert names.tensor("model.layer.q_proj.weight") is names.module("model.layer.k_proj") is None
    assert names.module("model.layer.v_proj") == Place("model.layer.qkv_proj", (2,))


@pytest.mark.parametrize("mapper", [None, OldMapper()])
def test_packed_modules_where_no_mapper_says_how(mapper: Any) -> None:
    packed = {"qkv": ["q_proj", "k_proj"], "qkv_proj": ["q_proj", "k_proj", "v_proj"], "in_proj": ["in_qkv", "in_z"]}
    names = NameMap(model(mapper, packed=packed))
    assert names.tensor("model.layer.v_proj.weight") == Place("model.layer.qkv_proj.weight", (2,))
    # Two members of a layer with four slices: which fill which, this does not say.
    assert names.tensor("model.layer.in_z.weight") is None
    assert names.tensor("model.layer.o_proj.weight") == Place("model.layer.o_proj.weight")


def test_what_the_model_does_not_have() -> None:
    names = NameMap(model(Mapper({}, STACKED)))
    assert names.tensor("model.other.q_proj.weight") is None
    assert names.tensor("model.layer.o_proj.scale") is None
