"""A run as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.errors import StoreError
from lora_grpo.metrics.log import Record, history, read_metrics
from lora_grpo.metrics.render import GAP, PHASES, SIGNAL, headline, phase_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_FILE = "plot.png"
BLUE, ORANGE, GREY = "#2a6fbb", "#d9722b", "#8a8f98"
PHASE_COLOURS = {"generate": "#4c9bb8", "reward": "#e0b13c", "train": "#9a63a8", "publish": "#4f9d69"}
SMOOTHING = 0.7


def plot_curves(runs: Mapping[str, Sequence[Record]], path: Path, best: str | None = None) -> Path:
    """Draws the reward of several runs, by name, each a list of its steps' records; `best` stands out."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(11, 6), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title("Reward of the sampled completions (smoothed)")
    axes.set_xlabel("step")
    colours = colormaps["viridis"].resampled(max(2, len(runs)))
    for number, (name, steps) in enumerate(runs.items()):
        x, reward = series(list(steps), "reward")
        first = name == best
        style = {"color": ORANGE, "linewidth": 2.5, "zorder": 3} if first else {"color": colours(number)}
        axes.plot(x, smoothed(reward), label=f"{name} (best)" if first else name, **style)
        # A curve that ends before the others is a member that was stopped.
        axes.plot(x[-1:], smoothed(reward)[-1:], "o", markersize=4, color=style["color"])
    _style(axes)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
    return path


def plot_run(run_dir: str | Path) -> Path:
    """Draws reward, held-out accuracy, log-prob gap and seconds by phase into `RUN/plot.png`, and returns its path.

    Raises `StoreError` if the run has no step yet.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    run_dir = Path(run_dir)
    records = history(read_metrics(run_dir))
    steps = [record for record in records if record["event"] == "step"]
    if not steps:
        raise StoreError(f"{run_dir} has no finished step to plot")
    # A figure of its own, without pyplot: no global state, and no window system asked for.
    figure = Figure(figsize=(11, 7), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True)
    _reward(panels[0][0], steps)
    _held_out(panels[0][1], [record for record in records if record["event"] == "evaluation"])
    _gap(panels[1][0], steps)
    _seconds(panels[1][1], steps)
    for axes in panels.flat:
        _style(axes)
    for axes in panels[1]:
        axes.set_xlabel("step")
    figure.suptitle(_title(run_dir, records), x=0.01, ha="left", fontsize=11, color="#333333")
    path = run_dir / PLOT_FILE
    figure.savefig(path)
    return path


def _reward(axes: Axes, steps: list[Record]) -> None:
    x, reward = series(steps, "reward")
    axes.set_title("Reward of the sampled completions")
    axes.plot(x, reward, color=BLUE, alpha=0.3, linewidth=1)
    axes.plot(x, smoothed(reward), color=BLUE, linewidth=2, label="reward (smoothed)")
    x_signal, signal = series(steps, SIGNAL)
    if x_signal:
        axes.plot(x_signal, signal, color=GREY, linewidth=1, linestyle=":", label="share of groups with signal")
    axes.legend(frameon=False, fontsize=8)


def _held_out(axes: Axes, evaluations: list[Record]) -> None:
    fields = {"event", "time", "step", "version"}
    points = [
        (record["step"], record["version"], headline({k: v for k, v in record.items() if k not in fields}))
        for record in evaluations
    ]
    shown = [(step, version, value) for step, version, value in points if value is not None]
    name = shown[0][2][0] if shown else "accuracy"
    axes.set_title(f"Held-out {name}")
    if not shown:
        axes.text(0.5, 0.5, "no held-out evaluation", transform=axes.transAxes, ha="center", color=GREY)
        return
    axes.plot([step for step, _, _ in shown], [value[1] for _, _, value in shown], "o-", color=ORANGE, linewidth=2)
    for index in {0, len(shown) - 1}:
        step, version, (_, value) = shown[index]
        first = index == 0
        axes.annotate(
            f"{value:.3f} ({'base' if version is None else f'v{version}'})",
            (step, value),
            textcoords="offset points",
            xytext=(9, -3) if first else (4, 9),
            ha="left" if first else "right",
            fontsize=8,
        )
    axes.margins(y=0.2)


def _gap(axes: Axes, steps: list[Record]) -> None:
    x, gap = series(steps, GAP)
    axes.set_title("Log-prob gap, trainer to sampler")
    axes.set_ylabel("nats a token")
    axes.plot(x, gap, color=BLUE, linewidth=1.5)
    failed = [record["step"] for record in steps if record.get("canary/verdict") == "failed"]
    for index, step in enumerate(failed):
        axes.axvline(step, color="#c0392b", linewidth=1, label=None if index else "canary failed")
    if any(value > 0 for value in gap):
        axes.set_ylim(bottom=0)
    if failed:
        axes.legend(frameon=False, fontsize=8)


def _seconds(axes: Axes, steps: list[Record]) -> None:
    axes.set_title("Seconds a step, by phase")
    axes.set_ylabel("seconds")
    by_step = [phase_seconds(record) for record in steps]
    present = dict.fromkeys(phase for seconds in by_step for phase in seconds)
    order = [phase for phase in PHASES if phase in present] + [phase for phase in present if phase not in PHASES]
    if not order:
        return
    # Each step is a block around its number: edges half a step to either side, the last height held to its end.
    x = [record["step"] for record in steps]
    edges = [x[0] - 0.5, *((left + right) / 2 for left, right in pairwise(x)), x[-1] + 0.5]
    heights = [[seconds.get(phase, 0.0) for seconds in (*by_step, by_step[-1])] for phase in order]
    colours = [PHASE_COLOURS.get(phase, GREY) for phase in order]
    axes.stackplot(edges, heights, labels=order, colors=colours, step="post", linewidth=0)
    # One slow first step (warm-up) would flatten all the others.
    totals = sorted(sum(seconds.values()) for seconds in by_step)
    axes.set_ylim(0, min(totals[-1] * 1.1, totals[len(totals) // 2] * 2) or 1)
    axes.legend(frameon=False, fontsize=8, ncols=len(order), loc="upper right")


def series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values where the metric is there and finite."""
    found = [(record["step"], float(record[name])) for record in records if record.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average, debiased, so that it starts at the first value."""
    smooth: list[float] = []
    total = weight = 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append(total / weight)
    return smooth


def _title(run_dir: Path, records: list[Record]) -> str:
    starts: list[dict[str, Any]] = [record.get("info") or {} for record in records if record["event"] == "start"]
    model = starts[-1].get("model") if starts else None
    return f"{run_dir.name}   {model}" if model else run_dir.name


def _style(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(axes.get_title(), loc="left", fontsize=10, fontweight="bold")
    axes.set_title("", loc="center")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
