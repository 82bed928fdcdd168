"""Bases in fewer bits: delivered, trained, brought back and exported; and refused where no pair is proven."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_grpo.adapters.peft_form.checks import NF4, check_trainable, scheme_of
from lora_grpo.adapters.peft_form.modules import plain_values
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.config import EngineConfig, ModelConfig
from lora_grpo.engines import packing
from lora_grpo.engines.delivery.agreement import match_base
from lora_grpo.engines.local import targets
from lora_grpo.engines.local.targets import served_scheme
from lora_grpo.engines.server.engine import VLLMServerEngine
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError, UnsupportedAdapter
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.grpo.processes import Processes
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.sync import NativeSync
from lora_grpo.trainer import GRPOTrainer
from lora_grpo.trainer.memory import LargestBatch, estimate_memory
from lora_grpo.trainer.models import load_base, without_memory
from lora_grpo.trainer.room import Wanted, estimate, plan_room
from lora_grpo.types import Sampling
from tests.conftest import ENGINE_ARGS
from tests.families import build, trainer_model
from tests.model_table import Finding, adapted, deliver, examine
from tests.quantized import WEIGHTS, to_fp8, to_int4
from tests.test_uses import serving
from tests.tiny_models import load_model, refill_lora, tiny_lora, tiny_model
from tests.tiny_trainer import CONFIG, ROWS, same, share_of_low_bytes, weights

CPU = torch.device("cpu")
ROW = LargestBatch(1, 4, 4)
SEQUENCES = [list(range(4, 34)), list(range(60, 90))]


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama in nf4", tmp_path_factory.mktemp("plain") / "llama")


@pytest.fixture(scope="module")
def nf4_engine(plain_dir: Path) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(plain_dir, max_lora_rank=8, quantization="nf4", **ENGINE_ARGS)
    yield engine
    engine.close()


@pytest.mark.vllm
def test_nf4_is_delivered_with_every_control(nf4_engine: VLLMEngine, plain_dir: Path, shm_dir: Path) -> None:
    finding = Finding("nf4")
    with AdapterStore(shm_dir / "store") as store:
        model = adapted("llama in nf4", plain_dir)
        match = match_base(nf4_engine, model, Processes(None))
        deliver(finding, model, nf4_engine, store, shm_dir)
    assert (match.compared, match.quantized, match.share, match.unread) == (match.tensors, 14, 1.0, {})
    assert "(14 quantized ones by their values)" in str(match)
    assert finding.missed == []
    assert finding.gap < finding.signal / 3
    unquantized = teacher_logprobs(load_model(plain_dir), SEQUENCES)
    assert mean_abs_difference(nf4_engine.logprobs(SEQUENCES, adapter=None), unquantized) > 5 * finding.noise


@pytest.mark.vllm
def test_fp8_blocks_are_delivered_with_every_control(llama_engine: VLLMEngine, tmp_path: Path, shm_dir: Path) -> None:
    finding = examine("llama in fp8 blocks", tmp_path, shm_dir)
    assert (finding.state, finding.missed) == ("works", [])
    assert finding.gap < finding.signal / 3


@pytest.mark.vllm
def test_another_scheme_on_one_side_is_refused_before_training(
    nf4_engine: VLLMEngine, plain_dir: Path, shm_dir: Path
) -> None:
    once = {**NF4, "bnb_4bit_use_double_quant": False}
    single: Any = AutoModelForCausalLM.from_pretrained(plain_dir, quantization_config=BitsAndBytesConfig(**once))
    with AdapterStore(shm_dir / "store") as store:
        with pytest.raises(UnsupportedAdapter, match=r"bnb_4bit_use_double_quant=False, and True is proven"):
            NativeSync(tiny_lora(single), nf4_engine, store)
        single.config.quantization_config.bnb_4bit_use_double_quant = True
        with pytest.raises(UnsupportedAdapter, match=r"q_proj\.weight stands for other values.*\(quantized\).*scheme"):
            NativeSync(tiny_lora(single), nf4_engine, store)
        with pytest.raises(UnsupportedAdapter, match=r"engine \(quantized\) than in the trainer \(plain\)"):
            NativeSync(tiny_lora(load_model(plain_dir)), nf4_engine, store)


@pytest.mark.vllm
def test_nf4_trains_comes_back_resumes_and_is_exported(
    nf4_engine: VLLMEngine, plain_dir: Path, shm_dir: Path, tmp_path: Path
) -> None:
    def trainer(steps: int, run: str = "run") -> GRPOTrainer:
        return GRPOTrainer(
            ModelConfig(name=str(plain_dir), dtype="float32", quantization="nf4"),
            share_of_low_bytes,
            CONFIG.replace(total_steps=steps, lr_scheduler_type="constant"),
            ROWS,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            engine=nf4_engine,
            run_dir=tmp_path / run,
            store_root=shm_dir / run,
            view=False,
        )

    with trainer(4, "straight") as straight:
        straight.train()
        end = weights(straight)
    with trainer(2) as first:
        first.train()
        assert all("lora" in name for name, p in first.model.named_parameters() if p.requires_grad)
    with trainer(4) as second:
        report = second.resume()
        assert report is not None
        assert report.weights == "exact"
        second.train()
        assert same(weights(second), end)
        back = second.rollback(to=report.version.number)
        assert (back.weights, back.optimizer) == ("exact", "restored")
        assert second.sync.export(second.version, tmp_path / "exported") == "exact"
        held = weights(second)
    loaded = PeftModel.from_pretrained(load_model(plain_dir), str(tmp_path / "exported"))
    own = {name: p for name, p in loaded.named_parameters() if ".lora_" in name}
    assert len(own) == len(held) > 0
    assert all(torch.equal(own[name], held[name]) for name in held)


@pytest.mark.vllm
def test_trls_trainer_on_nf4(plain_dir: Path, tmp_path: Path) -> None:
    """With TRL's own way to ask for it; the engine follows. Its first update finds a gradient for every layer."""
    pytest.importorskip("trl")
    from tests.test_trl_native import LORA, arguments, native_trainer

    kwargs = {"dtype": "float32", "quantization_config": BitsAndBytesConfig(**NF4)}
    args = arguments(tmp_path, max_steps=4, model_init_kwargs=kwargs, eval_strategy="no")
    trainer = native_trainer(str(plain_dir), args, peft_config=LoraConfig(**LORA))
    try:
        trainer.train()
        match = trainer.native.sync.base_match
        assert match is not None
        assert match.quantized == 14
        assert [version.step for version in trainer.native.store.list()] == [0, 2, 4]
        trainer.rollback(to=1)
        assert trainer.native.sync.head.number == 1
    finally:
        trainer.close()


