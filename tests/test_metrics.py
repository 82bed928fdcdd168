"""The log survives kills, the terminal stays in order, the picture is drawn."""

import contextlib
import io
import json
import logging
import math
import os
import pty
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from rich.console import Console

from lora_grpo.errors import ConfigError, StoreError
from lora_grpo.metrics.curves import plot_run
from lora_grpo.metrics.log import RunLog, capture_output, history, quiet_libraries, read_metrics
from lora_grpo.metrics.render import ViewState, duration, panel, phase_seconds, plain_step, sparkline
from lora_grpo.metrics.reporter import Reporter

STEP = {
    "reward": 0.5,
    "reward_std": 0.25,
    "frac_groups_used": 0.625,
    "sampling/sampling_logp_difference/mean": 0.004,
    "version": 3,
    "step_time": 2.0,
    "time/publish_s": 0.01,
    "time/generate_s": 1.5,
    "completions/mean_length": 10.0,
    "completions/clipped_ratio": 0.0,
    "canary/verdict": "ok",
}


def test_log_writes_plain_json(tmp_path):
    log = RunLog(tmp_path / "metrics.jsonl")
    log.append(
        "step", step=1, reward=np.float32(0.5), kl=math.nan, loss=np.float64(math.inf), names=("a",), where=tmp_path,
        image=b"\xff\xd8", pixels=np.array([[1.0, math.nan]]),
    )  # fmt: skip
    log.close()
    (record,) = read_metrics(tmp_path)
    assert record.pop("time") > 0
    assert record == {
        "event": "step",
        "step": 1,
        "reward": 0.5,
        "kl": None,
        "loss": None,
        "names": ["a"],
        "where": str(tmp_path),
        "image": "_9g=",
        "pixels": [[1.0, None]],
    }


@pytest.mark.parametrize("cut", range(2, 24))
def test_a_torn_last_line_is_left_out_and_the_next_record_stands_alone(tmp_path, cut):
    """Glued to a torn line, the first record after a resume would be lost too."""
    path = tmp_path / "metrics.jsonl"
    whole = b'{"event":"step","step":1}\n{"event":"step","step":2}\n'
    path.write_bytes(whole[:-cut])
    assert [record["step"] for record in read_metrics(path)] == [1]
    log = RunLog(path)
    log.append("step", step=3)
    log.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 3]


