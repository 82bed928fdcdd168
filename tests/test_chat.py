"""`lora-grpo chat`: the version that is named answers, with what was said before it, and in pieces."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from lora_grpo import AdapterStore, FakeEngine, NativeSync, VLLMEngine
from lora_grpo.cli import app
from lora_grpo.config import DataConfig, ModelConfig, RewardConfig, RunConfig
from lora_grpo.config_file import save_config
from lora_grpo.errors import ConfigError, UnknownVersion
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.trainer import replay
from lora_grpo.trainer.replay import PIECE_TOKENS, conversing
from lora_grpo.types import Sampling
from tests.tiny_models import load_model, refill_lora, tiny_lora

TURN = "<|im_start|>{}\n{}<|im_end|>\n"


def run_of_two(base: Path, run: Path, engine: Any) -> None:
    """A program's run of two versions, of which the first is the better one."""
    model = tiny_lora(load_model(base), r=8)
    with AdapterStore(archive=run) as store:
        sync = NativeSync(model, engine, store)
        for step in (0, 1):
            refill_lora(model, scale=0.3, seed=step)
            store.record(sync.push(step=step), reward=1.0 - step)
        sync.close()


def talk(run: Path, *lines: str, arguments: tuple[str, ...] = ()) -> Any:
    return CliRunner().invoke(app, ["chat", str(run), *arguments], input="".join(f"{line}\n" for line in lines))


@pytest.fixture
def asked(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """A run in tmp_path/run, in a fake engine: what it was asked, as the model sees it, and of which version."""
    seen: list[tuple[int, str]] = []
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)

    def reply(prompt: Any, version: Any, seed: int) -> str:
        text = tokenizer.decode(prompt) if isinstance(prompt, list) else prompt
        question, _, said = text.rpartition("assistant\n")
        if not said:
            seen.append((version.number, question.removesuffix("<|im_start|>")))
        return f"v{version.number} says: naïveté"[len(said) :]

    def engine(*_: Any, **__: Any) -> FakeEngine:
        return FakeEngine(reply, tokenizer=tokenizer)

    run_of_two(llama_dir, tmp_path / "run", engine())
    monkeypatch.setattr(replay, "build_engine", engine)
    return seen


def keep_settings(run: Path, max_completion_length: int) -> None:
    save_config(
        RunConfig(
            output_dir="-",
            model=ModelConfig(name="-"),
            data=DataConfig(train="-", system_prompt="Be brief."),
            rewards=(RewardConfig(name="exact"),),
            grpo=GRPOConfig(max_completion_length=max_completion_length),
        ),
        run,
    )


def test_versions_answer_in_turn_and_hear_what_was_said(asked: list[tuple[int, str]], tmp_path: Path) -> None:
    keep_settings(tmp_path / "run", 64)
    lines = ("one", "/version best", "two", "/version 9", "/verse", "", "/new", "three", "/quit", "no")
    done = talk(tmp_path / "run", *lines)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == ["v2 says: naïveté", "v1 says: naïveté", "v1 says: naïveté"]
    system = TURN.format("system", "Be brief.")
    first = system + TURN.format("user", "one")
    second = first + TURN.format("assistant", "v2 says: naïveté") + TURN.format("user", "two")
    assert asked == [(2, first), (1, second), (1, system + TURN.format("user", "three"))]
    for words in ("v2 is loaded and proven. /version best", "v1 is loaded and proven (", "there is no version 9"):
        assert words in done.stderr
    assert "'/verse' is not a command" in done.stderr


def test_a_line_that_is_no_text_is_refused_and_the_talk_goes_on(asked: list[tuple[int, str]], tmp_path: Path) -> None:
    """Bytes of another encoding reach `input` as halves of surrogate pairs."""
    for settings in (False, True):
        if settings:
            keep_settings(tmp_path / "run", 64)
        typed = b"na\xefve\ntwo\n".decode(errors="surrogateescape")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builtins.input", Mock(side_effect=[*typed.splitlines(), "/quit"]))
            done = talk(tmp_path / "run", arguments=("v1",))
        assert (done.exit_code, done.stdout) == (0, "v1 says: naïveté\n"), done.output
        assert "half a surrogate pair, which no tokenizer takes" in done.stderr


