"""A run as one HTML page that opens from disk: no network, no script, every text of users and models escaped."""

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from lora_grpo.config_file import RESOLVED_FILE, config_of_model
from lora_grpo.errors import counted
from lora_grpo.metrics.curves import MOST_POINTS, panels, series
from lora_grpo.metrics.log import METRICS_FILE, Record, history, read_metrics
from lora_grpo.metrics.render import GAP, duration, number
from lora_grpo.metrics.reporter import SAMPLES_FILE, flat

MOST_LOGGED, MOST_ROWS, MOST_CHARACTERS, MOST_MESSAGES = 12, 12, 1500, 40  # steps, completions of one, of a text
MOST_LANES, MOST_DOTS = 24, 100
WIDTH, LANE, LABEL = 900, 36, 56  # of the drawing, the height of a lane, and the room that a label needs


@dataclass(frozen=True)
class Lineage:
    parents: dict[int, int | None]  # of every version that was ever published
    head: int | None = None
    best: int | None = None
    pins: frozenset[int] = frozenset()
    rollbacks: Sequence[tuple[int, int, str]] = ()  # from, to, why
    rows: Sequence[Mapping[str, Any]] = ()  # the table of versions, the newest first
    left_out: int = 0  # kept versions that the table lacks


def render_page(run: Path, lineage: Lineage, *, live: bool = False, refresh_s: float | None = None) -> str:
    """The page of a run directory. A browser that shows it reads it again every `refresh_s`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    everything = read_metrics(run) if (run / METRICS_FILE).is_file() else []
    records = history(everything)
    kept = set(map(id, records))
    given_up = [record for record in everything if record["event"] == "step" and id(record) not in kept]
    steps = [record for record in records if record["event"] == "step"]
    info = {name: value for one in records if one["event"] in ("start", "end") for name, value in one["info"].items()}
    settings = info.pop("config", {})
    logged = read_metrics(run / SAMPLES_FILE) if (run / SAMPLES_FILE).is_file() else []
    pages = Environment(loader=PackageLoader("lora_grpo", "metrics"), autoescape=True, undefined=StrictUndefined)
    pages.filters |= {"number": number, "counted": counted, "text": as_text}
    pages.filters["clock"] = lambda s: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(s))
    given = {"run": run, "live": live, "refresh_s": refresh_s, "lineage": lineage, "now": time.time()}
    return pages.get_template("page.html").render(
        **given,
        facts=_facts(info, steps, given_up, lineage),
        panels=panels(records, given_up),
        thinned=max(len(steps), len(given_up)) > MOST_POINTS,
        logged=logged[: -MOST_LOGGED - 1 : -1],
        logged_steps=len(logged),
        answers=_answers(run),
        most_rows=MOST_ROWS,
        tree=tree(lineage),
        proofs=_proofs(info, steps),
        timings=list(_timings(steps)),
        settings=list(settings_of(run, settings)),
        messages=_messages(records),
        most_messages=MOST_MESSAGES,
    )


def as_text(value: Any) -> str:
    """Text as it is, a chat as a paragraph a message, the rest as JSON; a long one is cut, which it says."""
    if isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
        value = "\n\n".join(f"{message.get('role')}: {message.get('content')}" for message in value)
    whole = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    left = len(whole) - MOST_CHARACTERS
    return f"{whole[:MOST_CHARACTERS]}… ({left:,} characters more)" if left > 0 else whole


def _facts(info: Record, steps: Sequence[Record], given_up: Sequence[Record], lineage: Lineage) -> dict[str, Any]:
    spent = sum(record.get("step_time") or 0.0 for record in [*steps, *given_up])
    before, after = info.get("reward_before"), info.get("reward_after")
    lost = f"{counted(len(given_up), 'step')} that a rollback or a resume went back before"
    return {
        "model": info.get("model"),
        "device": info.get("device"),
        "steps": f"{steps[-1]['step']}, {duration(spent)}" if steps else None,
        "given up": lost if given_up else None,
        "held-out reward": None if before is None else f"{number(before)} before, {number(after)} after",
        "HEAD": None if lineage.head is None else f"v{lineage.head}",
        "best version": None if lineage.best is None else f"v{lineage.best}",
        "versions": f"{len(lineage.parents):,} published",
        "rollbacks": str(len(lineage.rollbacks)),
    }


def _messages(records: Sequence[Record]) -> list[Record]:
    """Rollbacks and messages, the newest first; what every start says again is there once."""
    said: dict[Any, Record] = {}
    for record in reversed(records):
        if record["event"] in ("message", "rollback"):
            said.setdefault(record["text"] if record["event"] == "message" else id(record), record)
    return list(said.values())


def _proofs(info: Mapping[str, Any], steps: Sequence[Record]) -> dict[str, Any]:
    """What showed that the engine sampled from the very weights that the trainer has."""
    proven = series(steps, "sync/prove_s")[1]
    verdicts = Counter(str(record["canary/verdict"]) for record in steps if record.get("canary/verdict"))
    failed = [f"step {record['step']}" for record in steps if record.get("canary/verdict") == "failed"]
    gaps = series(steps, GAP)[1]
    probe = info.get("probe")
    return {
        "base": info.get("base_match"),
        "probe": isinstance(probe, Mapping) and ", ".join(f"{name} {number(value)}" for name, value in probe.items()),
        "loads": proven and f"{len(proven)} proven, {1000 * statistics.median(proven):.2g} ms each (median)",
        "canary": ", ".join(f"{times} {verdict}" for verdict, times in verdicts.items()),
        "canary failed at": ", ".join(failed[:MOST_ROWS]),
        "log-prob gap": gaps and f"{statistics.median(gaps):.2g} nats per token (median), {max(gaps):.2g} at most",
    }


def _timings(steps: Sequence[Record]) -> Iterator[tuple[str, float, float, float]]:
    """Name, median, largest and total of everything that is timed in a step, seconds."""
    timed = ("time/", "sync/", "step_time")
    for name in dict.fromkeys(name for record in steps for name in record if name.startswith(timed)):
        if values := series(steps, name)[1]:
            yield name.removesuffix("_s"), statistics.median(values), max(values), sum(values)


def settings_of(run: Path, started_with: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Key, value, and whether it is not the default: of `config.json`, else those that the run started with."""
    defaults = dict(flat(config_of_model("-").model_dump(mode="json")))
    path = run / RESOLVED_FILE
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"grpo": started_with}
    for key, value in flat(values):
        shown = "-" if value is None else json.dumps(value, ensure_ascii=False)
        yield key, shown, key not in defaults or value != defaults[key]