def test_a_whole_last_line_that_an_editor_left_without_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event":"step","step":1}\n{"event":"step","step":2}')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    log = RunLog(path)
    log.append("step", step=3)
    log.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    program = (
        "import sys, itertools\nfrom pathlib import Path\nfrom lora_grpo.metrics.log import RunLog\n"
        "log = RunLog(Path(sys.argv[1]))\n"
        "for step in itertools.count(1):\n"
        "    log.append('step', step=step, pad='x' * 5000)\n"
        "    if step == 50: print('go', flush=True)\n"
    )
    path = tmp_path / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    steps = [record["step"] for record in read_metrics(path)]
    assert len(steps) >= 50
    assert steps == list(range(1, len(steps) + 1))


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "start"}\n{"even\n{"event": "end"}\n')
    with pytest.raises(StoreError, match=r"metrics\.jsonl, line 2 is no JSON object"):
        read_metrics(tmp_path)
    with pytest.raises(StoreError, match="is this a run directory"):
        read_metrics(tmp_path / "other")


def test_history_leaves_out_what_a_resume_did_again():
    def step(number, reward):
        return {"event": "step", "step": number, "reward": reward}

    records = [{"event": "start", "step": 0}, step(1, 0.1), step(2, 0.2), step(3, 0.3)]
    records += [{"event": "start", "step": 1}, step(2, 0.5)]
    assert [(r["step"], r["reward"]) for r in history(records) if r["event"] == "step"] == [(1, 0.1), (2, 0.5)]


def test_reporter_writes_log_samples_and_a_plain_line_a_step(tmp_path, capfd):
    rows = [{"prompt": "[bold]1+1=[/nonsense]", "completion": "2", "reward": 1.0, "version": 3}]
    with Reporter(tmp_path / "run", 4) as reporter:
        reporter.start({"model": "tiny"})
        reporter.evaluation(0, None, {"reward": 0.45})
        with reporter.phase("generate"):
            pass
        reporter.step(1, STEP)
        reporter.samples(1, rows)
        reporter.message("something to know")
        reporter.end({"accuracy_after": 0.9})
    out, err = capfd.readouterr()
    assert out == "", "stdout is for the final JSON line"
    assert (
        "step 1/4  v3  reward 0.500 ± 0.250  signal 62.5%  gap 0.0040 nats  generate 1.50 s  publish 0.01 s  eta 6s"
        in err
    )
    assert "held-out after step 0, base: reward 0.45" in err
    assert "[bold]1+1=[/nonsense]" in err
    assert "something to know" in err
    assert "\x1b" not in err
    events = [record["event"] for record in read_metrics(tmp_path / "run")]
    assert events == ["start", "evaluation", "step", "message", "end"]
    (samples,) = read_metrics(tmp_path / "run" / "samples.jsonl")
    assert samples["rows"] == rows
    reporter.close()


HALF = "half a pair: \ud83d, ü"
"""A tokenizer's byte pieces, or a user's JSON, can hold one half of a surrogate pair, which UTF-8 cannot."""


def test_half_a_surrogate_pair_ends_nothing_and_is_kept(tmp_path, capfd):
    with warnings.catch_warnings(), Reporter(tmp_path, 4) as reporter:
        reporter.start({"model": HALF})
        reporter.step(1, {"reward": 0.5, "note": HALF})
        reporter.samples(1, [{"prompt": HALF, "completion": HALF}])
        reporter.message(HALF)
        logging.getLogger("transformers").warning(HALF)
        with reporter.capture():
            print(HALF)
        reporter.end({"text": HALF})
    start, step, message, end = read_metrics(tmp_path)
    assert start["info"]["model"] == step["note"] == message["text"] == end["info"]["text"] == HALF
    assert read_metrics(tmp_path / "samples.jsonl")[0]["rows"] == [{"prompt": HALF, "completion": HALF}]
    assert "ü".encode() in (tmp_path / "samples.jsonl").read_bytes(), "what UTF-8 holds is not escaped"
    assert (tmp_path / "engine.log").read_text().count("half a pair: \\ud83d, ü") == 2
    assert "Logging error" not in capfd.readouterr().err


def read_to_end(terminal):
    """All bytes until the other side is closed, which Linux says with an error."""
    read = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(terminal, 1 << 16):
            read += chunk
    os.close(terminal)
    return read


def test_live_view_on_a_terminal_shows_the_run_and_gives_the_terminal_back(tmp_path, monkeypatch):
    primary, secondary = pty.openpty()
    with ThreadPoolExecutor(1) as reader, os.fdopen(secondary, "w") as stream:
        reading = reader.submit(read_to_end, primary)
        monkeypatch.setattr("lora_grpo.metrics.reporter.own_stderr", lambda: stream)
        with Reporter(tmp_path, 4) as view:
            view.start({"model": "tiny"})
            view.evaluation(0, None, {"reward": 0.45})
            view.step(1, STEP)
            view.evaluation(1, 3, {"reward": 0.75})
        shown = reading.result().decode()
    for words in (
        "0.500 ± 0.250",
        "0.750",
        "from 0.450 (base)",
        "62.5% of groups",
        "v3",
        "nats per token",
        "generate 1.50",
    ):
        assert words in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor must be visible again"


def test_view_on_anything_but_a_terminal_is_plain(tmp_path, capfd):
    with Reporter(tmp_path, 2) as view:
        view.start({})
        view.step(1, {"reward": 1.0, "step_time": 1.0, "sampling/sampling_logp_difference/mean": None})
        view.start({}, step=3)
    assert capfd.readouterr().err.splitlines()[1:] == [
        "step 1/2  reward 1.000  eta 1s",
        f"{tmp_path}: 3 steps are made, of 2; more with a higher grpo.total_steps",
    ]


def test_libraries_and_children_write_to_the_engine_log_only(tmp_path, capfd):
    told = []
    log = tmp_path / "engine.log"
    before = logging.getLogger("vllm").handlers[:]
    with quiet_libraries(log, told.append):
        logging.getLogger("vllm.engine").error("from a logger")
        warnings.warn("of the user", stacklevel=1)
        with capture_output(log):
            print("from python")
            subprocess.run(["sh", "-c", "echo from a child; echo and its stderr >&2"], check=True)
    print("after")
    out, err = capfd.readouterr()
    assert (out, err) == ("after\n", "")
    assert told == ["warning: of the user"]
    for words in ("from a logger", "from python", "from a child", "and its stderr"):
        assert words in log.read_text()
    assert logging.getLogger("vllm").handlers == before


def test_a_failure_under_capture_names_the_log_and_gives_the_streams_back(tmp_path, capfd):
    with pytest.raises(RuntimeError) as caught, capture_output(tmp_path / "engine.log"):
        raise RuntimeError("no engine")
    assert str(tmp_path / "engine.log") in caught.value.__notes__[0]
    os.write(2, b"visible\n")
    assert capfd.readouterr().err == "visible\n"


@pytest.mark.parametrize("steps", [1, 40])
def test_plot(tmp_path, steps):
    with Reporter(tmp_path, steps, view=False) as reporter:
        reporter.start({"model": "tiny"})
        for step in range(1, steps + 1):
            reporter.step(step, {**STEP, "kl": math.nan, "canary/verdict": "failed" if step == 9 else "ok"})
        if steps > 1:
            reporter.evaluation(0, None, {"reward": 0.4})
            reporter.evaluation(steps, 3, {"reward": 0.9})
    path = plot_run(tmp_path)
    assert path == tmp_path / "plot.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_rewards_below_zero_fill_their_picture(tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_ylim", lambda axes, low, high: limits.append((low, high)))
    with Reporter(tmp_path, 2, view=False) as reporter:
        reporter.start({})
        for step, reward in ((1, -5.0), (2, -3.0)):
            reporter.step(step, {"step": step, "reward": reward})
    plot_run(tmp_path)
    assert limits[0] == (-5.0, 0.25)


