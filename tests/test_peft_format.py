"""The two published files: the trainer's function through PEFT and stock vLLM, the same bytes under any wrapper."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load, load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lora_grpo.adapters.peft_form.export import RECIPE_FILE, Recipe, export_adapter
from lora_grpo.adapters.peft_form.files import open_adapter
from lora_grpo.adapters.peft_form.modules import lora_modules, peft_model_of
from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import CONFIG_FILE, WEIGHTS_FILE, AdapterVersion
from lora_grpo.errors import DeliveryError, StoreError, TrainingError, UnsupportedAdapter
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.sync import NativeSync
from tests.store_files import digest_of
from tests.tiny_models import load_model, refill_lora, tiny_lora

ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {"r": 8},
    "attention": {"r": 4, "targets": "attention"},
    "rslora": {"r": 16, "use_rslora": True, "lora_alpha": 8, "rank_pattern": {"o_proj": 8}},
    "patterns": {
        "r": 8,
        "rank_pattern": {"q_proj": 16, "layers.1.mlp.down_proj": 4, "k_proj": 12},
        "alpha_pattern": {"v_proj": 64, "layers.0.mlp.up_proj": 2},
    },
    "layers": {"r": 8, "targets": ["q_proj", "down_proj"], "layers_to_transform": [1], "lora_alpha": 64},
}
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
SEQUENCES = torch.randint(4, 260, (3, 24), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture
def process_group() -> Iterator[dist.ProcessGroup]:
    """A group of this process alone; vLLM may have made the process's default group before."""
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group([0], backend="gloo")
    if own:
        dist.destroy_process_group()


def payload(form: ServingForm) -> dict[str, bytes]:
    return {name: b"".join(buffers) for name, buffers in form.files().items()}


def write(form: ServingForm, folder: Path) -> AdapterVersion:
    folder.mkdir(parents=True)
    for name, content in payload(form).items():
        (folder / name).write_bytes(content)
    return AdapterVersion(1, None, folder, digest_of(folder), 0, 0.0)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(torch.tensor(SEQUENCES)).logits.float()


def lora_parameter(model: nn.Module, name: str) -> nn.Parameter:
    return next(parameter for found, parameter in model.named_parameters() if name in found)


# What PEFT and vLLM make of the files


@pytest.mark.parametrize("name", ADAPTERS)
def test_compiled_or_not_the_bytes_are_the_same(name: str, llama_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lora(load_model(llama_dir), **ADAPTERS[name])
    form = ServingForm(model, "default", torch.bfloat16)
    assert form._cast.takes([linear.weight for linear in form._linears])
    compiled = payload(form)
    monkeypatch.setattr("lora_grpo.kernels.library", lambda: None)
    assert payload(ServingForm(model, "default", torch.bfloat16)) == compiled


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft_loads_the_trainers_function(llama_dir: Path, tmp_path: Path, kind: str) -> None:
    base, model = logits(load_model(llama_dir)), tiny_lora(load_model(llama_dir), **ADAPTERS[kind])
    trainer = logits(model)
    assert (trainer - base).abs().mean() > 0.1
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 0.06)):
        write(ServingForm(model, "default", dtype), tmp_path / str(dtype))
        served = PeftModel.from_pretrained(load_model(llama_dir), tmp_path / str(dtype))
        assert {module.scaling for module in lora_modules(served, "default")} == {1.0}
        torch.testing.assert_close(logits(served), trainer, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_names_shapes_and_values_are_those_of_save_pretrained(llama_dir: Path, tmp_path: Path, kind: str) -> None:
    model = tiny_lora(load_model(llama_dir), **ADAPTERS[kind])
    model.save_pretrained(tmp_path / "peft")
    theirs = load_file(tmp_path / "peft" / WEIGHTS_FILE)
    form = ServingForm(model, "default", torch.float32)
    ours = load(payload(form)[WEIGHTS_FILE])
    scaling = {module.path: module.scaling for module in form.modules}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        path, _, matrix = name.removeprefix("base_model.model.").rpartition(".lora_")
        assert torch.equal(ours[name], tensor * (scaling[path] if matrix == "B.weight" else 1.0))
    assert form.nbytes == sum(tensor.nbytes for tensor in ours.values())


def test_the_config_names_each_module_at_its_rank(llama_dir: Path) -> None:
    model = tiny_lora(load_model(llama_dir), **ADAPTERS["patterns"])
    config = json.loads(payload(ServingForm(model, "default", torch.bfloat16))[CONFIG_FILE])
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (16, 16, False)
    assert set(config["target_modules"]) == {module.path for module in lora_modules(model, "default")}
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"][r"model\.layers\.1\.mlp\.down_proj"] == 4
    assert r"model\.layers\.0\.self_attn\.q_proj" not in config["rank_pattern"]


def test_only_the_adapter_is_in_the_file(llama_dir: Path) -> None:
    model = tiny_lora(load_model(llama_dir), r=8)
    tensors = load(payload(ServingForm(model, "default", torch.bfloat16))[WEIGHTS_FILE])
    assert len(tensors) == 2 * 7 * 2
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.vllm
def test_stock_vllm_loads_the_published_and_the_exported_folder(
    llama_engine: Any, llama_dir: Path, shm_dir: Path, tmp_path: Path
) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    model = tiny_lora(load_model(llama_dir), scale=0.2, **ADAPTERS["rslora"])
    form = ServingForm(model, "default", torch.bfloat16)
    version = write(form, tmp_path / "versions" / "000001")
    with AdapterStore(shm_dir / "store") as store:
        recipe = Recipe.of(model, "default", form.modules)
        export_adapter(store, store.publish(form.files(), step=0), recipe, tmp_path / "exported")
    llm, params = llama_engine._llm, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": ids} for ids in SEQUENCES]
    trainer = teacher_logprobs(model, SEQUENCES)
    noise = mean_abs_difference(
        llama_engine.logprobs(SEQUENCES, adapter=None), teacher_logprobs(load_model(llama_dir), SEQUENCES)
    )
    for lora_id, folder in enumerate((version.path, tmp_path / "exported"), start=900):
        request = LoRARequest(f"stock-{lora_id}", lora_id, str(folder))
        outputs = llm.generate(prompts, params, lora_request=request, use_tqdm=False)
        llm.llm_engine.remove_lora(lora_id)
        served = [
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, SEQUENCES, strict=True)
        ]
        assert mean_abs_difference(served, trainer) < 3 * noise
        assert mean_abs_difference(llama_engine.logprobs(SEQUENCES, adapter=None), trainer) > 20 * noise


