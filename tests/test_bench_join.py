"""Several runs on one machine as one report."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_grpo.bench.joining import join
from lora_grpo.bench.plan import Settings
from lora_grpo.bench.report import findings
from lora_grpo.bench.schema import Document
from lora_grpo.cli import app
from lora_grpo.errors import ConfigError
from tests.test_bench import decode_row, document, memory_row, sync_row, tenth


def synced() -> Document:
    made = document([sync_row("native", 0.02, 0.02), sync_row("merge-trl", 1.02, 0.02)], [])
    return made.model_copy(update={"seconds": 100.0, "card": {**made.card, "commit": "a"}})


def decoded() -> Document:
    made = document([], [decode_row("native", 0.012, 0.012), decode_row("merge-trl", 0.010, 0.012)])
    changes = {"seconds": 50.0, "started_at": "2025-12-31", "failures": ["x failed"], "complete": False}
    return made.model_copy(update={**changes, "card": {**made.card, "commit": "b", "load_average_1min": 3.0}})


def test_what_one_run_synced_and_another_decoded_breaks_even() -> None:
    assert synced().break_even == decoded().break_even == []
    joined = join({"part-1": synced(), "part-5": decoded()})
    (row,) = joined.break_even
    assert row.completion_tokens == pytest.approx(1 + 1.0 / 0.002)
    assert any("merge-trl wins from 501 tokens" in sentence for sentence in findings(joined))
    assert (joined.seconds, joined.started_at, joined.complete) == (150.0, "2025-12-31", False)
    assert joined.failures == ["x failed"]
    assert joined.card["commit"] == "a, b"
    assert set(joined.settings) == {"part-1/sync", "part-5/sync"}


def test_native_stands_once_and_what_follows_is_made_anew() -> None:
    other = document([sync_row("native", 0.03, 0.03), sync_row("by-hand", 0.06, 0.03)], [])
    other.memory = [memory_row("native-shared", 100)]
    first = synced()
    first.memory = [memory_row("native", 200)]
    other.endurance = [tenth(n, 0.010) for n in range(10)]
    joined = join({"one": first, "two": other})
    assert [row.strategy for row in joined.sync] == ["native", "merge-trl", "by-hand"]
    assert [row.ratio_to_native for row in joined.memory] == [1.0, 1.0]
    assert joined.slopes[0].syncs == 1000
    assert joined.seconds is None


def test_runs_of_two_machines_are_not_joined() -> None:
    other = decoded()
    other.card["torch"] = "3"
    with pytest.raises(ConfigError, match=r"\{'torch': '2'\} in the first, \{'torch': '3'\} in the other"):
        join({"one": synced(), "two": other})


def test_models_differ_and_machines_do_not() -> None:
    small, large = synced(), decoded()
    small.card["tiny"], large.card["qwen2.5-7b"] = "1 M parameters", "7616 M parameters"
    small.settings, large.settings = (
        {"sync": Settings(repeat=2, shape="tiny")},
        {"decode": Settings(repeat=2, shape="qwen2.5-7b")},
    )
    assert {"tiny", "qwen2.5-7b"} <= set(join({"one": small, "two": large}).card)


def test_the_report_of_joined_runs(tmp_path: Path) -> None:
    """Again when another has come back: of all that lie there."""
    for name, made in (("small", synced()), ("large", decoded())):
        (tmp_path / "bench" / name).mkdir(parents=True)
        (tmp_path / "bench" / name / "results.json").write_text(made.model_dump_json())
        words = ["bench", "report", "--out", str(tmp_path)]
        assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    text = (tmp_path / "report.md").read_text()
    assert "merge-trl wins from 501 tokens" in text
    assert "in 2.5 minutes with" in text
    assert Document.model_validate_json((tmp_path / "results.json").read_text()).seconds == 150.0