def _answers(run: Path) -> dict[str, Any] | None:
    """Held-out prompts with their answers by the first and the last version evaluated, where the reward changed."""
    files = sorted((run / "evaluations").glob("*.json"))
    if len(files) < 2:
        return None
    first, last = (json.loads(path.read_text(encoding="utf-8")) for path in (files[0], files[-1]))
    both = zip(first["rows"], last["rows"], strict=False)
    # Where no function scored an answer, its reward is NaN, and so is the difference.
    pairs = [pair for pair in both if abs(pair[1]["reward"] - pair[0]["reward"]) > 0]
    # The ones that got worse are the news.
    pairs.sort(key=lambda pair: pair[1]["reward"] - pair[0]["reward"])
    shown = pairs if len(pairs) <= MOST_ROWS else [*pairs[: MOST_ROWS // 2], *pairs[-MOST_ROWS // 2 :]]
    worse = sum(a["reward"] > b["reward"] for a, b in pairs)
    counts = {"changed": len(pairs), "worse": worse, "asked": len(last["rows"])}
    return {"first": first["version"], "last": last["version"], "rows": shown, **counts}


def tree(lineage: Lineage) -> dict[str, Any]:
    """SVG paths from left to right: lane 0 leads to `HEAD`, each branch that was given up has one below."""
    lane_of, branches = _lanes(lineage)
    scale = WIDTH / max(1, max(lineage.parents, default=1) - 1)

    def at(version: int) -> tuple[float, int]:
        return round((version - 1) * scale, 1), lane_of.get(version, 0) * LANE

    main = [version for version, lane in lane_of.items() if lane == 0]
    paths = [(f"M{at(min(main))[0]} 0 H{at(max(main))[0]} h0", "main")] if main else []
    drawn = [branch for branch in branches if lane_of[branch[0]] <= MOST_LANES]
    for first, last in ((branch[0], branch[-1]) for branch in drawn):
        (px, py), (x, y) = at(lineage.parents[first] or first), at(first)
        paths.append((f"M{px} {py} C{px} {y} {px} {y} {x} {y} H{at(last)[0]} h0", "lost"))
    back = []
    for left, to, why in lineage.rollbacks[-MOST_DOTS:]:
        if max(lane_of.get(left, 0), lane_of.get(to, 0)) <= MOST_LANES:
            (x, y), (tx, ty) = at(left), at(to)
            arc = f"M{x} {y} Q{(x + tx) / 2:.1f} {max(y, ty) + LANE} {tx} {ty}"
            back.append((arc, f"v{left} back to v{to} {why}".strip()))
    size = {"lanes": max((lane_of[branch[0]] for branch in drawn), default=0), "hidden": len(branches) - len(drawn)}
    return {**size, "paths": paths, "back": back, "dots": _dots(lineage, lane_of, at)}


def _lanes(lineage: Lineage) -> tuple[dict[int, int], list[list[int]]]:
    """Each version's lane, and the branches: versions in a row that `HEAD` does not come from."""
    lane_of: dict[int, int] = {}
    following = lineage.head
    while following is not None and following not in lane_of:
        lane_of[following] = 0
        following = lineage.parents.get(following)
    branches: list[list[int]] = []
    tips: dict[int, list[int]] = {}
    ends: dict[int, int] = {}
    for version, parent in sorted(item for item in lineage.parents.items() if item[0] not in lane_of):
        branch = tips.pop(parent or 0, [])
        if branch:
            lane = lane_of[branch[-1]]
        else:
            lane = next(lane for lane in count(1) if ends.get(lane, 0) <= (parent or 0))
            branches.append(branch)
        branch.append(version)
        ends[lane] = version
        lane_of[version], tips[version] = lane, branch
    return lane_of, branches


def _dots(lineage: Lineage, lane_of: dict[int, int], at: Callable[[int], tuple[float, int]]) -> list[tuple[Any, ...]]:
    """x, y, CSS class and label of the versions that a reader looks for; a label that would cover another is empty."""
    kinds = dict.fromkeys(sorted(lineage.parents)[:1], "plain")
    for left, to, _ in lineage.rollbacks[-MOST_DOTS:]:
        kinds |= {left: "lost", to: "plain"}
    kinds |= dict.fromkeys(sorted(lineage.pins)[-MOST_DOTS:], "pin")
    notable = ((lineage.best, "best"), (lineage.head, "head"))
    kinds |= {version: kind for version, kind in notable if version is not None}
    dots, labelled = list[tuple[Any, ...]](), dict[float, float]()
    for version, kind in sorted((one for one in kinds.items() if lane_of.get(one[0], 0) <= MOST_LANES), reverse=True):
        x, y = at(version)
        words = ", ".join(word for word, one in (("HEAD", lineage.head), ("best", lineage.best)) if one == version)
        fits = words or labelled.get(y, x + LABEL) - x >= LABEL
        if fits:
            labelled[y] = x
        dots.append((x, y, kind, f"v{version} {words}".rstrip() if fits else ""))
    return dots
