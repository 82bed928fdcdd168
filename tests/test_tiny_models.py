"""The models that other tests stand on: real, far from uniform, and visibly changed by their adapters."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from tests.tiny_models import ARCHITECTURES, VOCAB, load_model, refill_lora, tiny_lora, tiny_model, tiny_tokenizer

TEXT = "Hello, world! The quick brown fox jumps over the lazy dog. 0123456789"


@torch.no_grad()
def logprobs(model: PreTrainedModel) -> torch.Tensor:
    """(T, V) next-token log-probs after each token of `TEXT`."""
    ids = tiny_tokenizer()(TEXT, return_tensors="pt").input_ids
    return model(input_ids=ids).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_distributions_are_far_from_uniform_and_from_certain(arch: str, tmp_path: Path) -> None:
    logp_TV = logprobs(load_model(tiny_model(arch, tmp_path)))
    entropy = -(logp_TV.exp() * logp_TV).sum(-1)
    uniform = torch.tensor(float(VOCAB)).log()
    assert 0.3 * uniform < entropy.mean() < 0.85 * uniform
    assert (
        logp_TV.argmax(-1)[:-1] != tiny_tokenizer()(TEXT, return_tensors="pt").input_ids[0, :-1]
    ).float().mean() > 0.5


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_log_probs_depend_on_every_weight(arch: str, tmp_path: Path) -> None:
    """A weight without influence would hide an engine that loads or adapts it wrongly."""
    model = load_model(tiny_model(arch, tmp_path))
    before = logprobs(model)
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):
            continue  # softmax forgets most of a bias that all keys share
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(kept.flatten().roll(1).view_as(kept))
        assert (logprobs(model) - before).abs().mean() > 0.03, name
        with torch.no_grad():
            parameter.copy_(kept)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
def test_adapter_changes_the_policy(arch: str, targets: str, tmp_path: Path) -> None:
    directory = tiny_model(arch, tmp_path)
    before = logprobs(load_model(directory))
    adapted = tiny_lora(load_model(directory, "bfloat16"), targets=targets)
    assert {p.dtype for name, p in adapted.named_parameters() if "lora_" in name} == {torch.float32}
    assert {p.dtype for name, p in adapted.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    adapted = tiny_lora(load_model(directory), targets=targets)
    bf16_noise = (logprobs(load_model(directory, "bfloat16")) - before).abs().mean()
    assert (logprobs(adapted) - before).abs().mean() > 20 * bf16_noise


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first, second, other = (
        (tiny_model("qwen2", tmp_path / name, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == second != other


def test_lora_is_seeded_and_can_be_refilled(tmp_path: Path) -> None:
    directory = tiny_model("llama", tmp_path)
    torch.manual_seed(5)
    first = tiny_lora(load_model(directory), r=4, rank_pattern={"q_proj": 2}, use_rslora=True)
    torch.manual_seed(6)
    second = tiny_lora(load_model(directory), r=4, rank_pattern={"q_proj": 2}, use_rslora=True)
    assert torch.equal(logprobs(first), logprobs(second))
    q_proj = first.base_model.model.model.layers[0].self_attn.q_proj
    assert q_proj.lora_A["default"].weight.shape[0] == 2
    refill_lora(second, seed=1)
    assert not torch.allclose(logprobs(first), logprobs(second), atol=0.1)


def test_tying_is_real(tmp_path: Path) -> None:
    tied = load_model(tiny_model("qwen3", tmp_path / "tied", tie=True, vocab=320))
    free = load_model(tiny_model("gemma", tmp_path / "free", tie=False))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied.lm_head.weight.shape == (320, 64)
    assert not torch.equal(free.lm_head.weight, free.model.embed_tokens.weight)


def test_impossible_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab=100"):
        tiny_model("llama", tmp_path, vocab=100)
    with pytest.raises(ValueError, match="Gemma 2"):
        tiny_model("gemma2", tmp_path, tie=False)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokenizer_of_the_directory(arch: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(arch, tmp_path))
    assert len(tokenizer) == VOCAB
    for text in ("plain", "two\nlines  and\tspaces ", "é ü 你好 🙂", "<|im_start|>"):
        ids = tokenizer(text).input_ids
        assert ids == tiny_tokenizer()(text).input_ids
        assert tokenizer.decode(ids) == text


def test_chat_template() -> None:
    messages = [{"role": "user", "content": "hi"}]
    text = tiny_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
