"""What the terminal shows of a run: a live panel, or where there is no terminal one plain line a step."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

GAP = "sampling/sampling_logp_difference/mean"
SIGNAL = "frac_groups_used"  # share of groups whose rewards differ: the only ones that teach
BACKLOG = "archive/backlog_bytes"
PHASES = {"generate": "cyan", "reward": "yellow", "train": "magenta", "publish": "green"}
VERDICTS = {"ok": "green", "inconclusive": "yellow", "failed": "bold red"}
SPARKS = "▁▂▃▄▅▆▇█"


@dataclass
class ViewState:
    run_dir: Path
    total_steps: int
    title: str = ""
    step: int = 0
    phase: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)
    held_out: list[tuple[int | None, float]] = field(default_factory=list)
    step_times_s: deque[float] = field(default_factory=lambda: deque(maxlen=20))  # of the recent steps
    started_at: float = field(default_factory=time.monotonic)

    def hear_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.step, self.phase = step, ""
        self.metrics = {name: value for name, value in metrics.items() if value == value}
        if "step_time" in metrics:  # not in what a killed run still owed
            self.step_times_s.append(metrics["step_time"])
        if self.metrics.get("reward") is not None:
            self.rewards.append(float(metrics["reward"]))

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step at the pace of the recent ones; None before the first."""
        left = max(0, self.total_steps - self.step)
        return sum(self.step_times_s) / len(self.step_times_s) * left if self.step_times_s else None


def panel(state: ViewState) -> RenderableType:
    title = Text.assemble(("lora_grpo ", "bold"), str(state.run_dir))
    subtitle = Text(state.title, style="dim") if state.title else None
    look: dict[str, Any] = {"title_align": "left", "subtitle_align": "right", "border_style": "blue", "padding": (1, 2)}
    return Panel(Group(_progress(state), Text(), _facts(state)), title=title, subtitle=subtitle, **look)


def plain_start(state: ViewState) -> str:
    to_come = f"steps {state.step + 1} to {state.total_steps}"
    if state.step >= state.total_steps:
        to_come = f"{state.step} steps are made, of {state.total_steps}; more with a higher grpo.total_steps"
    return f"{state.run_dir}: {to_come}  {state.title}".rstrip()


def plain_step(state: ViewState) -> str:
    metrics = state.metrics
    parts = [f"step {state.step}/{state.total_steps}"]
    if metrics.get("version") is not None:
        parts.append(f"v{int(metrics['version'])}")
    if metrics.get("reward") is not None:
        parts.append(f"reward {_reward(metrics)}")
    if metrics.get(SIGNAL) is not None:
        parts.append(f"signal {100 * metrics[SIGNAL]:.3g}%")
    if metrics.get(GAP) is not None:
        parts.append(f"gap {metrics[GAP]:.4f} nats")
    parts += [f"{phase} {seconds:.2f} s" for phase, seconds in phase_seconds(metrics).items()]
    if state.eta_s is not None:
        parts.append(f"eta {duration(state.eta_s)}")
    return "  ".join(parts)


def plain_evaluation(step: int, version: int | None, metrics: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{name} {number(value)}" for name, value in metrics.items())
    return f"held-out after step {step}, {_version(version)}: {shown}"


def table(rows: Sequence[Mapping[str, Any]], title: str, long: Sequence[str] = ()) -> Table:
    """Rows with a column for everything that a row has; those that are `long` share the width, and are cut."""
    names = dict.fromkeys(name for row in rows for name in row)
    made = Table(title=Text(title), title_justify="left", show_lines=bool(long), expand=bool(long))
    for name in names:
        numeric = any(isinstance(row.get(name), int | float) for row in rows)
        made.add_column(name, ratio=1 if name in long else None, justify="right" if numeric else "left")
    for row in rows:
        made.add_row(*(Text(_shortened(row.get(name)) if name in long else number(row.get(name))) for name in names))
    return made


def phase_seconds(metrics: Mapping[str, Any]) -> dict[str, float]:
    found = {phase: metrics.get(f"time/{phase}_s") for phase in PHASES}
    return {phase: float(seconds) for phase, seconds in found.items() if seconds is not None}


def sparkline(values: Sequence[float]) -> str:
    shown = values[-32:]
    low, high = min(shown), max(shown)
    if high == low:
        return SPARKS[3] * len(shown)
    return "".join(SPARKS[round((value - low) / (high - low) * (len(SPARKS) - 1))] for value in shown)


def duration(seconds: float) -> str:
    """`seconds` as 8s, 1m20s, 2h05m or 3d04h."""
    whole = max(0, round(seconds))
    for size, unit, part, of in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{of}"
    return f"{whole}s"


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _progress(state: ViewState) -> RenderableType:
    elapsed = duration(time.monotonic() - state.started_at)
    eta = duration(state.eta_s) if state.eta_s is not None else "-"
    row = Table.grid(Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True), padding=(0, 2), expand=True)
    step = Text.assemble("step ", (f"{state.step}", "bold"), f"/{state.total_steps}")
    times = Text.assemble((f"{elapsed} elapsed, ", "dim"), f"{eta} left")
    row.add_row(step, ProgressBar(total=state.total_steps, completed=state.step), times)
    return row