def test_a_programs_run_and_an_answer_that_is_cut(asked: list[tuple[int, str]], tmp_path: Path) -> None:
    done = talk(tmp_path / "run", "one", arguments=("v1",))
    assert (done.stdout, "(cut" in done.stderr) == ("v1 says: naïveté\n", False)
    assert asked == [(1, TURN.format("user", "one"))]
    keep_settings(tmp_path / "run", PIECE_TOKENS + 2)
    done = talk(tmp_path / "run", "one", arguments=("v1",))
    assert (done.stdout, "(cut off at" in done.stderr) == ("v1 says: n\n", True)


def test_ctrl_c_stops_an_answer_and_the_talk_goes_on(
    asked: list[tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, presses = PreTrainedTokenizerFast.decode, [signal.SIGINT]

    def pressed(*arguments: Any, **named: Any) -> Any:
        if asked and presses:
            os.kill(os.getpid(), presses.pop())
        return decode(*arguments, **named)

    keep_settings(tmp_path / "run", 64)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "decode", pressed)
        done = talk(tmp_path / "run", "one", "two", arguments=("v1",))
    assert done.exit_code == 0, done.output
    assert done.stderr.count("(stopped;") == 1
    assert done.stdout.count("naïveté") == 1
    assert asked[-1] == (1, TURN.format("system", "Be brief.") + TURN.format("user", "two"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_no_engine_starts_for_a_version_that_is_not_there(
    asked: list[tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "build_engine", lambda *_, **__: pytest.fail("an engine was started"))
    with pytest.raises(UnknownVersion), conversing(tmp_path / "run", 9):
        pass
    with pytest.raises(ConfigError, match="temperature=nan"), conversing(tmp_path / "run", 1, temperature=math.nan):
        pass
    refused = talk(tmp_path / "run", arguments=("9",))
    assert (refused.exit_code, "there is no version 9" in refused.stderr) == (2, True)


@pytest.fixture
def lent_engine(
    llama_dir: Path, llama_engine: VLLMEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> VLLMEngine:
    """The shared engine, with a run of two versions in tmp_path; a conversation takes it and leaves it open."""
    run_of_two(llama_dir, tmp_path / "run", llama_engine)
    monkeypatch.setattr(replay, "build_engine", lambda *_, **__: llama_engine)
    monkeypatch.setattr(llama_engine, "close", lambda: None)
    return llama_engine


@pytest.mark.vllm
def test_answers_are_those_of_the_proven_version(
    lent_engine: VLLMEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces as in one go; a text model completes plain text."""
    greedy = Sampling(max_tokens=20, temperature=0.0)
    answers = []
    with conversing(tmp_path / "run", 1, temperature=0.0) as conversation:
        monkeypatch.setattr(conversation, "_sampling", greedy)
        for number in (1, 2):
            receipt = conversation.switch(number)
            assert (receipt.proof, receipt.proven_bytes > 0) == ("slots", True)
            conversation.forget()
            pieces = list(conversation.answer("hello"))
            [group] = lent_engine.generate(
                [[{"role": "user", "content": "hello"}]], greedy, adapter=conversation.version
            )
            assert len(pieces) > 1
            assert "".join(pieces) == group.completions[0].text
            assert group.completions[0].version == number
            answers.append("".join(pieces))
            lent_engine.unload(conversation.version)
    assert answers[0] != answers[1]


@pytest.mark.vllm
def test_an_answer_ends_where_the_model_does(lent_engine: VLLMEngine, tmp_path: Path) -> None:
    """What was said grows with each turn, up to where no answer fits; after that one can begin anew."""
    with conversing(tmp_path / "run", 1, temperature=0.0) as conversation:
        assert conversation.has_template
        said = lent_engine.max_model_len - len(TURN.format("user", "")) - 20
        assert "".join(conversation.answer("a" * said))
        assert conversation.cut
        assert conversation.turns[-1]["role"] == "assistant"
        with pytest.raises(ConfigError, match=r"max_model_len=128 leaves no room for an answer.*/new"):
            "".join(conversation.answer("b"))
        conversation.forget()
        assert "".join(conversation.answer("b"))
        lent_engine.unload(conversation.version)
