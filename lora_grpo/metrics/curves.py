"""The curves that tell how a run went: SVG paths for its page, and pictures of one run or of several."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from lora_grpo.errors import StoreError
from lora_grpo.metrics.log import Record, history, read_metrics
from lora_grpo.metrics.render import GAP, PHASES, SIGNAL, number

PLOT_FILE = "plot.png"
Points: TypeAlias = tuple[Sequence[float], Sequence[float]]  # steps and values
SMOOTHING, SECONDS = 0.7, "Seconds a step"
MOST_POINTS, MOST_MARKS = 300, 100
WIDTH, HEIGHT = 600, 160  # of a panel on the page


@dataclass(frozen=True)
class Panel:
    title: str
    lines: dict[str, Points]
    all_marks: Sequence[tuple[float, str]]  # where the run went back or its canary failed, and why
    crop: bool  # a slow first step (warm-up) does not flatten the others

    @cached_property
    def limits(self) -> tuple[float, float]:
        values = [value for _, values in self.lines.values() for value in values]
        low, high = min(0.0, *values), max(0.0, *values)
        if self.crop:
            high = min(high, 3 * max(statistics.median(values) for _, values in self.lines.values())) or high
        return low, high

    @cached_property
    def ends(self) -> tuple[float, float]:
        steps = [step for steps, _ in self.lines.values() for step in steps]
        return min(steps), max(steps)

    @property
    def marks(self) -> list[tuple[float, str]]:
        """Those beside the curves. Who went back to before the first step is at its place."""
        first, last = self.ends
        return [(max(step, first), why) for step, why in self.all_marks if first - 1 <= step <= last][-MOST_MARKS:]

    def x(self, step: float) -> float:
        first, last = self.ends
        return round((step - first) / ((last - first) or 1) * WIDTH, 1)

    def y(self, value: float) -> float:
        low, high = self.limits
        return round(HEIGHT * (1 - (min(value, high) - low) / ((high - low) or 1)), 1)

    @cached_property
    def paths(self) -> list[tuple[str, str, str]]:
        """Of each line its name with its last value, its SVG path, and its CSS class."""
        drawn = []
        for index, (name, (steps, values)) in enumerate(self.lines.items()):
            each = -(-len(steps) // MOST_POINTS)  # a point is the mean of so many neighbours
            starts = range(0, len(steps), each)
            x, y = ([statistics.fmean(axis[start : start + each]) for start in starts] for axis in (steps, values))
            path = "M" + " L".join(f"{self.x(step)} {self.y(value)}" for step, value in zip(x, y, strict=True)) + " h0"
            drawn.append((f"{name} {number(values[-1])}", path, "lost" if name == "given up" else f"c{index % 4}"))
        return drawn


def panels(records: Sequence[Record], given_up: Sequence[Record] = ()) -> list[Panel]:
    """Of the run as it counts; the steps that a rollback or a resume went back before are a line of their own."""
    steps, evaluations = ([one for one in records if one["event"] == kind] for kind in ("step", "evaluation"))
    at, rewards = series(steps, "reward")
    shown = {"each step": (at, rewards), "smoothed": (at, smoothed(rewards))}
    titled = {
        "Reward of the sampled completions": {**shown, "given up": series(given_up, "reward")},
        "Held-out reward": {"reward": series(evaluations, "reward")},
        "Log-prob gap, trainer to sampler, nats a token": {"gap": series(steps, GAP)},
        "Share of groups whose rewards differ": {"signal": series(steps, SIGNAL)},
        "Length of completions, tokens": {"mean": series(steps, "completions/mean_length")},
        SECONDS: {phase: series(steps, f"time/{phase}_s") for phase in PHASES},
    }
    marks = [(r["step"], "canary failed") for r in steps if r.get("canary/verdict") == "failed"]
    marks += [(r["step"], str(r["text"])) for r in records if r["event"] == "rollback"]
    found = [
        Panel(title, {name: line for name, line in lines.items() if line[0]}, sorted(marks), crop=title == SECONDS)
        for title, lines in titled.items()
    ]
    return [panel for panel in found if panel.lines]


def series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values where the metric is there and finite."""
    found = [(record["step"], float(record[name])) for record in records if record.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average, debiased, so that it starts at the first value."""
    smooth, total = list[float](), 0.0
    for count, value in enumerate(values, 1):
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        smooth.append(total / (1 - SMOOTHING**count))
    return smooth


def plot_curves(runs: Mapping[str, Sequence[Record]], path: Path, best: str) -> None:
    """Draws the reward of several runs, by name, each a list of its steps' records; `best` stands out."""
    from matplotlib import colormaps

    figure = _figure(11, 6)
    axes = figure.subplots()
    colours = colormaps["viridis"].resampled(max(2, len(runs)))
    for index, (name, steps) in enumerate(runs.items()):
        x, reward = series(steps, "reward")
        first = name == best
        style = {"color": "#d9722b", "linewidth": 2.5, "zorder": 3} if first else {"color": colours(index)}
        axes.plot(x, smoothed(reward), label=f"{name} (best)" if first else name, **style)
        # A curve that ends before the others is a member that was stopped.
        axes.plot(x[-1:], smoothed(reward)[-1:], "o", markersize=4, color=style["color"])
    _style(axes, "Reward of the sampled completions (smoothed)")
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def plot_run(run_dir: str | Path) -> Path:
    """Draws the curves of a run's page into `RUN/plot.png`. Raises `StoreError` if the run has no step yet."""
    run_dir = Path(run_dir)
    records = history(read_metrics(run_dir))
    if not any(record["event"] == "step" for record in records):
        raise StoreError(f"{run_dir} has no finished step to plot")
    shown = panels(records)
    figure = _figure(11, 9)
    for index, panel in enumerate(shown, 1):
        axes = figure.add_subplot(-(-len(shown) // 2), 2, index)
        for name, (steps, values) in panel.lines.items():
            style: dict[str, Any] = {"alpha": 0.3, "linewidth": 1} if name == "each step" else {}
            axes.plot(steps, values, "." if len(steps) == 1 else "-", label=f"{name} {number(values[-1])}", **style)
        for place, (step, _) in enumerate(panel.marks):
            axes.axvline(step, color="#c0392b", linewidth=1, label=None if place else "rollback or failed canary")
        low, high = panel.limits
        axes.set_ylim(low, high + (0.05 * (high - low) or 1))
        _style(axes, panel.title)
        axes.legend(frameon=False, fontsize=8)
    models = ["", *(record["info"].get("model") for record in records if record["event"] == "start")]
    figure.suptitle(f"{run_dir.name}   {models[-1] or ''}", x=0.01, ha="left", fontsize=11, color="#333333")
    path = run_dir / PLOT_FILE
    figure.savefig(path)
    return path


def _figure(width: float, height: float) -> Any:
    """Of its own, without pyplot: no global state, and no window system asked for."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))


def _style(axes: Any, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("step", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
