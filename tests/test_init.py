"""`lora-grpo init`: a config file from what is in a model and its data, which `lora-grpo check` passes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from lora_grpo.cli.train import init
from lora_grpo.config import RunConfig
from lora_grpo.config_file import load_config
from lora_grpo.errors import ConfigError
from lora_grpo.trainer import room
from lora_grpo.trainer.checking import check_run
from tests.example_configs import FOLDER, MODELS, text
from tests.test_cli import lora_grpo

SUMS = [{"id": n, "question": f"{n}+1=", "answer": f"One more.\n#### {n + 1:,}"} for n in range(40)]


def written(folder: Path, model: Path, rows: list[dict[str, Any]], *overrides: str) -> tuple[RunConfig, str]:
    """The settings of the file that `init` writes, and its text; `check` passes it."""
    data, out = folder / "rows.jsonl", folder / "run.toml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    init(str(model), [f"output_dir={folder / 'run'}", *overrides], data=str(data), out=out)
    config = load_config(out)
    assert [finding for finding in check_run(config) if not finding.ok] == []
    assert not (folder / "run").exists()
    return config, out.read_text()


def test_worked_solutions_that_end_in_a_number(tmp_path: Path, llama_dir: Path) -> None:
    config, text = written(tmp_path, llama_dir, SUMS, "grpo.learning_rate=1e-3", "keep.on_tmpfs=3")
    assert config.data.prompt_column == "question"
    assert (config.rewards[0].name, config.rewards[0].options) == ("numeric", {})
    assert "####" in (config.data.system_prompt or "")
    assert (config.grpo.learning_rate, config.keep.on_tmpfs) == (1e-3, 3)
    assert (config.grpo.total_steps, config.grpo.num_generations) == (20, 8)
    for words in (
        "id, question, answer",
        "every 'answer' ends in a number",
        "all 40 once are 5 steps",
        "# memory: trainer",
    ):
        assert words in text
    # The bytes of the longest prompt, in a chat with the system message, beside a completion.
    longest = int(text.partition("the longest prompt has ")[2].split()[0])
    assert len("Think step by step. End with #### and the number.39+1=") < longest < 140
    assert 0 <= (config.engine.max_model_len or 0) - longest - config.grpo.max_completion_length < 8


def test_short_answers_in_a_column_of_another_name(tmp_path: Path, llama_dir: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"Colour {n}?"}], "label": "red" if n % 2 else "blue"} for n in range(9)
    ]
    config, text = written(tmp_path, llama_dir, rows)
    assert (config.rewards[0].name, config.rewards[0].options) == ("exact", {"column": "label"})
    assert config.data.system_prompt is None
    assert config.grpo.max_completion_length == 64
    assert "4 characters at most" in text


def test_the_engine_of_short_rows_has_room_for_its_probe(tmp_path: Path, llama_dir: Path) -> None:
    config, _ = written(tmp_path, llama_dir, [{"prompt": "1+1=", "answer": "2"}], "grpo.max_completion_length=4")
    assert (config.engine.max_model_len or 0) >= 25


def test_a_reward_of_ones_own_and_prompts_beyond_the_context(tmp_path: Path, llama_dir: Path) -> None:
    rows = [{"text": "short: "}, {"text": "long " * 30_000}]
    config, _ = written(tmp_path, llama_dir, rows, "rewards.0.name=tests.tiny_trainer:share_of_low_bytes")
    assert config.rewards[0].name == "tests.tiny_trainer:share_of_low_bytes"
    assert config.grpo.overlong_prompts == "drop"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"said": "1+1=", "answer": "2"}], r"prompts \(said, answer\): name .*data\.prompt_column=NAME"),
        ([{"prompt": "1+1=", "answer": "long and wordless " * 9}], r"\(prompt, answer\): name a reward, such as"),
        (
            [{"messages": [{"role": "assistant", "content": "Hi"}]}],
            "row 0, column 'messages': the chat ends with the as",
        ),
        ([*SUMS, {"question": 3, "answer": "4"}], r"row 40, column 'question': a prompt is text or a list .*, not 3;"),
        (
            [{"prompt": "1+1=", "text": 1}, {"prompt": "", "text": 2}],
            r"row 1, column 'prompt': the prompt is empty; .*or name another column, as data\.prompt_column=NAME",
        ),
        ([*SUMS, {"question": "9", "answer": None}], r"row 40, column 'answer': there is no answer \(None\); remove"),
        ([*SUMS, {"question": "9", "answer": " "}], r"row 40, column 'answer': there is no answer \(' '\); remove"),
        ([], "has no rows"),
    ],
)
def test_what_cannot_be_told_is_asked_for(tmp_path: Path, llama_dir: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        written(tmp_path, llama_dir, rows)
    assert not (tmp_path / "run.toml").exists()


def test_a_column_that_is_not_there_is_told_with_those_that_are(tmp_path: Path, llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"no column 'questoin'; its columns are 'id', 'question', 'answer'"):
        written(tmp_path, llama_dir, SUMS, "data.prompt_column=questoin")


def test_too_little_memory_here_is_said_in_the_file(
    tmp_path: Path, llama_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "available_memory", lambda device: 1 << 20)
    with pytest.raises(typer.Exit) as ended:
        written(tmp_path, llama_dir, SUMS)
    assert ended.value.exit_code == 2
    assert "# NOT YET: base and adapter: the run needs " in (tmp_path / "run.toml").read_text()
    assert "the run needs " in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"run\.toml exists already"):
        written(tmp_path, llama_dir, SUMS)


def test_the_command_asks_for_data(tmp_path: Path) -> None:
    failed = lora_grpo("init", "model", cwd=tmp_path)
    assert failed.returncode == 2
    assert "--data" in failed.stderr


@pytest.mark.parametrize("shape", list(MODELS)[:1])
def test_the_examples_are_what_the_code_writes(shape: str) -> None:
    """But for activations, which other versions of transformers may compute a little otherwise."""
    kept, now = ((FOLDER / f"{shape}.toml").read_text(), text(shape))
    assert load_config(FOLDER / f"{shape}.toml").model.name == MODELS[shape]
    activations = r"[\d,.]+ MiB and|activations [\d,.]+ MiB"
    assert re.sub(activations, "", kept) == re.sub(activations, "", now)
    mib = [float(re.search("# ([\\d,.]+) MiB and", one)[1].replace(",", "")) for one in (kept, now)]  # type: ignore[index]
    assert mib[0] == pytest.approx(mib[1], rel=0.03)