# Wrappers


def ddp(model: PeftModel, group: dist.ProcessGroup) -> nn.Module:
    return DistributedDataParallel(model, process_group=group)


def compiled(model: PeftModel, group: dist.ProcessGroup) -> Any:
    return torch.compile(model)


def compiled_ddp(model: PeftModel, group: dist.ProcessGroup) -> Any:
    return torch.compile(DistributedDataParallel(torch.compile(model), process_group=group))


def compiled_layers(model: PeftModel, group: dist.ProcessGroup) -> nn.Module:
    layers = model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer)
    return model


def checkpoint_wrapped_layers(model: PeftModel, group: dist.ProcessGroup) -> nn.Module:
    layers = model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    return model


def gradient_checkpointing(model: PeftModel, group: dist.ProcessGroup) -> nn.Module:
    model.gradient_checkpointing_enable()
    return model.train()


def fsdp2(model: PeftModel, group: dist.ProcessGroup) -> nn.Module:
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: list[Callable[[PeftModel, dist.ProcessGroup], Any]] = [
    ddp,
    compiled,
    compiled_ddp,
    compiled_layers,
    checkpoint_wrapped_layers,
    gradient_checkpointing,
    fsdp2,
]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_wrappers_leave_no_trace_in_the_bytes(
    llama_dir: Path, process_group: dist.ProcessGroup, wrap: Callable[[PeftModel, dist.ProcessGroup], Any]
) -> None:
    settings = ADAPTERS["patterns"]
    plain = payload(ServingForm(tiny_lora(load_model(llama_dir), **settings), "default", torch.bfloat16))
    wrapped = wrap(tiny_lora(load_model(llama_dir), **settings), process_group)
    if wrap is fsdp2:
        assert isinstance(lora_parameter(wrapped, "lora_A"), DTensor)
    assert payload(ServingForm(wrapped, "default", torch.bfloat16)) == plain


def test_the_adapters_own_name_leaves_no_trace(llama_dir: Path) -> None:
    """And a second adapter beside it, not active, is not published."""
    model = tiny_lora(load_model(llama_dir), r=8)
    plain = payload(ServingForm(model, "default", torch.bfloat16))
    model.add_adapter("policy", model.peft_config["default"])
    with torch.no_grad():
        for module in lora_modules(model, "policy"):
            module.a_RI.copy_(module.layer.lora_A["default"].weight)
            module.b_OR.copy_(module.layer.lora_B["default"].weight)
    model.set_adapter("policy")
    refill_lora_of(model, "default")
    assert payload(ServingForm(model, "policy", torch.bfloat16)) == plain


@torch.no_grad()
def refill_lora_of(model: nn.Module, adapter: str) -> None:
    for module in lora_modules(model, adapter):
        module.b_OR.fill_(7.0)