def _facts(state: ViewState) -> Table:
    metrics, facts = state.metrics, Table.grid(Column(style="dim", no_wrap=True), Column(), padding=(0, 2))
    if state.phase:
        facts.add_row("now", Text(state.phase, style=PHASES.get(state.phase, "")))
    if metrics.get("reward") is not None:
        facts.add_row("reward", Text.assemble((_reward(metrics), "bold"), "  ", (sparkline(state.rewards), "green")))
    if state.held_out:
        (first_version, first), (last_version, last) = state.held_out[0], state.held_out[-1]
        came = f"  from {first:.3f} ({_version(first_version)})" if len(state.held_out) > 1 else ""
        told = ("reward ", (f"{last:.3f}", "bold"), f" ({_version(last_version)})", (came, "dim"))
        facts.add_row("held-out", Text.assemble(*told))
    if metrics.get(SIGNAL) is not None:
        facts.add_row("signal", f"{100 * metrics[SIGNAL]:.3g}% of groups")
    if metrics.get("completions/mean_length") is not None:
        cut = metrics.get("completions/clipped_ratio")
        words = "" if cut is None else f", {cut:.0%} cut at the limit"
        facts.add_row("length", f"{metrics['completions/mean_length']:.0f} tokens{words}")
    if metrics.get("version") is not None:
        facts.add_row("version", Text(_version(int(metrics["version"])), style="bold"))
    if metrics.get(GAP) is not None:
        verdict = str(metrics.get("canary/verdict") or "")
        judged = ("  canary ", (verdict, VERDICTS.get(verdict, ""))) if verdict else ()
        facts.add_row("log-prob gap", Text.assemble(f"{metrics[GAP]:.4f} nats per token", *judged))
    if metrics.get(BACKLOG) is not None:
        waiting_mib = metrics[BACKLOG] / 2**20
        facts.add_row("archive", f"{waiting_mib:.1f} MiB on the way to the disk" if waiting_mib else "all on the disk")
    if phase_seconds(metrics):
        facts.add_row("seconds", _phase_bar(phase_seconds(metrics)))
    if not facts.row_count:
        facts.add_row("", Text("starting", style="dim"))
    return facts


def _phase_bar(seconds: Mapping[str, float]) -> Text:
    total = sum(seconds.values()) or 1.0
    blocks = [("█" * round(value / total * 40), PHASES[phase]) for phase, value in seconds.items()]
    words = [(f"{phase} {value:.2f}  ", PHASES[phase]) for phase, value in seconds.items()]
    return Text.assemble(*blocks, "\n", *words, no_wrap=True)


def _reward(metrics: Mapping[str, Any]) -> str:
    deviation = metrics.get("reward_std")
    return f"{metrics['reward']:.3f}" + (f" ± {deviation:.3f}" if deviation is not None else "")


def _version(version: int | None) -> str:
    return "base" if version is None else f"v{version}"


def _shortened(value: Any, width: int = 400) -> str:
    """Text as it is, of a chat the last message."""
    if isinstance(value, list | tuple) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    text = str(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"
