"""Files of a run, each spoiled in turn, and what every command makes of it.

A trial puts a trained run in its place, spoils one file of its directory, and asks it what a user would: `versions`,
`show`, `verify`, `export`, then `rollback` or `train --resume`. Each works or ends in an error of ours, none in a
traceback. What an export, a rollback or a resume gives is to the bit the version that it names; `verify` does not call
a version sound whose files are not.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.cli import app
from lora_grpo.config import DataConfig, LoraSettings, ModelConfig, RewardConfig, RunConfig
from lora_grpo.trainer import build, build_trainer
from tests.tiny_models import tiny_model
from tests.tiny_run import fake_engine
from tests.tiny_trainer import CONFIG, ROWS, tiny_trainer

KINDS = ("truncate", "flip", "empty", "folder", "type")
STEPS = CONFIG.replace(total_steps=3, vllm_importance_sampling_correction=False)
WEIGHTS = "adapter_model.safetensors"
WRONG: tuple[Any, ...] = ([1], "x", None, {}, -1, 1e400, True)


@dataclass
class Sweep:
    """A run and where its copies are put. `exports` holds what each version may be exported as: exact, or rounded."""

    folder: Path
    trainers: list[Any] = field(default_factory=list)
    exports: dict[int, list[bytes]] = field(default_factory=dict)
    served: dict[int, bytes] = field(default_factory=dict)
    states: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def place(self) -> None:
        """The run as it was left, its root on tmpfs too."""
        for half in ("run", "root"):
            shutil.rmtree(self.folder / half, ignore_errors=True)
            shutil.copytree(self.folder / f"pristine-{half}", self.folder / half, symlinks=True)
        shutil.rmtree(self.folder / "exported", ignore_errors=True)

    def ask(self, *words: object) -> Any:
        return CliRunner().invoke(app, [*map(str, words)], env={"NO_COLOR": "1"})

    def export(self, number: int) -> Any:
        return self.ask("export", self.run, f"v{number}", self.folder / "exported")


@contextmanager
def trained(folder: Path) -> Iterator[Sweep]:
    """A run of three steps, which the commands find with an engine that needs no time."""
    sweep, base = Sweep(folder), tiny_model("llama", folder / "base")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def trainer(*_: Any, run_dir: str, **__: Any) -> Any:
        sweep.trainers.append(tiny_trainer(base, fake_engine(base), Path(run_dir), STEPS, store_root=folder / "root"))
        return sweep.trainers[-1]

    settings = RunConfig(
        output_dir=str(sweep.run),
        model=ModelConfig(name=str(base)),
        data=DataConfig(train=str(folder / "prompts.jsonl")),
        rewards=(RewardConfig(name="tests.tiny_trainer:share_of_low_bytes"),),
        lora=LoraSettings(r=8),
        grpo=STEPS,
    )
    with patch.object(build, "GRPOTrainer", trainer), patch("signal.signal"):
        with build_trainer(settings) as first:
            first.train()
        for half in ("run", "root"):
            (folder / half).rename(folder / f"pristine-{half}")
        _note(sweep)
        yield sweep


def _note(sweep: Sweep) -> None:
    for states in (True, False):
        for number in range(1, STEPS.total_steps + 2):
            sweep.place()
            if states:
                sweep.served[number] = (sweep.run / "versions" / f"{number:06}" / WEIGHTS).read_bytes()
                sweep.states[number] = _weights(sweep.run / "states" / f"{number:06}" / "state.safetensors")
            else:
                shutil.rmtree(sweep.run / "states")
            assert sweep.export(number).exit_code == 0
            sweep.exports.setdefault(number, []).append((sweep.folder / "exported" / WEIGHTS).read_bytes())


def _weights(file: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(file).items() if name.startswith("weights/")}


def files(sweep: Sweep) -> list[str]:
    """Every file of the run directory."""
    pristine = sweep.folder / "pristine-run"
    return sorted(str(path.relative_to(pristine)) for path in pristine.rglob("*") if path.is_file())


def spoil(path: Path, kind: str, draw: random.Random) -> bool:
    """Whether anything was changed."""
    content = path.read_bytes()
    changed = content
    if kind == "folder":
        path.unlink()
        path.mkdir()
        return True
    if kind == "truncate":
        changed = content[: draw.randrange(len(content))] if content else content
    elif kind == "empty":
        changed = b""
    elif kind == "flip" and content:
        place = draw.randrange(len(content))
        changed = content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
    elif kind == "type" and content and path.suffix in (".json", ".jsonl"):
        lines = [content.decode()] if path.suffix == ".json" else content.decode().splitlines()
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(_retyped(json.loads(lines[at]), draw))
        changed = "\n".join(lines).encode() + (b"\n" if path.suffix == ".jsonl" else b"")
    path.write_bytes(changed)
    return changed != content


def _retyped(value: Any, draw: random.Random) -> Any:
    """The document with one of its values, or all of it, of another type."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value))
        return {**value, key: _retyped(value[key], draw) if draw.random() < 0.3 else draw.choice(WRONG)}
    return draw.choice(WRONG)


