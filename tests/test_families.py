"""Families of models beyond the dense ones, one for each way through the engine; `make models` runs all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from lora_grpo.engines import compat
from lora_grpo.engines.local.targets import check_served, linear_leaves
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.forward import teacher_logprobs
from tests.conftest import ENGINE_ARGS
from tests.families import build, trainer_model
from tests.model_table import CONTROLS, examine

pytestmark = pytest.mark.vllm

PATHS = {
    "quiet logits, one tensor over several slices": "granitemoehybrid",
    "renamed modules": "gpt_oss",
}


@pytest.mark.parametrize("path", PATHS)
def test_delivery_and_every_control(llama_engine: VLLMEngine, path: str, tmp_path: Path, shm_dir: Path) -> None:
    """A wrapper, a class of transformers' own and a mixture of experts are in `test_uses`."""
    assert len(CONTROLS) == 5
    finding = examine(PATHS[path], tmp_path, shm_dir)
    assert finding.state == "works"
    assert finding.missed == []
    assert finding.gap <= 3 * finding.noise
    assert finding.gap < finding.signal / 3


def test_one_tensor_where_vllm_expects_two(llama_engine: VLLMEngine, tmp_path: Path, shm_dir: Path) -> None:
    """By vLLM's own loader, as servers load; it refused the name."""
    finding = examine("glm4", tmp_path, shm_dir, direct_load=False)
    assert (finding.state, finding.missed) == ("works", [])
    assert finding.gap < min(3 * finding.noise, finding.signal / 3)


def test_every_head_is_turned(llama_engine: VLLMEngine) -> None:
    """LFM2 and latent attention give each of a query's heads a row of its own."""
    if not compat.is_cpu():
        pytest.skip("the kernel is the CPU's")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    with set_current_vllm_config(VllmConfig()):
        layer = RotaryEmbedding(32, 32, 64, 10000, True, torch.float32)
    positions, query, key = torch.arange(7), torch.randn(7, 3, 32), torch.randn(7, 2, 32)
    turned = layer.forward_native(positions, query, key)
    for shape in ((7, -1, 32), (7, -1)):
        computed = layer.forward_cpu(positions, query.clone().view(shape), key.clone().view(shape))
        for found, expected in zip(computed, turned, strict=True):
            torch.testing.assert_close(found.view(expected.shape), expected)


def test_a_transformers_class_stays_as_it_was(tmp_path: Path) -> None:
    """vLLM serves OLMo through transformers' class, which the trainer's model is of, whichever of them comes first.

    The engine's own model keeps what vLLM made of that class: on a GPU it is what is compiled and captured.
    """
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

    build("olmo2", tmp_path)
    before = trainer_model("olmo2", tmp_path)
    cls = type(before.base_model)
    as_it_was, sequences = surface(cls), [list(range(10, 30))]
    computed = teacher_logprobs(before, sequences)
    engine = VLLMEngine(tmp_path, max_lora_rank=8, **ENGINE_ARGS)
    try:
        served = compat.runner(engine._llm).get_model().model
        assert isinstance(served, TorchCompileWithNoGuardsWrapper)
        assert isinstance(served, cls)
        assert type(served).forward is not cls.forward
        assert served.do_not_compile
        assert not issubclass(cls, TorchCompileWithNoGuardsWrapper)
    finally:
        engine.close()
    assert surface(cls) == as_it_was
    assert teacher_logprobs(before, sequences) == computed
    assert teacher_logprobs(trainer_model("olmo2", tmp_path), sequences) == computed


def surface(cls: type[nn.Module]) -> tuple[object, ...]:
    return cls.__bases__, cls.__init__, cls.__call__, cls.forward, cls.forward.__code__


@pytest.mark.parametrize("name", ["stablelm", "falcon", "gpt2"])
def test_a_model_without_lora_in_vllm_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    with pytest.raises(ConfigError, match=r"vLLM serves no LoRA on \w+; choose another base$"):
        VLLMEngine(tmp_path, target_modules=["query_key_value", "q_proj", "c_attn"], **ENGINE_ARGS)


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("bert", "BertModel"),
        ("bert", "BertForSequenceClassification"),
        ("llama", "LlamaForSequenceClassification"),
        ("jamba", "JambaForSequenceClassification"),
    ],
)
def test_a_model_that_generates_no_text_is_refused(model_type: str, architecture: str, tmp_path: Path) -> None:
    """By vLLM's class, which may be a language model's with another head, or by name where vLLM has no class."""
    AutoConfig.for_model(model_type, architectures=[architecture]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"vLLM generates no text with {architecture}, .*ForCausalLM"):
        check_served(tmp_path)


def test_a_model_that_vllm_has_no_class_for_is_served_as_transformers_computes_it(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", architectures=["NewForCausalLM"]).save_pretrained(tmp_path)
    assert check_served(tmp_path) == "serves NewForCausalLM with LoRA"


def test_a_package_that_vllms_class_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("qwen3_5_text", tmp_path)
    for known in [name for name in sys.modules if name.partition(".")[0] == "torchvision" or "qwen3_5" in name]:
        if known.startswith(("torchvision", "vllm")):
            monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ConfigError, match=r"vLLM's Qwen3_5ForCausalLM cannot be imported.*torchvision.*install"):
        check_served(tmp_path)


def test_experts_are_refused_by_name(tmp_path: Path) -> None:
    build("qwen3_moe", tmp_path)
    with pytest.raises(ConfigError, match=r"target_modules names 'experts'.*leave it out"):
        VLLMEngine(tmp_path, target_modules=["q_proj", "experts"], **ENGINE_ARGS)


def test_a_wrappers_layers_are_those_of_its_language_model(tmp_path: Path) -> None:
    build("qwen3_vl", tmp_path)
    assert linear_leaves(tmp_path) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_a_model_without_language_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="transformers has no language model for a ViTConfig"):
        linear_leaves(tmp_path)