def test_plot_of_a_run_without_steps_says_so(tmp_path):
    with Reporter(tmp_path, 3, view=False) as reporter:
        reporter.start({})
    with pytest.raises(StoreError, match="no finished step to plot"):
        plot_run(tmp_path)


def test_tensorboard_gets_the_metrics(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Reporter(tmp_path, 2, view=False, trackers=("tensorboard",)) as reporter:
        reporter.start({"model": "tiny", "grpo": {"learning_rate": 1e-3, "reward_weights": (1.0,), "delta": None}})
        for step in (1, 2):
            reporter.step(step, {**STEP, "reward": step / 4})
    accumulator = events.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("reward")] == [(1, 0.25), (2, 0.5)]
    with pytest.raises(ConfigError, match=r"unknown tracker 'tensorbord'; did you mean 'tensorboard'\?"):
        Reporter(tmp_path, 2, view=False, trackers=("tensorbord",)).start({})


def test_a_tracker_that_cannot_start_leaves_none_open(tmp_path, monkeypatch):
    from accelerate import tracking

    finished = []

    class Good:
        requires_logging_directory = False

        def __init__(self, name): ...

        def start(self): ...

        def store_init_configuration(self, values): ...

        def finish(self):
            finished.append(type(self).__name__)

    class Bad(Good):
        def start(self):
            raise RuntimeError("not logged in")

    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", {"good": Good, "bad": Bad})
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["good", "bad"])
    with Reporter(tmp_path, 2, view=False, trackers=("good", "bad")) as reporter:
        with pytest.raises(RuntimeError, match="not logged in"):
            reporter.start({})
        assert finished == []
    assert finished == ["Good"]


def test_eta_follows_the_recent_steps(tmp_path):
    state = ViewState(tmp_path, total_steps=100)
    assert state.eta_s is None
    for step in range(1, 51):
        state.hear_step(step, {"step_time": 9.0 if step <= 30 else 2.0})
    assert state.eta_s == 100.0
    assert plain_step(state).endswith("eta 1m40s")


def test_small_renderings():
    assert sparkline([0, 7, 3.5]) == "▁█▅"
    assert sparkline([2, 2]) == "▄▄"
    assert [duration(seconds) for seconds in (-5, 0.4, 8, 80, 3599, 7500, 180_000)] == [
        "0s",
        "0s",
        "8s",
        "1m20s",
        "59m59s",
        "2h05m",
        "2d02h",
    ]
    assert phase_seconds({"time/train_s": 2, "time/generate_s": 3, "step_time": 6}) == {"generate": 3, "train": 2}


def test_the_panel_shows_what_is_on_its_way_to_the_disk(tmp_path):
    state, shown = ViewState(tmp_path, total_steps=2), Console(record=True, width=100, file=io.StringIO())
    for step, waiting_bytes in ((1, 3 << 19), (2, 0)):
        state.hear_step(step, {**STEP, "archive/backlog_bytes": waiting_bytes})
        shown.print(panel(state))
    text = shown.export_text()
    assert text.index("1.5 MiB on the way to the disk") < text.index("all on the disk")


def test_metrics_import_neither_torch_nor_matplotlib():
    heavy = "{'torch', 'matplotlib', 'accelerate', 'vllm'}"
    program = f"import sys, lora_grpo.metrics.reporter; print(sorted({heavy} & set(sys.modules)))"
    assert json.loads(subprocess.check_output([sys.executable, "-c", program], text=True).replace("'", '"')) == []
