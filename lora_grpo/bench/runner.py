"""Runs cells: starts what each needs, keeps alive what the next can use, keeps every result the moment it is there.

A worker is a process with one strategy alive in it, told what to do request by request. Our own errors are replies; any
other ends the process, and its log, which the parent quotes, has the traceback."""

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

from lora_grpo.adapters.files.disk import replace_file
from lora_grpo.bench.plan import Cell, Subject, load_strategy
from lora_grpo.engines import compat
from lora_grpo.errors import ConfigError, EngineError, LoraGrpoError
from lora_grpo.metrics.log import capture_output

Progress: TypeAlias = Callable[[str, int], None]  # what is being done, and how many rounds were just finished
_GRACE_S = 20.0
_IMPORTED = f"{__package__}.imported"  # where it is, so is all that a worker needs, and no thread or CUDA is started


class Partial:
    """Results of finished cells in a file, for a cut-off run to go on from."""

    def __init__(self, path: Path, fingerprint: dict[str, Any], bandwidth: dict[str, float], started: float) -> None:
        """`bandwidth` is of this start, begun at `started` (monotonic); a run that is gone on with keeps its first
        start's. Raises `ConfigError` when the file is of a run with other settings or on another machine."""
        self.path, self._fingerprint, self.bandwidth, self._started = path, fingerprint, bandwidth, started
        self.cells, self.notes = dict[str, Any](), list[str]()
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["fingerprint"] != fingerprint:
                unlike = "holds an unfinished run with other settings or versions, or of another machine"
                raise ConfigError(f"{path} {unlike}; use another --out, or remove the file")
            self.cells, self.bandwidth, self.notes = stored["cells"], stored["bandwidth"], stored["notes"]
            self._started -= stored.get("seconds", 0.0)

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, all its starts together (of one that was killed, up to what it saved)."""
        return time.monotonic() - self._started

    def keep(self, key: str, result: dict[str, Any]) -> None:
        self.cells[key] = result
        self.save()

    def save(self) -> None:
        fields = {"fingerprint": self._fingerprint, "bandwidth": self.bandwidth, "seconds": self.seconds}
        replace_file(self.path, json.dumps({**fields, "notes": self.notes, "cells": self.cells}).encode(), sync=False)


class WorkerProcess:
    """What it prints goes to `log`. `alone`: it imports by itself, when it needs to, and shares no memory with others:
    for one whose memory is measured, and for CUDA, which a fork cannot start where importing has."""

    def __init__(self, log: Path, *, alone: bool = False) -> None:
        self._log = log
        self._channel, theirs = multiprocessing.Pipe()
        self._process = _context(log, alone).Process(target=serve, args=(theirs, str(log)))
        try:
            self._process.start()
        except (EOFError, OSError):
            raise EngineError(f"no worker could be started; {self._last_words()}") from None
        theirs.close()

    def do(self, work: Callable[..., Any], **arguments: Any) -> Any:
        """Have a function of a module called; returns its result. Raises `EngineError` when it failed. A strategy stays
        there: all later work is given it first."""
        try:
            self._channel.send((work, arguments))
            reply = self._channel.recv()
        except (EOFError, OSError):
            self._process.join()
            raise EngineError(f"a worker died with exit code {self._process.exitcode}; {self._last_words()}") from None
        if isinstance(reply, LoraGrpoError):
            raise reply
        return reply

    def close(self) -> None:
        with suppress(OSError):
            self._channel.send(None)
        self._process.join(_GRACE_S)
        self.kill()
        self._channel.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _last_words(self) -> str:
        with open(self._log, errors="replace") as log:
            last = " | ".join(line.strip() for line in deque(log, maxlen=3))
        return f"its log ({self._log}) ends: {last}"


def _context(log: Path, alone: bool) -> Any:
    """Where workers come from: importing takes as long as loading a small model, so it is done once for all."""
    if _IMPORTED in sys.modules:
        return multiprocessing.get_context("fork")
    if alone:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_IMPORTED])
    with capture_output(log):
        forkserver.ensure_running()
    return context


def serve(requests: Connection, log: str) -> None:
    """The worker: answer until None is asked, or nobody is left to ask; what vLLM and PEFT print goes to `log`."""
    # Ctrl-C reaches the parent alone, which keeps what was measured.
    os.setsid()
    with open(log, "ab") as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
    # PR_SET_PDEATHSIG: in the middle of a long piece of work, too, it does not outlive whoever asked for it.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    loaded: list[Any] = []
    with suppress(EOFError):
        for work, arguments in iter(requests.recv, None):
            try:
                result = work(*loaded, **arguments)
                if work is load:
                    loaded, result = [result], None
                requests.send(result)
            except LoraGrpoError as error:
                requests.send(error)
    for strategy in loaded:
        strategy.close()


def load(subject: Subject) -> Any:
    compat.import_vllm()
    return load_strategy(subject.strategy)(subject)


def give_back(strategy: Any) -> None:
    """Worker: what garbage and torch's cache still hold of a GPU goes back to it, for whoever measures next there."""
    from lora_grpo.bench.gauges import collect  # brings torch, before which a worker has to have left Ctrl-C's group

    collect(strategy.subject.device)


