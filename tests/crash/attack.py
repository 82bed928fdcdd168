"""Kills and failing disks at exact system calls, and broken adapters, each judged by what is left.

A trial puts a store's two halves in the same place again, lets a forked child do one thing with them, and stops it at a
call that was drawn: dead, or with an error. Then the run is opened again. No version may be lost, `HEAD` must be where
the last promotion that returned (or the one that was cut short) put it, and nothing but an error of ours may come out.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_grpo.adapters.peft_form.files import open_adapter
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.retention import keep_latest, keep_trainer_state
from lora_grpo.adapters.upkeep.rollbacks import roll_back_stopped
from lora_grpo.errors import DeliveryError, LoraGrpoError
from tests.crash.calls import ERRORS, Calls
from tests.fuzzed_adapters import fuzzed
from tests.store_files import adapter

RULES = keep_latest(3) | keep_trainer_state(keep_latest(1))
DONE, REFUSED, RAW = 0, 3, 4


@dataclass(frozen=True)
class Trial:
    """One store on disk, and what its child has told of: lines "publish NUMBER DIGEST" and "promote NUMBER"."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def other(self) -> Path:
        """Where the run is copied or moved to; a copy's root is named after it, and no other attack's may be swept."""
        return self.folder / f"other-{self.folder.parent.name}"

    def tell(self, *words: object) -> None:
        descriptor = REAL_OPEN(self.folder / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        REAL_WRITE(descriptor, (" ".join(map(str, words)) + "\n").encode())

    def told(self, word: str) -> list[list[str]]:
        lines = (self.folder / "told").read_text().splitlines() if (self.folder / "told").exists() else []
        return [line.split()[1:] for line in lines if line.split()[0] == word]

    def publish(self, store: AdapterStore, seed: int) -> int:
        version = store.publish(adapter(seed), step=seed)
        self.tell("publish", version.number, version.digest)
        return version.number

    def promote(self, store: AdapterStore, number: int) -> None:
        self.tell("promoting", number)
        store.promote(number)
        self.tell("promoted", number)


REAL_OPEN, REAL_WRITE = os.open, os.write


def _step(trial: Trial, run: Path, root: Path | None, seed: int) -> None:
    with AdapterStore(root, run, retention=RULES) as store:
        number = trial.publish(store, seed)
        trial.promote(store, number)
        store.record(number, reward=0.5)
        store.archive_state(number, {"state": [b"state"]}, {"step": seed})
        store.prune()
        store.flush()


def _back(trial: Trial, run: Path, root: Path | None, seed: int) -> None:
    with AdapterStore(root, run, retention=RULES) as store:
        trial.tell("promoting", 1)
        roll_back_stopped(store, 1)
        trial.tell("promoted", 1)
        store.prune()


def _elsewhere(trial: Trial) -> None:
    """The run went on where its root was out of sight."""
    trial.root.rename(trial.folder / "hidden")
    with AdapterStore(trial.root, trial.run, retention=RULES) as store:
        store.promote(store.publish(adapter(20), step=20))
    shutil.rmtree(trial.root)
    (trial.folder / "hidden").rename(trial.root)


SCENARIOS: dict[str, tuple[Callable[[Trial], object], Callable[..., None], str, bool]] = {
    "step": (lambda trial: None, _step, "run", True),
    "rollback": (lambda trial: None, _back, "run", True),
    "first opening": (lambda trial: (shutil.rmtree(trial.root), shutil.rmtree(trial.run)), _step, "run", True),
    "after a reboot": (lambda trial: shutil.rmtree(trial.root), _step, "run", False),
    "copied run": (lambda trial: shutil.copytree(trial.run, trial.other), _step, "other", False),
    "moved run": (lambda trial: trial.run.rename(trial.other), _step, "other", False),
    "stale root": (_elsewhere, _step, "run", True),
}
"""By name: how the store is prepared, what is done with it, by which run directory, and whether the root is named."""


def build(folder: Path) -> None:
    """Four versions, the third promoted, one of them in the archive alone."""
    trial = Trial(folder)
    with AdapterStore(trial.root, trial.run, retention=RULES) as store:
        for seed in (1, 2, 3, 4):
            store.publish(adapter(seed), step=seed)
        store.promote(1)
        store.promote(3)
        store.archive_state(3, {"state": [b"state"]}, {"step": 3})
        store.flush()
        store.prune()


def attempt(folder: Path, name: str, seed: int, calls: Calls) -> tuple[int, str, Calls]:
    """Let a child do it, and see how it ended: a status, and what it said."""
    trial, (_, act, place, named) = Trial(folder), SCENARIOS[name]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        ending, said = RAW, ""
        warnings.simplefilter("ignore")
        try:
            calls.watch()
            act(trial, trial.run if place == "run" else trial.other, trial.root if named else None, seed)
            ending = DONE
        except LoraGrpoError as error:
            ending, said = REFUSED, str(error)
        except BaseException:  # noqa: BLE001 - whatever it is, it is judged
            said = traceback.format_exc()
        REAL_WRITE(writing, f"{calls.count} {calls.hit} {said}".encode()[:60_000])
        os._exit(ending)
    os.close(writing)
    with open(reading, "rb") as stream:
        content = stream.read().decode()
    status = os.waitpid(child, 0)[1]
    seen = Calls()
    if content:
        count, hit, said = content.split(" ", 2)
        seen.count, seen.hit = int(count), hit
        return os.waitstatus_to_exitcode(status), said, seen
    return os.waitstatus_to_exitcode(status), "", seen


def judge(folder: Path, name: str, before: dict[int, str], head: int | None) -> str | None:
    """What is wrong with the store that a trial left; None for nothing."""
    trial, (_, _, place, named) = Trial(folder), SCENARIOS[name]
    worked_on = trial.run if place == "run" else trial.other
    published = {int(number): digest for number, digest in trial.told("publish")}
    for number, digest in published.items():
        if before.get(number, digest) != digest:
            return f"number {number} was given out twice"
    promoted = [int(number) for (number,) in trial.told("promoted")]
    promoting = [int(number) for (number,) in trial.told("promoting")]
    heads = {promoted[-1] if promoted else head, promoting[-1] if promoting else head}
    if name == "copied run":
        wrong = _left(trial.run, None, before, {head})
        if wrong is not None:
            return f"the original: {wrong}"
    expected = {**before, **published}
    if not (worked_on / "store.json").exists():
        return "the run is gone" if before else None
    return _left(worked_on, trial.root if named else None, expected, heads)


def _left(run: Path, root: Path | None, expected: dict[int, str], heads: set[int | None]) -> str | None:
    try:
        with AdapterStore(root, run) as store:
            found = {version.number: version.digest for version in store.list()}
            for number in found:
                store.verify(number)
            if lost := sorted(number for number in expected if found.get(number) != expected[number]):
                return f"versions {lost} are lost: {store.recovered}"
            number = None if store.head is None else store.head.number
            if number not in heads:
                return f"HEAD is {number}, and not of {heads}"
            temporaries = [path.name for path in (*store.root.glob(".*"), *run.glob(".*"))]
            return f"{temporaries} are left" if temporaries else None
    except Exception:  # noqa: BLE001 - whatever it is, it is judged
        return traceback.format_exc()


def attack(folder: Path, seed: int, kills: int, errors: int) -> dict[str, Any]:
    """Every scenario in turn, at calls drawn without repetition as long as there are others."""
    draw, folder = random.Random(seed), folder / "trial"
    table, wrong, where = Counter[str](), [], Counter[str]()
    warnings.simplefilter("ignore")
    left: dict[tuple[str, str], list[int]] = {}
    index, killed, failed = 0, 0, 0
    while killed < kills or failed < errors:
        name, kind = list(SCENARIOS)[index % len(SCENARIOS)], "kill" if killed < kills else "error"
        index += 1
        before, head = prepare(folder, name)
        if not left.get((name, kind)):
            status, said, seen = attempt(folder, name, 9, Calls())
            assert status == DONE, said
            count = seen.count
            left[name, kind] = draw.sample(range(1, count + 1), count)
            before, head = prepare(folder, name)
        stop = left[name, kind].pop()
        error = draw.choice(ERRORS) if kind == "error" else None
        status, said, seen = attempt(folder, name, 9, Calls(stop, after=draw.random() < 0.5, error=error))
        ending = {DONE: "done all the same", REFUSED: "our error", RAW: "RAW", -signal.SIGKILL: "killed"}[status]
        if status == DONE and seen.hit is None:
            # Threads make the number of calls vary: this one was over before its call came.
            continue
        killed, failed = killed + (kind == "kill"), failed + (kind == "error")
        table[f"{kind}: {ending}"] += 1
        table[f"{kind}s in: {name}"] += 1
        if error is not None and seen.hit:
            where[f"{os.strerror(error)} in {seen.hit}"] += 1
        trouble = said if status == RAW else judge(folder, name, before, head)
        if trouble is not None:
            wrong.append({"scenario": name, "kind": kind, "call": stop, "error": error, "trouble": trouble})
    shutil.rmtree(folder, ignore_errors=True)
    table["errors: different pairs of error and call"] = len(where)
    return {"kills": killed, "errors": failed, "table": dict(sorted(table.items())), "wrong": wrong}


def prepare(folder: Path, name: str) -> tuple[dict[int, str], int | None]:
    """The store of a scenario, in its place; its versions, and which is promoted."""
    template, trial = folder.with_name("template"), Trial(folder)
    if not template.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        build(folder)
        folder.rename(template)
    for leftover in _roots_of_copies(trial):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder, symlinks=True)
    SCENARIOS[name][0](trial)
    if not trial.run.exists() and not trial.other.exists():
        return {}, None
    with AdapterStore(archive=trial.run if trial.run.exists() else trial.other, readonly=True) as store:
        return {version.number: version.digest for version in store.list()}, store.head.number if store.head else None