@pytest.mark.vllm
def test_a_server_in_nf4_is_proven_from_outside(plain_dir: Path, shm_dir: Path) -> None:
    """As `lora-grpo serve` starts it; its workers read what their bits stand for, and another scheme shows."""
    with serving(plain_dir, options=["--quantization", "nf4"]) as url, AdapterStore(shm_dir / "store") as store:
        engine = VLLMServerEngine([url])
        sync = NativeSync(adapted("llama in nf4", plain_dir), engine, store)
        match = sync.base_match
        assert match is not None
        assert (match.compared, match.quantized, match.share, match.unread) == (match.tensors, 14, 1.0, {})
        refill_lora(sync.model, seed=1)  # type: ignore[arg-type]
        sync.push(0)
        assert sync.canary(engine.generate(["a b "], Sampling(n=4, max_tokens=8), adapter=sync.head)).verdict == "ok"
        with pytest.raises(UnsupportedAdapter, match=rf"{url} .*\(quantized\) than in the trainer \(plain\)"):
            NativeSync(tiny_lora(load_model(plain_dir)), engine, store)
        sync.close()
        engine.close()


REFUSED = {
    "AWQ": ({"quant_method": "awq", "bits": 4}, "by awq: trainer and engine are proven .*nf4, fp8 and W4A16.*'nf4'"),
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, "by gptq: trainer and engine are proven"),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "by bitsandbytes: load_in_4bit=None, and True"),
    "fp4": ({"quant_method": "bitsandbytes", **NF4, "bnb_4bit_quant_type": "fp4"}, "quant_type='fp4', and 'nf4'"),
    "per tensor": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, r"weight_block_size=None, and \[128, 128"),
    "blocks of 64": ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\], and"),
    "static": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
        "activation_scheme='static', and 'dynamic' is proven",
    ),
    "W8A8": (
        {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}},
        r"format='int-quantized', and packed int4 weights with plain activations \(W4A16\) are proven",
    ),
    "W4A8": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"all": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}},
        },
        "its activations are quantized too, which cuts the trainer's gradients",
    ),
    "zero points": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"all": {"weights": {"num_bits": 4, "type": "int", "symmetric": False}}},
        },
        "weights: symmetric=False, and True is proven",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_proven_is_refused_by_name(what: str) -> None:
    settings, message = REFUSED[what]
    with pytest.raises(UnsupportedAdapter, match=message):
        scheme_of(SimpleNamespace(quantization_config=settings))


