"""The commands on versions: on a run that is stopped, and on one that is going on."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.config import DataConfig, EngineConfig, KeepConfig, ModelConfig, RewardConfig, RunConfig
from lora_grpo.config_file import save_config
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.grpo.forward import teacher_logprobs
from tests.conftest import ENGINE_ARGS
from tests.here import ENVIRONMENT, REPOSITORY, lora_grpo
from tests.test_resume import run_tiny
from tests.tiny_models import load_model
from tests.tiny_run import fake_engine
from tests.tiny_trainer import CONFIG, ROWS, tiny_trainer, weights


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lora_grpo", *map(str, arguments)]


def answer(*arguments: object) -> Any:
    """What a command prints with --json."""
    done = lora_grpo(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def made(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A stopped run of five versions, with settings, and the weights of its last one."""
    folder = tmp_path_factory.mktemp("made")
    run = folder / "run"
    config = CONFIG.replace(total_steps=4, vllm_importance_sampling_correction=False)
    with tiny_trainer(llama_dir, fake_engine(llama_dir), run, config, keep=KeepConfig(trainer_states=2)) as trainer:
        trainer.train()
        last = weights(trainer)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    settings = RunConfig(
        output_dir=str(run),
        model=ModelConfig(name=str(llama_dir), dtype="float32"),
        data=DataConfig(train=str(folder / "prompts.jsonl")),
        rewards=(RewardConfig(name="tests.tiny_trainer:share_of_low_bytes"),),
        engine=EngineConfig(**{**ENGINE_ARGS, "max_lora_rank": 16, "dtype": "float32"}),
        keep=KeepConfig(trainer_states=2),
        grpo=config,
    )
    save_config(settings, run)
    return run, last


