"""One run of the suite: look at the machine, make the models, measure every part, and put the figures together."""

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from lora_grpo.adapters.files.disk import tmpfs_home
from lora_grpo.bench import fidelity, host, serving, shapes, sync
from lora_grpo.bench.gauges import adapter_crossing, floor_seconds, weights_crossing
from lora_grpo.bench.joining import finished, read_document
from lora_grpo.bench.plan import NATIVE, TABLES, Cell, Settings, Subject, by_strategy, compared, one_at_a_time
from lora_grpo.bench.runner import Partial, Progress, Runner, WorkerProcess
from lora_grpo.bench.schema import Document
from lora_grpo.bench.strategy import memory_cells
from lora_grpo.errors import ConfigError

CELLS: dict[str, Callable[[Settings, Subject], list[Cell]]] = {
    "sync": sync.sync_cells,
    "memory": memory_cells,
    "decode": serving.decode_cells,
    "fidelity": fidelity.cells,
    "step": serving.step_cells,
    "rollback": sync.rollback_cells,
    "endurance": sync.endurance_cells,
}
ROWS: dict[str, Callable[[Mapping[str, Any]], list[Any]]] = {
    "sync": sync.sync_rows,
    "decode": serving.decode_rows,
    "step": serving.step_rows,
    "rollback": sync.rollback_rows,
}
"""Of the tables in which strategies are compared; of others, each thing that was found is a row."""
PARTIAL, RESULTS = "partial.json", "results.json"
LEAST_TMPFS = 2 << 30  # bytes on /dev/shm for the versions that are kept, up to 8 of a 7B's


