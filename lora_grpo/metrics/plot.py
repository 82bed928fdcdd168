"""A run, or several, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_grpo.errors import StoreError
from lora_grpo.metrics.log import Record, history, read_metrics
from lora_grpo.metrics.panels import marks, panels, series, smoothed
from lora_grpo.metrics.render import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_FILE = "plot.png"
FAINT = {"alpha": 0.3, "linewidth": 1}
STYLES: dict[str, dict[str, Any]] = {"each step": FAINT, "given up": {"color": "#8a8f98", "linestyle": ":"}}


def plot_curves(runs: Mapping[str, Sequence[Record]], path: Path, best: str | None = None) -> Path:
    """Draws the reward of several runs, by name, each a list of its steps' records; `best` stands out."""
    from matplotlib import colormaps

    figure = _figure(11, 6)
    axes = figure.subplots()
    colours = colormaps["viridis"].resampled(max(2, len(runs)))
    for index, (name, steps) in enumerate(runs.items()):
        x, reward = series(list(steps), "reward")
        first = name == best
        style = {"color": "#d9722b", "linewidth": 2.5, "zorder": 3} if first else {"color": colours(index)}
        axes.plot(x, smoothed(reward), label=f"{name} (best)" if first else name, **style)
        # A curve that ends before the others is a member that was stopped.
        axes.plot(x[-1:], smoothed(reward)[-1:], "o", markersize=4, color=style["color"])
    _style(axes, "Reward of the sampled completions (smoothed)")
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
    return path


def plot_run(run_dir: str | Path) -> Path:
    """Draws what a run's page shows as curves into `RUN/plot.png`, and returns its path.

    Raises `StoreError` if the run has no step yet.
    """
    run_dir = Path(run_dir)
    records = history(read_metrics(run_dir))
    shown = panels(records)
    if not any(record["event"] == "step" for record in records):
        raise StoreError(f"{run_dir} has no finished step to plot")
    figure = _figure(11, 9)
    for index, panel in enumerate(shown, 1):
        axes = figure.add_subplot(-(-len(shown) // 2), 2, index)
        for name, (steps, values) in panel.lines.items():
            label = f"{name} {number(values[-1])}"
            axes.plot(steps, values, "." if len(steps) == 1 else "-", label=label, **STYLES.get(name, {}))
        for place, (step, _) in enumerate(marks(records)):
            axes.axvline(step, color="#c0392b", linewidth=1, label=None if place else "rollback or failed canary")
        low, high = panel.limits
        axes.set_ylim(low, high + (0.05 * (high - low) or 1))
        _style(axes, panel.title)
        axes.legend(frameon=False, fontsize=8)
    models = [record.get("info", {}).get("model") for record in records if record["event"] == "start"]
    title = f"{run_dir.name}   {models[-1] or ''}" if models else run_dir.name
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color="#333333")
    path = run_dir / PLOT_FILE
    figure.savefig(path)
    return path


def _figure(width: float, height: float) -> Figure:
    """Of its own, without pyplot: no global state, and no window system asked for."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))


def _style(axes: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("step", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