def test_a_run_is_refused_before_its_engine_starts(
    plain_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = LoraConfig(r=8, target_modules="all-linear")
    blocks = ModelConfig(name=str(build("llama in fp8 blocks", tmp_path)))
    wanted = [Wanted(lora, GRPOConfig(), 4)]
    with pytest.raises(ConfigError, match="share_base_weights=True: quantized weights cannot be"):
        plan_room(blocks, wanted, EngineConfig(max_model_len=64), True, 1)
    with pytest.raises(ConfigError, match=r"quantization='nf4': .* is fp8 already; leave it out"):
        plan_room(blocks.replace(quantization="nf4"), wanted, EngineConfig(max_model_len=64), False, 1)
    with pytest.raises(ConfigError, match=r"quantization='fp8' is not proven .* set 'nf4'"):
        VLLMEngine(plain_dir, quantization="fp8")
    with pytest.raises(ConfigError, match=r"vLLM quantizes the experts of .* too, and transformers does not; leave"):
        served_scheme(build("qwen3_moe", tmp_path / "mixture"), "nf4")
    config = json.loads((plain_dir / "config.json").read_text())
    already = {**config, "quantization_config": {"quant_method": "bitsandbytes", **NF4}}
    (tmp_path / "already").mkdir()
    (tmp_path / "already" / "config.json").write_text(json.dumps(already))
    with pytest.raises(ConfigError, match=r"is in nf4 already, .* name the unquantized checkpoint, with quantiz"):
        served_scheme(tmp_path / "already", None)
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes and vllm_bnb_plugin: pip install 'lora-grpo\[quant"):
        served_scheme(plain_dir, "nf4")


def test_a_base_that_cuts_gradients_is_refused(plain_dir: Path) -> None:
    """fp8 as transformers would compute with it, and nf4 that bitsandbytes has packed for inference."""
    blocks = SimpleNamespace(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(UnsupportedAdapter, match=r"in fp8, .*load it with .*FineGrainedFP8Config\(dequantize=True\)"):
        check_trainable(SimpleNamespace(config=blocks))
    base = trainer_model("llama in nf4", plain_dir)
    layer: Any = base.model.layers[0].mlp.up_proj
    assert layer.support_avx512bf16_for_cpu is False
    check_trainable(base)
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UnsupportedAdapter, match=r"layers\.0\.mlp\.up_proj: bitsandbytes has packed it for inference"):
        check_trainable(base)


def test_both_sides_read_the_same_values_in_a_checkpoint(tmp_path: Path) -> None:
    """What transformers makes of quantized tensors, and what ours makes of them as vLLM has loaded them."""
    for rewrite, kept in ((to_fp8, "weight"), (to_int4, "weight_packed")):
        folder = rewrite(tiny_model("llama", tmp_path / kept, hidden=256))
        base = load_base(ModelConfig(name=str(folder), dtype="bfloat16"), CPU)
        tensors = load_file(folder / WEIGHTS)
        name = "model.layers.1.mlp.down_proj"
        layer = SimpleNamespace(weight_block_size=[128, 128], **{kept: tensors[f"{name}.{kept}"]})
        for scale in ("weight_scale", "weight_scale_inv"):
            if f"{name}.{scale}" in tensors:
                setattr(layer, scale, tensors[f"{name}.{scale}"])
        values = packing.quantized_values(layer)
        assert values is not None
        assert torch.equal(values.bfloat16(), plain_values(base.get_submodule(name).weight))


def test_the_memory_of_quantized_layers(plain_dir: Path) -> None:
    empty = without_memory(ModelConfig(name=str(plain_dir)), LoraConfig(r=8, target_modules="all-linear"))
    given = (empty.to(torch.bfloat16), ROW, EngineConfig(dtype="bfloat16"), False, False)
    schemes: tuple[Any, ...] = (None, "nf4", "fp8")
    plain, nf4, fp8 = (estimate_memory(*given, scheme) for scheme in schemes)
    linear = sum(p.numel() for name, p in load_model(plain_dir).named_parameters() if "_proj.weight" in name)
    assert plain.engine_base_bytes - nf4.engine_base_bytes == pytest.approx(linear * (2 - 0.5625), abs=1)
    assert plain.trainer_base_bytes - nf4.trainer_base_bytes == pytest.approx(linear * (2 - 0.516), rel=1e-3)
    assert fp8.trainer_base_bytes == plain.trainer_base_bytes
    assert plain.engine_base_bytes - fp8.engine_base_bytes == pytest.approx(linear, rel=1e-3)


def test_the_engine_of_a_model_that_is_given_is_as_large_as_that_of_its_checkpoint(tmp_path: Path) -> None:
    directory = build("llama in fp8 blocks", tmp_path)
    model = adapted("llama in fp8 blocks", directory)
    lora = LoraConfig(r=8, target_modules="all-linear")
    by_name = estimate(ModelConfig(name=str(directory)), lora, EngineConfig(), ROW, False, False)
    assert estimate(model, None, EngineConfig(), ROW, False, False).engine_base_bytes == by_name.engine_base_bytes