@pytest.fixture
def run(made: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Path:
    """A copy of the run to change, its tmpfs half gone as after a reboot."""
    shutil.copytree(made[0], tmp_path / "run")
    return tmp_path / "run"


def test_versions_and_show(run: Path) -> None:
    rows = answer("versions", run)
    assert [(row["version"], row["parent"], row["step"]) for row in rows] == [
        (1, None, 0),
        (2, 1, 1),
        (3, 2, 2),
        (4, 3, 3),
        (5, 4, 4),
    ]
    assert [row["head"] for row in rows] == [False] * 4 + [True]
    assert not any(row["served"] or row["pinned"] for row in rows)
    assert rows[4]["where"] == ["archive", "state"]
    # The two latest states, and that of the best by reward.
    assert [row["version"] for row in rows if "state" in row["where"]] in ([4, 5], [1, 4, 5], [2, 4, 5], [3, 4, 5])
    assert rows[0]["metrics"]["reward"] > 0
    shown = answer("show", run, 2)
    assert (shown["version"], shown["children"], shown["digest"]) == (2, [3], rows[1]["digest"])
    assert (Path(shown["path"]) / "adapter_model.safetensors").is_file()
    assert "completions/mean_length" in lora_grpo("show", run, 2).stdout
    table = lora_grpo("versions", run).stdout
    for words in ("v5", "HEAD", "archive, state", "age"):
        assert words in table
    missing = lora_grpo("show", run, 77)
    assert (missing.returncode, missing.stderr) == (2, "error: there is no version 77; the last one published is 5\n")


def test_a_stopped_run_is_changed_at_once(run: Path) -> None:
    done = answer("rollback", run, "--to", "v4")
    assert (done["live"], done["left"], done["version"], done["weights"]) == (False, 5, 4, "exact")
    assert answer("rollback", run, "--to", "parent")["version"] == 3
    assert answer("rollback", run, "--to", "head")["done"].startswith("v3 is HEAD already (step 2); resume goes on")
    assert [row["head"] for row in answer("versions", run)] == [False, False, True, False, False]
    assert answer("show", run, 3)["rollbacks"] == [{"from": 4, "to": 3, "reason": None}]
    assert answer("pin", run, 2)["pins"] == [2]
    assert answer("versions", run)[1]["pinned"]
    foreseen = answer("prune", run, "keep.archived=1", "keep.trainer_states=1", "--dry-run")
    assert len(answer("versions", run)) == 5
    pruned = answer("prune", run, "keep.archived=1", "keep.trainer_states=1")
    assert pruned["removed"]
    assert (foreseen["removed"], foreseen["states_removed"]) == (pruned["removed"], pruned["states_removed"])
    assert foreseen["done"] == pruned["done"].replace("removed", "would remove")
    for removed, noun in ((pruned["removed"], "version"), (pruned["states_removed"], "trainer state")):
        assert f"{len(removed)} {noun}{'s' * (len(removed) != 1)} (v" in pruned["done"]
    best = max(answer("versions", run), key=lambda row: row["metrics"].get("reward", -1))["version"]
    left = {row["version"] for row in answer("versions", run)}
    assert left >= {2, 3, 5, best}
    assert set(pruned["removed"]) == {1, 2, 3, 4, 5} - left
    assert answer("unpin", run, 2)["pins"] == []
    again = lora_grpo("unpin", run, 2)
    assert again.returncode == 2
    assert "not pinned" in again.stderr
    assert (run / "rollbacks.jsonl").read_text().count("\n") == 2


def test_a_run_without_settings_is_pruned_by_given_ones_alone(run: Path) -> None:
    (run / "config.json").unlink()
    for given in ([], ["keep.archived=1"], ["keep.trainer_states=1"]):
        for dry in ([], ["--dry-run"]):
            refused = lora_grpo("prune", run, *given, *dry)
            assert refused.returncode == 2
            assert "give both keep.archived=N and keep.trainer_states=N" in refused.stderr
    zero = lora_grpo("prune", run, "keep.archived=0", "keep.trainer_states=1")
    assert (zero.returncode, "keep.archived" in zero.stderr) == (2, True)
    assert len(answer("versions", run)) == 5
    assert answer("prune", run, "keep.archived=1", "keep.trainer_states=1")["removed"]


@pytest.mark.parametrize("to", ["99", "4x", "best:", "best:charm"])
def test_a_rollback_to_nowhere_changes_nothing(run: Path, to: str) -> None:
    failed = lora_grpo("rollback", run, "--to", to)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert not (run / "rollbacks.jsonl").exists()


def test_commands_make_no_run_where_there_is_none(tmp_path: Path) -> None:
    for arguments in (["pin", "none", 1], ["rollback", "none", "--to", "1"], ["prune", "none"], ["verify", "none"]):
        failed = lora_grpo(arguments[0], tmp_path / str(arguments[1]), *arguments[2:])
        assert failed.returncode == 2, failed.stdout
        assert "no store" in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_verify_of_nothing_says_so(tmp_path: Path) -> None:
    AdapterStore(archive=tmp_path).close()
    empty = lora_grpo("verify", tmp_path)
    assert empty.returncode == 0
    assert "holds no versions, so nothing was compared" in empty.stderr


def test_verify_names_the_damage(run: Path) -> None:
    whole = lora_grpo("verify", run)
    assert whole.returncode == 0
    assert "as they were published: 5 of 5 versions" in whole.stderr
    weights_file = run / "versions" / "000002" / "adapter_model.safetensors"
    content = weights_file.read_bytes()
    weights_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (run / "states" / "000005" / "state.json").write_text("{}")
    shutil.rmtree(run / "versions" / "000003")
    found = lora_grpo("verify", run, "--json")
    assert found.returncode == 1
    verdicts = {row["version"]: row for row in json.loads(found.stdout)["versions"]}
    assert [number for number, row in sorted(verdicts.items()) if not row["ok"]] == [2, 3, 5]
    assert "versions/000002" in verdicts[2]["found"]
    assert "state.json differs" in verdicts[5]["found"]
    assert verdicts[3]["found"] == "no copy is left"
    shown = lora_grpo("verify", run)
    assert shown.returncode == 1
    assert "no copy is left" in shown.stdout


def test_verify_names_lines_of_the_history_that_are_lost(run: Path) -> None:
    journal = run / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    record = max(number for number, line in enumerate(lines) if json.loads(line)["event"] == "record")
    lines[record] = b"\xff" + lines[record]
    journal.write_bytes(b"".join(lines))
    found = lora_grpo("verify", run)
    assert found.returncode == 1
    assert f"damaged: {record + 1};" in found.stderr.replace("\n", " ")
    answered = json.loads(lora_grpo("verify", run, "--json").stdout)
    assert (answered["ok"], answered["damaged_lines"]) == (False, [record + 1])
    assert all(row["ok"] for row in answered["versions"])


def test_diff_is_that_of_the_effective_update(run: Path) -> None:
    """Against B @ A written out in full; and a version against itself."""
    found = answer("diff", run, 2, 5)
    files = [load_file(run / "versions" / f"{n:06d}" / "adapter_model.safetensors") for n in (2, 5)]
    totals = [0.0, 0.0, 0.0]
    for row in found["modules"]:
        name = f"base_model.model.{row['module']}.lora_{{}}.weight"
        one, two = (f[name.format("B")].double() @ f[name.format("A")].double() for f in files)
        assert row["change"] == pytest.approx(float((two - one).norm() / one.norm()), rel=1e-6)
        assert row["cosine"] == pytest.approx(float((one * two).sum() / one.norm() / two.norm()), rel=1e-6)
        totals = [a + float(b) for a, b in zip(totals, ((two - one).norm() ** 2, one.norm() ** 2, 1), strict=True)]
    assert len(found["modules"]) == totals[2] == 14
    assert found["all"]["change"] == pytest.approx(math.sqrt(totals[0] / totals[1]), rel=1e-6)
    itself = answer("diff", run, 2, 2)["all"]
    assert (itself["change"], itself["cosine"]) == (0.0, pytest.approx(1.0))
    assert "cosine" in lora_grpo("diff", run, 1, 2).stdout


@pytest.mark.vllm
def test_export_is_the_adapter_as_it_was_trained(
    made: tuple[Path, dict[str, torch.Tensor]], run: Path, llama_dir: Path, llama_engine: VLLMEngine, tmp_path: Path
) -> None:
    assert answer("export", run, 5, tmp_path / "five")["weights"] == "exact"
    rounded = next(row["version"] for row in answer("versions", run) if row["where"] == ["archive"])
    assert answer("export", run, rounded, tmp_path / "other")["weights"] == "rounded"
    loaded = PeftModel.from_pretrained(load_model(llama_dir), tmp_path / "five", is_trainable=True)
    trained = {name: p.detach() for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained.keys() == made[1].keys()
    assert all(torch.equal(trained[name], value) for name, value in made[1].items())
    assert (loaded.peft_config["default"].r, loaded.peft_config["default"].lora_alpha) == (8, 16)
    occupied = lora_grpo("export", run, 5, tmp_path / "five")
    assert occupied.returncode == 2
    assert "already holds an adapter" in occupied.stderr
    # Stock vLLM takes the folder, scales it itself, and computes the trainer's policy.
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    ids = list(range(10, 40))
    llm = llama_engine._llm
    request = LoRARequest("exported", 990, str(tmp_path / "five"))
    made_by = llm.generate(
        [{"prompt_token_ids": ids}],
        SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0),
        lora_request=request,
        use_tqdm=False,
    )
    llm.llm_engine.remove_lora(990)
    served = [entry[token].logprob for entry, token in zip(made_by[0].prompt_logprobs[1:], ids[1:], strict=True)]
    own = teacher_logprobs(loaded, [ids])[0]
    assert sum(abs(a - b) for a, b in zip(served, own, strict=True)) / len(own) < 0.05


@pytest.mark.vllm
def test_compare_samples_two_versions_in_one_batch(run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    line = command("compare", run, 1, 5, "--prompts", prompts, "--samples", 4, "--json")
    done = subprocess.run(line, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["version"] for row in found["answers"]] == [1] * 12 + [5] * 12
    first = [row for row in found["answers"] if row["version"] == 1]
    assert found["reward"]["first"] == pytest.approx(sum(row["reward"] for row in first) / 12)
    assert found["tokens"]["first"] == pytest.approx(sum(row["tokens"] for row in first) / 12)
    apart = [(row["logp_second"] - row["logp_first"]) / row["tokens"] for row in first]
    assert found["logp_first_answers"]["difference"] == pytest.approx(sum(apart) / 12)
    assert any(value != 0 for value in apart)
    by_prompt = [sum(apart[start : start + 4]) / 4 for start in (0, 4, 8)]
    mean = sum(by_prompt) / 3
    error = math.sqrt(sum((value - mean) ** 2 for value in by_prompt) / 2 / 3)
    assert found["logp_first_answers"]["standard_error"] == pytest.approx(error)


@pytest.fixture
def live(llama_dir: Path, tmp_path: Path, shm_dir: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A run that waits in its third step until it is let on."""
    process = run_tiny(llama_dir, tmp_path / "run", shm_dir / "run", pause=True)
    assert process.stdin is not None
    assert process.stdout is not None
    for step in (1, 2):
        assert process.stdout.readline() == f"step {step}\n"
        let_on(process)
    assert process.stdout.readline() == "step 3\n"
    yield tmp_path / "run", process
    process.kill()
    process.communicate()


def let_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def asked(run: Path, *arguments: object) -> subprocess.Popen[str]:
    """A command that has left its request."""
    process = subprocess.Popen(
        command(*arguments), cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("asked process ")
    return process


def test_a_live_run_does_what_it_is_asked_before_its_next_step(live: tuple[Path, subprocess.Popen[str]]) -> None:
    run, training = live
    assert training.stdout is not None
    rows = answer("versions", run)
    assert [row["served"] for row in rows] == [True] * 3
    asking = [
        asked(run, "pin", run, 1, "--json"),
        asked(run, "unpin", run, 3, "--json"),
        asked(run, "rollback", run, "--to", "2", "--json"),
        asked(run, "prune", run, "--json"),
    ]
    let_on(training)
    # Back on v2, which step 1 made, the next step is the second again.
    assert training.stdout.readline() == "step 2\n"
    (pinned, unpin, rolled, pruned) = [process.communicate(timeout=60) for process in asking]
    assert json.loads(pinned[0]) == {"live": True, "done": "pinned", "pins": [1]}
    assert asking[1].returncode == 2
    assert "error: the run answered: version 3 is not pinned" in unpin[1]
    done = json.loads(rolled[0])
    assert (done["version"], done["left"], done["weights"], done["live"]) == (2, 4, "exact", True)
    assert json.loads(pruned[0])["live"]
    assert [row["version"] for row in answer("versions", run) if row["head"]] == [2]
    messages = (run / "metrics.jsonl").read_text()
    assert "asked from outside: pin 1: pinned" in messages
    assert "asked from outside: rollback 2: rolled back from v4 to v2" in messages
    for setting in ("keep.archived=1", "keep.trainer_states=1"):
        refused = lora_grpo("prune", run, setting)
        assert refused.returncode == 2
        assert f"is live and prunes by its own settings; remove {setting}, or stop it" in refused.stderr


def test_a_request_that_is_not_answered_in_time_is_taken_back(live: tuple[Path, subprocess.Popen[str]]) -> None:
    run, training = live
    assert training.stdout is not None
    late = lora_grpo("rollback", run, "--to", "1", "--timeout", "0.2")
    assert late.returncode == 2
    assert f"process {training.pid} on " in late.stderr
    assert "nothing has changed" in late.stderr
    let_on(training)
    assert training.stdout.readline() == "step 4\n"


def test_a_request_outlives_the_process_that_it_was_left_for(live: tuple[Path, subprocess.Popen[str]]) -> None:
    """The holder is killed before it looks: the command sees that, takes the request back and acts itself."""
    run, training = live
    asking = asked(run, "rollback", run, "--to", "2", "--json")
    training.kill()
    out, err = asking.communicate(timeout=60)
    assert asking.returncode == 0, err
    assert json.loads(out)["live"] is False
    assert list((run / "requests").iterdir()) == []
    with AdapterStore(archive=run, readonly=True) as store:
        assert store.head is not None
        assert store.head.number == 2


@pytest.mark.parametrize("name", ["options", "versions", "serve", "using", "train"])
def test_commands_load_nothing_heavy_before_they_run(name: str) -> None:
    program = f"import sys, lora_grpo.cli.{name}; print({{'torch', 'vllm', 'pydantic', 'xxhash'}} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


@pytest.mark.parametrize(
    "arguments", [["versions"], ["show", "2"], ["pin", "2"], ["rollback", "--to", "2"], ["verify"], ["prune"]]
)
def test_commands_without_tensors_load_no_torch(run: Path, arguments: list[str]) -> None:
    program = (
        "import sys; from lora_grpo import cli; sys.argv[1:] = sys.argv[1:]\n"
        "try: cli.app(prog_name='lora-grpo')\n"
        "except SystemExit as end: print('torch' in sys.modules, end.code, file=sys.stderr)\n"
    )
    line = [sys.executable, "-c", program, arguments[0], str(run), *arguments[1:]]
    done = subprocess.run(line, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "False 0", done.stderr
