"""A file's tensor that fills several of a layer's slices: what is written to them, and that each of them is proven."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_grpo.adapters.peft_form.files import AdapterFile, open_adapter
from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.delivery.slots import Binding, SlotProver
from lora_grpo.errors import DeliveryError
from tests.test_names import STACKED, Mapper, model, wrapped

SIZES = (2, 2, 4, 4)
"""Rows of the slices of `in_proj`, of which `in_qkv` fills the first three and `in_z` the last."""
RANK, ROOM, INPUTS, SLOT = 2, 4, 4, 1


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_qkv, self.in_z = nn.Linear(INPUTS, sum(SIZES[:3])), nn.Linear(INPUTS, SIZES[3])


class Trained(nn.Module):
    """`model.layer.(in_qkv | in_z)`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layer = Layer()
        self.config = SimpleNamespace(to_dict=dict)


def engine() -> tuple[Any, Any]:
    """As much of vLLM as is asked, and its wrapped layer."""
    served: Any = model(Mapper({}, STACKED))
    layer: Any = wrapped(served.model.layer.in_proj)
    served.model.layer.in_proj = layer
    layer.lora_a_stacked = tuple(torch.zeros(2, 1, ROOM, INPUTS) for _ in SIZES)
    layer.lora_b_stacked = tuple(torch.zeros(2, 1, size, ROOM) for size in SIZES)
    name = "model.layer.in_proj"
    manager = SimpleNamespace(
        modules={name: layer}, lora_index_to_id=[None, 7], get_adapter=lambda _: SimpleNamespace(loras=[name])
    )
    runner = SimpleNamespace(get_model=lambda: served, lora_manager=SimpleNamespace(_adapter_manager=manager))
    worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
    config = SimpleNamespace(lora_config=SimpleNamespace(lora_dtype="float32"))
    executor = SimpleNamespace(driver_worker=worker)
    return SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor, vllm_config=config)), layer


Loaded = tuple[SlotProver, AdapterVersion, AdapterFile, Binding, Any, ServingForm]


@pytest.fixture(params=[["in_qkv", "in_z"], ["in_qkv"], ["in_z"]], ids="+".join)
def loaded(request: pytest.FixtureRequest, shm_dir: Path) -> Iterator[Loaded]:
    """An adapter of these layers, in its slot."""
    trained = get_peft_model(Trained(), LoraConfig(r=RANK, target_modules=request.param))  # type: ignore[arg-type]
    torch.manual_seed(0)
    for parameter in trained.parameters():
        nn.init.normal_(parameter)
    form = ServingForm(trained, "default", torch.float32)
    llm, layer = engine()
    with AdapterStore(shm_dir / "store") as store:
        version = store.publish(form.files(), step=0)
        file, prover = open_adapter(version), SlotProver(llm)
        binding = prover.bind(version, file)
        binding.slot(SLOT).write(file, binding.tensors(file, None))
        yield prover, version, file, binding, layer, form


def test_every_slice_gets_its_a_and_its_rows_of_b(loaded: Loaded) -> None:
    prover, version, file, binding, layer, form = loaded
    assert prover.prove(version, file, 7) == len(file.payload)
    own = {module.path.rpartition(".")[2]: module for module in form.modules}
    rows = {"in_qkv": [(0, 0, 2), (1, 2, 4), (2, 4, 8)], "in_z": [(3, 0, 4)]}
    filled = [(index, own[leaf], first, end) for leaf in own for index, first, end in rows[leaf]]
    for index, module, first, end in filled:
        assert torch.equal(layer.lora_a_stacked[index][SLOT, 0, :RANK], module.a_RI)
        assert torch.equal(layer.lora_b_stacked[index][SLOT, 0, :, :RANK], module.scaling * module.b_OR[first:end])
    assert sum(stack[SLOT].count_nonzero() for stack in layer.lora_b_stacked) == sum(
        module.b_OR.numel() for module in form.modules
    )
    assert not any(stack[0].any() for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked))
    (members,) = binding.modules.values()
    given: Any = [pair and [part.read(file) for part in pair] for pair in members]
    assert [index for index, pair in enumerate(given) if pair] == sorted(index for index, *_ in filled)
    for index, module, first, end in filled:
        assert torch.equal(given[index][0], module.a_RI)
        assert torch.equal(given[index][1], module.scaling * module.b_OR[first:end])


def test_what_the_trainer_holds_is_cut_alike(loaded: Loaded) -> None:
    _, _, file, binding, _, form = loaded
    for cut, tensor in zip(binding.tensors(file, form.held), binding.tensors(file, None), strict=True):
        assert torch.equal(cut, tensor)


@pytest.mark.parametrize("change", [lambda value: 0, lambda value: value / 2, lambda value: value + 1])
def test_any_value_of_any_slice_that_is_wrong_is_refused(loaded: Loaded, change: Callable[[Any], Any]) -> None:
    """Of those, too, that only repeat another slice's, and of what must stay empty."""
    prover, version, file, _, layer, _ = loaded
    for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked):
        flat = stack[SLOT].view(-1)
        for element in range(len(flat)):
            before = flat[element].clone()
            flat[element] = change(before)
            if not torch.equal(flat[element], before):
                with pytest.raises(DeliveryError):
                    prover.prove(version, file, 7)
            flat[element] = before
    prover.prove(version, file, 7)


def test_two_tensors_for_one_slice_are_refused(shm_dir: Path) -> None:
    base: Any = Trained()
    base.model.layer.in_proj = nn.Linear(INPUTS, sum(SIZES))
    form = ServingForm(
        get_peft_model(base, LoraConfig(r=RANK, target_modules=["in_z", "in_proj"])), "default", torch.float32
    )
    with AdapterStore(shm_dir / "store") as store:
        version = store.publish(form.files(), step=0)
        with pytest.raises(DeliveryError, match=r"in_proj.* and .*in_z.* fill the same slice"):
            SlotProver(engine()[0]).bind(version, open_adapter(version))
