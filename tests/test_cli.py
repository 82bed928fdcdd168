"""The command line as a program: streams, exit codes, light imports."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lora_grpo as package

HEAVY = "{'torch', 'vllm', 'datasets', 'matplotlib', 'transformers', 'peft', 'accelerate'}"

CONFIG = """
output_dir = "run"
model.name = "no/model"
data.train = "train.jsonl"
rewards = [{ name = "exact" }]
"""


def lora_grpo(*arguments, cwd, **options):
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "lora_grpo", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.mark.parametrize("module", ["lora_grpo", "lora_grpo.cli", "lora_grpo.config_file", "lora_grpo.rewards"])
def test_imports_are_light(module):
    program = f"import sys, {module}; print(sorted({HEAVY} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_help_of_every_command(tmp_path):
    shown = lora_grpo("--help", cwd=tmp_path)
    assert shown.returncode == 0
    for command in ("train", "eval", "versions", "demo"):
        assert command in shown.stdout
        assert lora_grpo(command, "--help", cwd=tmp_path).returncode == 0


def test_version(tmp_path):
    assert lora_grpo("--version", cwd=tmp_path).stdout.split() == ["lora-grpo", package.__version__]


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("lora-grpo ver", ["versions", "verify"]),
        ("lora-grpo train run.toml grpo.beta", ["grpo.beta="]),
        ("lora-grpo check run.toml keep.on", ["keep.on_tmpfs="]),
        ("lora-grpo prune runs/mine keep.arch", ["keep.archived="]),
    ],
)
def test_a_shell_completes_commands_and_settings(tmp_path, monkeypatch, typed, completed):
    """As `lora-grpo --install-completion` has bash ask."""
    for name, value in {
        "_LORA_GRPO_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(typed.count(" ")),
    }.items():
        monkeypatch.setenv(name, value)
    assert lora_grpo(cwd=tmp_path).stdout.split() == completed


def test_help_config_explains_every_setting(tmp_path):
    shown = lora_grpo("train", "--help-config", cwd=tmp_path)
    assert shown.returncode == 0
    for words in ("grpo.learning_rate", "1e-06", "hub name or local directory", "rewards.N.weight", "(needed)"):
        assert words in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nowhere.toml"], "no config file or run nowhere.toml"),
        (["train", "run.tom"], "did you mean run.toml?"),
        (["train", "run.toml", "grpo.learning_rat=1"], "did you mean 'learning_rate'?"),
        (["train", "run.toml", "grpo.beta=-1"], "run.toml with grpo.beta=-1: grpo.beta: "),
        (["versions", "nowhere"], "nowhere: it is not a run's directory"),
        (["versions", "nowhere", "--json"], "nowhere"),
        (["chat", "nowhere"], "nowhere: it is not a run's directory"),
        (["eval", "nowhere"], "nowhere: it is not a run's directory"),
        (["prune", "nowhere", "grpo.seed=3"], "grpo.seed=3: prune takes only keep settings"),
        (["train", "base"], "base is a model, not a run; lora-grpo init base --data FILE"),
    ],
)
def test_errors_are_one_sentence_on_stderr_and_exit_2(tmp_path, arguments, words):
    (tmp_path / "run.toml").write_text(CONFIG)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    failed = lora_grpo(*arguments, cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: ")
    assert words in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_a_run_directory_is_a_run_to_go_on_with(tmp_path):
    """Its settings are found; without --resume nothing in it is touched."""
    from lora_grpo.config_file import load_config, save_config

    (tmp_path / "run.toml").write_text(CONFIG)
    settings = save_config(load_config(tmp_path / "run.toml", ["output_dir=elsewhere"]), tmp_path / "run")
    before = settings.read_bytes()
    failed = lora_grpo("train", "run", cwd=tmp_path)
    assert failed.returncode == 2
    assert "run holds a run already; go on with --resume" in failed.stderr
    assert settings.read_bytes() == before
    assert not (tmp_path / "elsewhere").exists()


def test_usage_errors_exit_2(tmp_path):
    assert lora_grpo("train", cwd=tmp_path).returncode == 2
    assert lora_grpo("tarin", cwd=tmp_path).returncode == 2


def test_a_bug_keeps_its_traceback_and_text_that_utf8_does_not_hold_is_printed(tmp_path):
    program = (
        "from lora_grpo import cli\n"
        "from lora_grpo.cli.options import print_json\n"
        "@cli.app.command('broken')\n"
        "def broken():\n"
        "    print_json({'text': '\\ud800'})\n"
        "    raise ZeroDivisionError('a bug')\n"
        "import sys; sys.argv = ['lora-grpo', 'broken']; cli.main()\n"
    )
    failed = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1
    assert json.loads(failed.stdout) == {"text": "\ud800"}
    assert "Traceback" in failed.stderr
    assert "ZeroDivisionError: a bug" in failed.stderr


def test_ctrl_c_runs_the_clean_up_and_exits_130(tmp_path):
    """What stands in for a trainer is a loop with a `finally`: the command must end after it, without a traceback."""
    program = (
        "import sys, time\n"
        "from lora_grpo import cli\n"
        "@cli.app.command('loop')\n"
        "def loop():\n"
        "    try:\n"
        "        print('started', flush=True)\n"
        "        time.sleep(600)\n"
        "    finally:\n"
        "        print('cleaned up', flush=True)\n"
        "sys.argv = ['lora-grpo', 'loop']; cli.main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout.readline() == "started\n"
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert out == "cleaned up\n"
    assert "Traceback" not in err


@pytest.mark.filterwarnings("ignore:the store:RuntimeWarning")
def test_versions_lists_a_run(tmp_path):
    from lora_grpo.adapters.store import AdapterStore

    files = {"adapter_config.json": [b"{}"], "adapter_model.safetensors": [bytes(2048)]}
    with AdapterStore(tmp_path / "root", archive=tmp_path / "run") as store:
        first = store.publish(files, step=0)
        store.promote(first)
        second = store.publish(files, step=1)
        store.record(first, reward=0.5)
        store.flush()
        rows = json.loads(lora_grpo("versions", "run", "--json", cwd=tmp_path).stdout)
        table = lora_grpo("versions", str(Path("run")), cwd=tmp_path).stdout
    assert [row["version"] for row in rows] == [first.number, second.number]
    assert [row["head"] for row in rows] == [True, False]
    assert rows[1]["parent"] == first.number
    assert rows[0]["metrics"]["reward"] == 0.5
    assert rows[0]["size_bytes"] == 2050
    assert rows[0]["digest"] == first.digest
    for words in ("v1", "HEAD", "0.5", "tmpfs"):
        assert words in table


def test_ctrl_c_before_a_command_runs_is_one_line(tmp_path):
    code = (
        "import warnings; from lora_grpo import cli\n"
        "def app(**_):\n    warnings.warn('of a store')\n    raise KeyboardInterrupt\n"
        "cli.app = app\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "warning: of a store\nstopped before anything began\n")


def test_a_sweep_is_told_from_a_run(tmp_path, monkeypatch):
    """Its members are the runs."""
    from typer.testing import CliRunner

    from lora_grpo.cli import app

    monkeypatch.setattr("signal.signal", lambda *_: None)
    sweep = tmp_path / "sweep"
    (sweep / "member-1").mkdir(parents=True)
    for file in ("sweep.json", "summary.json", "member-1/store.json"):
        (sweep / file).write_text("{}")
    such = f"{sweep} is a sweep, not a run: name the directory of one of its members, such as {sweep / 'member-1'}; "
    for command in (
        "versions",
        "report",
        "chat",
        "eval",
        "rollback --to 1",
        "prune",
        "train --resume",
        "check",
        "train",
    ):
        name, *others = command.split()
        failed = CliRunner().invoke(app, [name, str(sweep), *others], env={"NO_COLOR": "1"})
        assert (failed.exit_code, such in failed.stderr) == (2, True), failed.output
        assert f"`lora-grpo sweep {sweep} --resume` goes on" in failed.stderr