@pytest.mark.vllm
@pytest.mark.parametrize("wrap", [ddp, checkpoint_wrapped_layers, fsdp2], ids=lambda wrap: wrap.__name__)
def test_wrapped_models_are_pushed_and_proven(
    llama_engine: Any,
    llama_dir: Path,
    shm_dir: Path,
    process_group: dist.ProcessGroup,
    wrap: Callable[[PeftModel, dist.ProcessGroup], Any],
) -> None:
    """The probe writes into the live parameters, which are sharded under FSDP2, and puts them back."""
    model = wrap(tiny_lora(load_model(llama_dir), r=8), process_group)
    plain = payload(ServingForm(tiny_lora(load_model(llama_dir), r=8), "default", torch.bfloat16))
    with AdapterStore(shm_dir / "store") as store:
        sync = NativeSync(model, llama_engine, store)
        version = sync.push(step=0)
        assert (version.path / WEIGHTS_FILE).read_bytes() == plain[WEIGHTS_FILE]
        trainer = teacher_logprobs(model, SEQUENCES)
        assert mean_abs_difference(llama_engine.logprobs(SEQUENCES, adapter=version), trainer) < 0.05
        llama_engine.unload(version)


def test_a_model_without_an_adapter(llama_dir: Path) -> None:
    with pytest.raises(UnsupportedAdapter, match=r"LlamaForCausalLM holds no PEFT adapter; wrap it with"):
        peft_model_of(load_model(llama_dir))
    with pytest.raises(UnsupportedAdapter, match="adapter 'other' adapts no linear layer"):
        ServingForm(tiny_lora(load_model(llama_dir)), "other", torch.bfloat16)
    with pytest.raises(UnsupportedAdapter, match=r"torch\.float64 has no serving form"):
        ServingForm(tiny_lora(load_model(llama_dir)), "default", torch.float64)


# Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("matrix", ["A", "B"])
def test_non_finite_values_do_not_leave(llama_dir: Path, dtype: torch.dtype, value: float, matrix: str) -> None:
    model = tiny_lora(load_model(llama_dir), r=8)
    form = ServingForm(model, "default", dtype)
    parameter = lora_parameter(model, f"layers.0.self_attn.q_proj.lora_{matrix}")
    sound = parameter.detach().clone()
    with torch.no_grad():
        parameter[3, 2] = value
    with pytest.raises(TrainingError, match=rf"{Q0.format(matrix)} holds non-finite values in {dtype}"):
        form.files()
    with torch.no_grad():
        parameter.copy_(sound)
    form.files()


def test_what_overflows_in_the_serving_dtype_does_not_leave(llama_dir: Path) -> None:
    """40,000 fits float16, and no longer with the scaling of 2 folded in; bfloat16 has the room."""
    model = tiny_lora(load_model(llama_dir), r=8, lora_alpha=16)
    with torch.no_grad():
        lora_parameter(model, "layers.0.self_attn.q_proj.lora_B")[0, 0] = 4e4
    with pytest.raises(TrainingError, match=rf"{Q0.format('B')} holds non-finite values in torch\.float16"):
        ServingForm(model, "default", torch.float16).files()
    tensors = load(payload(ServingForm(model, "default", torch.bfloat16))[WEIGHTS_FILE])
    assert tensors[Q0.format("B")][0, 0].item() == pytest.approx(8e4, rel=0.01)


def test_scaling_is_folded_in_before_the_cast(llama_dir: Path) -> None:
    """bf16(s * b), one rounding; s * bf16(b) in bf16 would be two."""
    model = tiny_lora(load_model(llama_dir), r=8, lora_alpha=11.0)
    tensors = load(payload(ServingForm(model, "default", torch.bfloat16))[WEIGHTS_FILE])
    b = lora_parameter(model, "layers.0.self_attn.q_proj.lora_B").detach()
    assert torch.equal(tensors[Q0.format("B")], (b * (11 / 8)).bfloat16())
    assert not torch.equal(tensors[Q0.format("B")], b.bfloat16() * (11 / 8))