class Runner:
    def __init__(self, log: Path, progress: Progress, *, alive_at_once: int) -> None:
        self._log, self._progress, self._alive_at_once = log, progress, alive_at_once
        self._alive, self._broken = dict[Subject, WorkerProcess](), set[Subject]()

    def run(self, cells: Sequence[Cell], partial: Partial) -> list[str]:
        """Run what `partial` does not hold yet; returns a sentence for each cell that failed. No worker outlives it."""
        failures = []
        try:
            for cell in cells:
                if cell.key in partial.cells:
                    self._progress(f"{cell.key}: kept from before", len(cell.order))
                    continue
                try:
                    partial.keep(cell.key, self._measure(cell))
                except LoraGrpoError as error:
                    failures.append(f"{cell.key} failed: {error}")
                    self._stop(cell.subjects)
            self._stop(tuple(self._alive))
        except BaseException:
            for worker in self._alive.values():
                worker.kill()
            raise
        return failures

    def _measure(self, cell: Cell) -> dict[str, Any]:
        workers = self._start(cell)
        for subject, worker in zip(cell.subjects, workers, strict=True):
            if cell.warm is not None:
                self._progress(f"{cell.key}: {subject.strategy} warms up", 0)
                worker.do(cell.work, **cell.warm)
        rounds = []
        for index in cell.order:
            strategy = cell.name or cell.subjects[index].strategy
            self._progress(doing := f"{cell.key}: {strategy}", 0)
            rounds.append({"strategy": strategy, "result": workers[index].do(cell.work, **cell.arguments)})
            self._progress(doing, 1)
        if cell.fresh:
            self._stop(cell.subjects)
        else:
            for worker in workers:
                worker.do(give_back)
        return {"table": cell.table, "labels": cell.labels, "rounds": rounds}

    def _start(self, cell: Cell) -> list[WorkerProcess]:
        if cell.fresh:
            self._stop(tuple(self._alive))
        missing = [subject for subject in cell.subjects if subject not in self._alive]
        idle = [subject for subject in self._alive if subject not in cell.subjects]
        room = self._alive_at_once - len(cell.subjects)
        self._stop(idle[: max(0, len(idle) - room)] if missing else ())
        for subject in missing:
            if subject in self._broken:
                # Each try takes half a minute of a GPU.
                raise EngineError(f"{subject.strategy} has not started before")
            self._progress(f"{cell.key}: starting {subject.strategy}", 0)
            # One after the other: engines on one GPU size their caches by what is free when they start.
            self._alive[subject] = WorkerProcess(self._log, alone=cell.fresh or subject.device != "cpu")
            self._broken.add(subject)
            self._alive[subject].do(load, subject=subject)
            self._broken.remove(subject)
        return [self._alive[subject] for subject in cell.subjects]

    def _stop(self, subjects: Sequence[Subject]) -> None:
        for subject in subjects:
            if subject in self._alive:
                self._alive.pop(subject).close()