def _roots_of_copies(trial: Trial) -> list[Path]:
    return list(Path("/dev/shm").glob(f"lora-grpo-{trial.other.name}-*")) if trial.other.exists() else []


def fuzz(folder: Path, seed: int, adapters: int) -> dict[str, Any]:
    """Publish broken adapters and open each as an engine would; the promoted version stays what it was."""
    table, wrong = Counter[str](), []
    warnings.simplefilter("ignore")
    with AdapterStore(folder / "fuzzed", retention=keep_latest(2)) as store:
        good = store.publish(adapter(1), step=0)
        store.promote(good)
        for index in range(adapters):
            weights, config = fuzzed(seed * adapters + index)
            files = {"adapter_model.safetensors": [weights], "adapter_config.json": [config]}
            version = store.publish(files, step=index)
            try:
                open_adapter(version)
                table["opened: still in serving form"] += 1
            except DeliveryError:
                table["refused: DeliveryError"] += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, it is judged
                wrong.append({"seed": seed * adapters + index, "trouble": f"{type(error).__name__}: {error}"})
            if store.head != good:
                wrong.append({"seed": seed * adapters + index, "trouble": f"HEAD is {store.head}"})
            store.prune()
        store.verify(good.number)
    return {"adapters": adapters, "table": dict(table), "wrong": wrong}
