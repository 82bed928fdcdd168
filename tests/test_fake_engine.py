"""`FakeEngine`: rewards and loops tested without a model in it, under a real engine's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import Engine, LoadedVersions
from lora_grpo.engines.fake import FakeEngine
from lora_grpo.engines.server.replica import Served
from lora_grpo.errors import ConfigError, EngineError, TrainingError, UnknownVersion
from lora_grpo.sync import NativeSync
from lora_grpo.types import Prompt, Sampling
from tests.tiny_models import CHAT_TEMPLATE, tiny_tokenizer


def version(folder: Path, number: int) -> AdapterVersion:
    path = folder / f"{number:06d}"
    path.mkdir()
    return AdapterVersion(number, None, path, f"{number:032d}", number, 0.0)


def named(prompt: Prompt, adapter: AdapterVersion | None, seed: int) -> str:
    return f"{prompt}|{adapter}|{seed}"


def tiny_peft() -> Any:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules=["q_proj"]))


def test_it_is_an_engine_that_proves_nothing(tmp_path: Path) -> None:
    engine = FakeEngine(named)
    assert isinstance(engine, Engine)
    assert engine.load(version(tmp_path, 1)).proof == engine.proof == "none"


def test_a_load_that_failed_takes_nothing_away(tmp_path: Path) -> None:
    """Of two loads of one version, the second may fail: what the first put into use stays."""
    used: LoadedVersions[Served] = LoadedVersions()
    first, second = (Served(one, [], None) for one in [version(tmp_path, 1)] * 2)
    used.add(first)
    used.remove(second)
    assert used.all() == (first,)
    used.add(second)
    assert used.all() == (second,)
    used.remove(second)
    assert used.versions == ()


def test_replies_are_the_callers_and_stamped(tmp_path: Path) -> None:
    engine, first, second = FakeEngine(named, logprob=-0.5), version(tmp_path, 1), version(tmp_path, 2)
    engine.load(first)
    engine.load(second)
    groups = engine.generate(["a", "b", "c"], Sampling(n=2, seed=7), adapter=[first, None, second])
    assert [[c.version for c in group.completions] for group in groups] == [[1, 1], [None, None], [2, 2]]
    assert [group.prompt for group in groups] == ["a", "b", "c"]
    assert groups[0].completions[0].text.startswith("a|v1|")
    completion = groups[1].completions[1]
    assert completion.text.startswith("b|None|")
    assert completion.token_ids == tuple(completion.text.encode())
    assert completion.logprobs == (-0.5,) * len(completion.token_ids)
    assert completion.finish_reason == "stop"


def test_seeds_are_those_of_a_real_engine(tmp_path: Path) -> None:
    engine = FakeEngine(lambda prompt, adapter, seed: str(seed))

    def texts(seed: int | None, prompts: int = 2) -> list[str]:
        groups = engine.generate(["p"] * prompts, Sampling(n=3, seed=seed), adapter=None)
        return [completion.text for group in groups for completion in group.completions]

    assert texts(1) == texts(1)
    assert len(set(texts(1))) == 6
    assert not set(texts(1)) & set(texts(2))
    assert texts(1, prompts=4)[:6] == texts(1)
    assert texts(None) != texts(None)


def test_long_replies_are_cut() -> None:
    engine = FakeEngine(lambda prompt, adapter, seed: "abcdef")
    cut = engine.generate(["p"], Sampling(max_tokens=4), adapter=None)[0].completions[0]
    assert (cut.text, len(cut.token_ids), len(cut.logprobs), cut.truncated) == ("abcd", 4, 4, True)
    whole = engine.generate(["p"], Sampling(max_tokens=6), adapter=None)[0].completions[0]
    assert (whole.text, whole.truncated) == ("abcdef", False)


def test_replies_end_before_the_first_stop_string() -> None:
    engine = FakeEngine(lambda *_: "one\ntwo;three")
    for stop, text in (((";", "\n"), "one"), (("three",), "one\ntwo;"), (("four",), "one\ntwo;three")):
        [group] = engine.generate(["p"], Sampling(stop=stop), adapter=None)
        [completion] = group.completions
        assert (completion.text, completion.finish_reason) == (text, "stop")
        assert bytes(completion.token_ids).decode() == text


def test_a_tokenizer_of_the_callers() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.chat_template == CHAT_TEMPLATE
    engine = FakeEngine(lambda prompt, adapter, seed: "four", tokenizer=tokenizer)
    chat = [{"role": "user", "content": "2 + 2"}]
    group = engine.generate([chat], Sampling(max_tokens=2), adapter=None)[0]
    assert list(group.prompt_token_ids) == tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert group.completions[0].text == "fo"
    with pytest.raises(ConfigError, match="prompt 0 is a chat, but the tokenizer has no chat template"):
        FakeEngine(named).generate([chat], Sampling(), adapter=None)


def test_versions_must_be_loaded_and_the_least_recently_used_goes(tmp_path: Path) -> None:
    engine = FakeEngine(named, max_cpu_loras=2)
    first, second, third = (version(tmp_path, number) for number in (1, 2, 3))
    with pytest.raises(UnknownVersion, match=r"v1 is not loaded \(loaded: none\); call engine\.load"):
        engine.generate(["p"], Sampling(), adapter=first)
    engine.load(first)
    engine.load(second)
    engine.load(first)
    engine.load(third)
    assert engine.loaded() == (first, third)
    engine.generate(["p"], Sampling(), adapter=first)
    assert engine.loaded() == (third, first)
    with pytest.raises(UnknownVersion, match="v2"):
        engine.logprobs([[1, 2]], adapter=second)
    engine.unload(first)
    with pytest.raises(UnknownVersion, match="v1"):
        engine.unload(first)
    with pytest.raises(TypeError, match="adapter"):
        engine.generate(["p"], Sampling())  # type: ignore[call-arg]
    with pytest.raises(EngineError, match="v9 has no directory"):
        engine.load(AdapterVersion(9, None, tmp_path / "none", "", 0, 0.0))


def test_teacher_forced_log_probs_have_the_right_lengths() -> None:
    assert FakeEngine(named, logprob=-2.0).logprobs([[1, 2, 3], [1]], adapter=None) == [[-2.0, -2.0], []]


def other_adapter(model: Any) -> None:
    model.add_adapter("two", LoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter("two")


@pytest.mark.parametrize(
    ("change", "says", "undo"),
    [
        (
            other_adapter,
            r"computes with \['two'\].*model\.set_adapter\('default'\)",
            lambda m: m.set_adapter("default"),
        ),
        (lambda m: m.merge_adapter(), r"is merged .*model\.unmerge_adapter\(\)", lambda m: m.unmerge_adapter()),
        (
            lambda m: m.base_model.disable_adapter_layers(),
            r"has its adapter disabled: call model\.base_model\.enable_adapter_layers\(\)",
            lambda m: m.base_model.enable_adapter_layers(),
        ),
        (
            lambda m: m.half(),
            r"is in torch\.float16 and was in torch\.float32 .*load the model again in",
            lambda m: m.float(),
        ),
        (
            lambda m: m.base_model.model.model.norm.requires_grad_(True),
            r"\(and 0 more\) would be trained but never published: freeze it with requires_grad_\(False\)",
            lambda m: m.base_model.model.model.norm.requires_grad_(False),
        ),
    ],
    ids=["another adapter", "merged", "disabled", "half", "a norm that trains"],
)
def test_a_push_refuses_a_model_that_is_not_as_it_was_checked(change: Any, says: str, undo: Any, shm_dir: Path) -> None:
    model, engine = tiny_peft(), FakeEngine(named)
    with AdapterStore(shm_dir / "store") as store:
        sync = NativeSync(model, engine, store)
        first = sync.push(step=0)
        change(model)
        with pytest.raises(TrainingError, match=rf"^[\w.]+ {says}.*nothing was published"):
            sync.push(step=1)
        assert (store.head, store.list(), engine.loaded()) == (first, [first], (first,))
        undo(model)
        assert sync.push(step=1).number == 2


@pytest.mark.parametrize("step", ["x", -1, 1.5, None])
def test_a_step_that_is_no_whole_number_is_told(step: Any, shm_dir: Path) -> None:
    with AdapterStore(shm_dir / "store") as store:
        sync = NativeSync(tiny_peft(), FakeEngine(named), store)
        with pytest.raises(ConfigError, match=rf"^step={step!r} must be a whole number, 0 or more$"):
            sync.push(step=step)
        assert (store.list(), store.head) == ([], None)
        assert sync.push(step=torch.tensor(3)).step == 3  # type: ignore[arg-type]


def test_what_is_closed_is_not_gone_on_with(tmp_path: Path, shm_dir: Path) -> None:
    engine = FakeEngine(named)
    with AdapterStore(shm_dir / "store") as store:
        sync = NativeSync(tiny_peft(), engine, store)
        first = sync.push(step=0)
        sync.close()
        for act in (lambda: sync.push(step=1), lambda: sync.rollback(to=first), lambda: sync.adopt(first)):
            with pytest.raises(ConfigError, match="this NativeSync is closed; build a new one"):
                act()
        assert (store.list(), engine.loaded()) == ([first], ())
        sync.close()
        engine.close()
        for ask in (
            lambda: engine.generate(["p"], Sampling(), adapter=None),
            lambda: engine.logprobs([[1, 2]], adapter=None),
            lambda: engine.load(first),
        ):
            with pytest.raises(EngineError, match="this engine is closed; start another"):
                ask()
        engine.close()


def test_a_users_loop_with_native_sync(shm_dir: Path) -> None:
    """The rules of versions are the real ones: a loop that samples from a version it never pushed fails here too."""
    model = tiny_peft()
    solves_from = 3
    engine = FakeEngine(lambda prompt, adapter, seed: "4" if adapter and adapter.number >= solves_from else "5")
    with AdapterStore(shm_dir / "store") as store:
        sync = NativeSync(model, engine, store)
        assert sync.probe is None
        accuracies = []
        for step in range(4):
            groups = engine.generate(["2+2="], Sampling(n=2, seed=step), adapter=sync.push(step=step))
            accuracies.append(sum(completion.text == "4" for completion in groups[0].completions) / 2)
            with torch.no_grad():
                model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.add_(1e-3)
        assert accuracies == [0.0, 0.0, 1.0, 1.0]
        assert sync.last_receipt is not None
        assert sync.last_receipt.load.proof == "none"
        assert len({published.digest for published in store.list()}) == 4
        with pytest.raises(ConfigError, match="FakeEngine proves nothing; a canary needs a real engine"):
            sync.canary(groups)
    engine.close()
    assert engine.loaded() == ()