class Suite:
    """Build it (which checks everything that can be checked), then `run` it; `document` says what was measured, also
    after Ctrl-C; `close` it, and what it put on tmpfs goes."""

    def __init__(self, parts: Mapping[str, Settings], command: str, out: Path | None, models: Path | None) -> None:
        """`out` keeps results for a cut-off run to go on from, `models` the models that are made. Raises `ConfigError`,
        before anything is measured, for a device, model or size that cannot be, or another run's result in `out`."""
        if out is not None and (holds := finished_command(out, other_than=parts)):
            raise ConfigError(f"{out} holds the finished result of another run ({holds}); use another --out")
        self._parts, self._command, self._out = parts, command, out
        self._in_turn = any(settings.takes_turns for settings in parts.values())
        self._started_at, started = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.monotonic()
        # None while cells are left.
        self._failures: list[str] | None = None
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            self._tmpfs = _own_folder(opened, "lora-grpo-bench-", _fastest_folder())
            self._disk = _own_folder(opened, ".lora-grpo-bench-", out or Path.cwd())
            self._models = models or self._tmpfs / "models"
            self._home = out or self._disk
            self._log = self._home / "workers.log"
            self._host = WorkerProcess(self._log, alone=True)
            opened.callback(self._host.close)
            self._look(started)
            self.close = opened.pop_all().close

    def _look(self, started: float) -> None:
        self._oracles: dict[Any, dict[str, Any]] = {}
        (device,) = {settings.device for settings in self._parts.values()}
        seen = self._host.do(host.look, device=device)
        self._sizes, self._shares = dict[str, dict[str, int]](), dict[str, float]()
        for part, asked in self._parts.items():
            if asked.label not in self._sizes:
                self._sizes[asked.label] = self._host.do(host.measure_model, shape=asked.shape, model=asked.model)
            self._shares[asked.label] = host.engine_share(part, asked, self._sizes[asked.label], seen["memory_bytes"])
        dumped = {part: settings.model_dump(mode="json") for part, settings in self._parts.items()}
        machine = {name: value for name, value in seen["card"].items() if name != "load_average_1min"}
        kept = {"settings": dumped, "machine": machine}
        self._partial = Partial(self._home / PARTIAL, kept, seen["bandwidth"], started)
        self.card = {**seen["card"], **self._floors(device)}
        note = f"/dev/shm has less than {LEAST_TMPFS >> 30} GiB free: versions were in {self._tmpfs}."
        if not self._tmpfs.is_relative_to("/dev/shm") and note not in self._partial.notes:
            self._partial.notes.append(note)

    def _floors(self, device: str) -> dict[str, Any]:
        lines: dict[str, Any] = {}
        for settings in self._parts.values():
            model = self._sizes[settings.label]
            adapter, whole = 2 * settings.rank * model["linear_inputs_and_outputs"], 2 * model["parameters"]
            adapter_s = floor_seconds(adapter_crossing(device, adapter), self._partial.bandwidth)
            whole_s = floor_seconds(weights_crossing(device, whole), self._partial.bandwidth)
            lines[settings.label] = (
                f"{model['parameters'] / 1e6:.0f} M parameters, {whole / 1e6:.0f} MB in bf16 (floor {1e3 * whole_s:.1f}"
                f" ms); adapter r={settings.rank} all-linear {adapter / 1e6:.1f} MB (floor {1e3 * adapter_s:.2f} ms)"
            )
        return lines

    def run(self, progress: Progress) -> None:
        models = {part: self._model(settings, progress) for part, settings in self._parts.items()}
        cells = [self._told(cell, progress) for cell in self._cells(models)]
        self._host.close()
        runner = Runner(self._log, progress, alive_at_once=1 if self._in_turn else 2)
        self._failures = runner.run(cells, self._partial)

    @property
    def rounds(self) -> int:
        return sum(len(cell.order) for cell in self._cells(dict.fromkeys(self._parts, "")))

    def document(self) -> Document:
        tables = finished(rows(self._partial), self.card["device"])
        verdicts = [text for row in tables["truth"] if (text := fidelity.verdict(row))]
        return Document(
            command=self._command,
            started_at=self._started_at,
            seconds=self._partial.seconds,
            complete=self._failures == [],
            card=self.card,
            bandwidth_bytes_per_s=self._partial.bandwidth,
            settings=dict(self._parts),
            failures=[*(self._failures or ()), *verdicts],
            notes=self._partial.notes,
            **tables,
        )

    def finish(self, document: Document) -> Path | None:
        """Write the results; a finished run leaves nothing to go on from. Returns where they are: None without `out`,
        and where a cut-off run would replace a finished one."""
        if self._out is None:
            return None
        if document.complete:
            for path in (self._partial.path, self._log):
                path.unlink(missing_ok=True)
        else:
            self._partial.save()
            if finished_command(self._out):
                return None
        (self._out / RESULTS).write_text(document.model_dump_json(indent=1) + "\n")
        return self._out

    def _cells(self, models: Mapping[str, str]) -> list[Cell]:
        cells: list[Cell] = []
        for part, settings in self._parts.items():
            labels = {"shape": settings.label, "engine": settings.engine}
            made = CELLS[part](settings, self._subject(settings, models[part]))
            cells += [replace(cell, labels={**labels, **cell.labels}) for cell in made]
        return one_at_a_time(cells) if self._in_turn else by_strategy(cells)

    def _told(self, cell: Cell, progress: Progress) -> Cell:
        """A cell that asks for the truth is told what the fp32 reference says, computed before any strategy starts."""
        if cell.table != "truth" or cell.key in self._partial.cells:
            return cell
        subject = cell.subjects[0]
        key = (subject.model, subject.rank, subject.targets, subject.seed)
        if key not in self._oracles:
            progress(f"reference in fp32: {subject.model}", 0)
            self._oracles[key] = self._host.do(fidelity.oracle, subject=subject)
        return replace(cell, arguments=self._oracles[key])

    def _model(self, settings: Settings, progress: Progress) -> str:
        """A hub name or directory; a shape's model is made first."""
        if settings.model is not None:
            return settings.model
        progress(f"making {settings.shape}", 0)
        directory = self._models / f"{settings.shape}-seed{settings.seed}"
        how = {"name": settings.shape, "directory": directory, "device": settings.device, "seed": settings.seed}
        return str(self._host.do(shapes.write_model, **how))

    def _subject(self, settings: Settings, model: str) -> Subject:
        asked = ("rank", "targets", "device", "max_model_len", "max_num_seqs", "graphs", "seed")
        return Subject(
            strategy=NATIVE,
            model=model,
            tmpfs=str(self._tmpfs),
            disk=str(self._disk),
            gpu_memory_utilization=self._shares[settings.label],
            rows=settings.rows if settings.graphs == "alone" else (),
            kv_cache_memory_bytes=None if settings.device == "cpu" else host.KV_CACHE_BYTES,
            **{name: getattr(settings, name) for name in asked},
        )


def finished_command(out: Path, *, other_than: Mapping[str, Settings] | None = None) -> str | None:
    """The command whose finished result `out` holds, if it does, and with other settings than those that are given."""
    if not (out / RESULTS).exists():
        return None
    found = read_document(out / RESULTS)
    return found.command if found.complete and found.settings != other_than else None


def rows(measured: Partial) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {table: [] for table in TABLES}
    for cell in compared(measured.cells):
        found[cell["table"]] += ROWS.get(cell["table"], rows_of_one)({**cell, "bandwidth": measured.bandwidth})
    return found


def _own_folder(opened: ExitStack, prefix: str, parent: Path) -> Path:
    own = tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
    return Path(opened.enter_context(own))


def _fastest_folder() -> Path:
    home = tmpfs_home()
    return home if shutil.disk_usage(home).free >= LEAST_TMPFS else Path(tempfile.gettempdir())


def rows_of_one(cell: Mapping[str, Any]) -> list[Any]:
    (done,), (row,) = cell["rounds"], get_args(Document.model_fields[cell["table"]].annotation)
    return [row(strategy=done["strategy"], **cell["labels"], **found) for found in done["result"]]