def attack(sweep: Sweep, seed: int, tries: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Each file and kind of damage; what did not hold, and how often each command ended in what."""
    wrong: list[dict[str, str]] = []
    table: Counter[str] = Counter()
    for index, (name, kind) in enumerate(tries):
        draw = random.Random(f"{seed} {name} {kind}")
        number = draw.randint(1, STEPS.total_steps + 1)
        last = ("rollback", "train")[index % 2]
        sweep.place()
        if not spoil(sweep.run / name, kind, draw):
            continue
        for command, fault, code in _judged(sweep, number, name, last):
            table[f"{command} {code}"] += 1
            if fault:
                wrong.append({"file": name, "kind": kind, "command": command, "fault": fault})
    return {"wrong": wrong, "table": dict(sorted(table.items()))}


def _judged(sweep: Sweep, number: int, name: str, last: str) -> Iterator[tuple[str, str, int]]:
    """Each command with what is wrong with its answer, if anything is, and its exit code."""
    asked: dict[str, tuple[object, ...]] = {
        "versions": ("versions", sweep.run),
        "show": ("show", sweep.run, f"v{number}"),
        "verify": ("verify", sweep.run, "--json"),
        "export": ("export", sweep.run, f"v{number}", sweep.folder / "exported"),
        "rollback": ("rollback", sweep.run, "--to", number, "--timeout", 1),
        "train": ("train", sweep.run, "--resume"),
    }
    for command in (*list(asked)[:4], last):
        done = sweep.ask(*asked[command])
        yield command, _raw(command, done) or _lie(sweep, command, number, name, done), done.exit_code


def _raw(command: str, done: Any) -> str:
    """What is no answer: a traceback, or an exit without a word."""
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return f"raw {type(done.exception).__name__}: {str(done.exception)[:120]}"
    if done.exit_code == 2 and "error: " not in done.stderr:
        return f"exit code 2 without a word: {done.output[-120:]}"
    if done.exit_code not in (0, 2) and (command, done.exit_code) != ("verify", 1):
        return f"exit code {done.exit_code}: {done.output[-120:]}"
    return ""


def _lie(sweep: Sweep, command: str, number: int, name: str, done: Any) -> str:
    """An answer that is another version than it says."""
    if command == "verify":
        unseen = name.startswith(("versions/", "states/")) and done.exit_code == 0
        return f"{name} is spoiled, and verify says {done.stdout[-200:]}" if unseen else ""
    if done.exit_code:
        return ""
    if command == "export" and (sweep.folder / "exported" / WEIGHTS).read_bytes() not in sweep.exports[number]:
        return f"v{number} was exported as something else"
    if command in ("rollback", "train"):
        return _head_is_wrong(sweep, number if command == "rollback" else None)
    return ""


def _head_is_wrong(sweep: Sweep, number: int | None) -> str:
    with AdapterStore(archive=sweep.run, readonly=True) as store:
        head = store.head
    if head is None or number not in (None, head.number):
        return f"HEAD is {head}"
    if (head.path / WEIGHTS).read_bytes() != sweep.served[head.number]:
        return f"what is served as {head} is another version"
    if number is None:
        found = sweep.trainers[-1].policy.parameters
        own = sweep.states[head.number]
        far = max(
            float((found[name].detach() - tensor).abs().max())
            for name, tensor in zip(sorted(found), (own[name] for name in sorted(own)), strict=True)
        )
        # Rounded weights differ by bf16's last bits, another version by a whole step.
        if far > STEPS.learning_rate / 4:
            return f"the trainer went on from {head} with weights that differ by {far}"
    return ""