@pytest.mark.parametrize("alpha", [1, 4, 8, 16, 64, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaling_gives_the_bits_of_fp32_scaled_and_rounded_once(
    llama_dir: Path, dtype: torch.dtype, alpha: int
) -> None:
    model = tiny_lora(load_model(llama_dir), r=8, lora_alpha=alpha)
    b = lora_parameter(model, "layers.0.self_attn.q_proj.lora_B")
    with torch.no_grad():
        # Over all magnitudes at which B and its bits live, float16's subnormals among them.
        b.mul_(torch.logspace(-7, 3, b.numel()).view_as(b))
    tensors = load(payload(ServingForm(model, "default", dtype))[WEIGHTS_FILE])
    assert torch.equal(tensors[Q0.format("B")], (b.detach() * (alpha / 8)).to(dtype))


def test_files_follow_the_weights_step_after_step(llama_dir: Path) -> None:
    model = tiny_lora(load_model(llama_dir), r=8)
    form = ServingForm(model, "default", torch.bfloat16)
    first = payload(form)
    refill_lora(model, seed=5)
    second = payload(form)
    assert second[WEIGHTS_FILE] == payload(ServingForm(model, "default", torch.bfloat16))[WEIGHTS_FILE]
    assert second[WEIGHTS_FILE] != first[WEIGHTS_FILE]
    assert second[CONFIG_FILE] == first[CONFIG_FILE]
    refill_lora(model, seed=0)
    assert payload(form) == first


def test_an_adapter_that_was_made_anew_is_not_published_as_it_was(llama_dir: Path) -> None:
    model = tiny_lora(load_model(llama_dir), r=8)
    config = model.peft_config["default"]
    form = ServingForm(model, "default", torch.bfloat16)
    form.files()
    model.add_adapter("other", config)
    form.files()
    model.delete_adapter("default")
    with pytest.raises(TrainingError, match=r"'default' was deleted or made anew.*build a new NativeSync"):
        form.files()
    model.add_adapter("default", config)
    with pytest.raises(TrainingError, match="'default' was deleted or made anew"):
        form.files()
    model.set_adapter("default")
    assert payload(ServingForm(model, "default", torch.bfloat16))[WEIGHTS_FILE]


def test_from_a_device_everything_crosses_in_one_copy_to_a_buffer_that_stays(
    llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where the host's buffer is another one than the device's, and pinned."""
    model = tiny_lora(load_model(llama_dir), r=8)
    own, form = (ServingForm(model, "default", torch.bfloat16) for _ in range(2))
    form._host = torch.empty_like(form._flat)
    crossings: list[int] = []
    stock = torch.Tensor.copy_

    def copy_(self: torch.Tensor, source: torch.Tensor, *args: Any) -> torch.Tensor:
        if self is form._host:
            crossings.append(source.nbytes)
        return stock(self, source, *args)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    places = set()
    for seed in range(2):
        refill_lora(model, seed=seed)
        assert payload(form) == payload(own)
        places.add(torch.frombuffer(form.files()[WEIGHTS_FILE][1], dtype=torch.uint8).data_ptr())
    assert places == {form._host.data_ptr()}
    assert crossings == [form.nbytes] * 4


def test_publishing_leaves_the_model_as_it_is(llama_dir: Path) -> None:
    model = tiny_lora(load_model(llama_dir), r=8, lora_alpha=32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ServingForm(model, "default", torch.bfloat16).files()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_weights_that_the_model_replaces_are_not_kept(llama_dir: Path) -> None:
    model = tiny_lora(load_model(llama_dir), r=8)
    form = ServingForm(model, "default", torch.bfloat16)
    norm = model.base_model.model.model.norm
    replaced = weakref.ref(norm.weight)
    norm.weight = nn.Parameter(norm.weight.detach().clone(), requires_grad=False)
    assert replaced() is None
    assert payload(form)


# Export


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_exported_adapter_has_its_own_alpha_and_the_same_function(
    llama_dir: Path, shm_dir: Path, tmp_path: Path, kind: str
) -> None:
    model = tiny_lora(load_model(llama_dir), **ADAPTERS[kind])
    form = ServingForm(model, "default", torch.float32)
    Recipe.of(model, "default", form.modules).write(tmp_path / RECIPE_FILE)
    with AdapterStore(shm_dir / "store") as store:
        version, recipe = store.publish(form.files(), step=0), Recipe.read(tmp_path)
        assert export_adapter(store, version, recipe, tmp_path / "out") == "rounded"
        with pytest.raises(StoreError, match="already holds an adapter"):
            export_adapter(store, version, recipe, tmp_path / "out")
    again = PeftModel.from_pretrained(load_model(llama_dir), tmp_path / "out", is_trainable=True).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=2e-5)
    for ours, theirs in zip(lora_modules(again, "default"), lora_modules(model, "default"), strict=True):
        assert ours.scaling == theirs.scaling
        assert torch.equal(ours.a_RI, theirs.a_RI)
        torch.testing.assert_close(ours.b_OR, theirs.b_OR, rtol=1e-6, atol=0)
    config = again.peft_config["default"]
    assert (config.r, config.lora_alpha) == (ADAPTERS[kind]["r"], model.peft_config["default"].lora_alpha)


# Reading back


def test_a_tensor_that_is_no_matrix_is_refused_by_name(llama_dir: Path, tmp_path: Path) -> None:
    version = write(ServingForm(tiny_lora(load_model(llama_dir)), "default", torch.bfloat16), tmp_path / "v")
    tensors = load_file(version.path / WEIGHTS_FILE)
    save_file({**tensors, Q0.format("B"): tensors[Q0.format("B")].flatten()}, version.path / WEIGHTS_FILE)
    with pytest.raises(DeliveryError, match=r"q_proj\.lora_B\.weight' has shape \(512,\); A and B are matrices"):
        open_adapter(version)
