"""The tree of a run's versions, as SVG paths made of numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

MOST_LANES, MOST_DOTS = 24, 100
WIDTH, LANE, LABEL = 900, 36, 56
"""The drawing's width, the height of a lane, and the room that a label needs."""


@dataclass(frozen=True)
class Lineage:
    """The versions of a run, as its store tells of them."""

    parents: dict[int, int | None]
    """Of every version that was ever published."""
    head: int | None = None
    best: int | None = None
    pins: frozenset[int] = frozenset()
    rollbacks: Sequence[tuple[int, int, str]] = ()
    """From, to, why."""
    rows: Sequence[Mapping[str, Any]] = ()
    """The table of versions, the newest first."""
    left_out: int = 0
    """Kept versions that the table lacks."""


@dataclass
class Branch:
    """Versions in a row that `HEAD` does not come from."""

    lane: int
    parent: int
    first: int
    last: int


@dataclass(frozen=True)
class Tree:
    """Versions from left to right by number. Lane 0 leads to `HEAD`; each branch that was given up has one below."""

    lanes: int
    paths: list[tuple[str, str]]
    """Path and CSS class."""
    back: list[tuple[str, str]]
    """A rollback's path, and its words."""
    dots: list[tuple[float, float, str, str]]
    """x, y, CSS class and label (which may be empty)."""
    hidden: int
    """Branches below the last lane drawn."""


def tree(lineage: Lineage) -> Tree:
    """The drawing: its size grows with the branches, not with the versions."""
    lane_of, branches = _lanes(lineage)
    scale = WIDTH / max(1, max(lineage.parents, default=1) - 1)

    def at(version: int) -> tuple[float, int]:
        return round((version - 1) * scale, 1), lane_of.get(version, 0) * LANE

    main = [version for version, lane in lane_of.items() if lane == 0]
    paths = [(f"M{at(min(main))[0]} 0 H{at(max(main))[0]} h0", "main")] if main else []
    drawn = [branch for branch in branches if branch.lane <= MOST_LANES]
    for branch in drawn:
        (px, py), (x, y) = at(branch.parent), at(branch.first)
        paths.append((f"M{px} {py} C{px} {y} {px} {y} {x} {y} H{at(branch.last)[0]} h0", "lost"))
    back = []
    for left, to, why in lineage.rollbacks[-MOST_DOTS:]:
        if max(lane_of.get(left, 0), lane_of.get(to, 0)) <= MOST_LANES:
            (x, y), (tx, ty) = at(left), at(to)
            back.append(
                (f"M{x} {y} Q{(x + tx) / 2:.1f} {max(y, ty) + LANE} {tx} {ty}", f"v{left} back to v{to} {why}".strip())
            )
    lanes = max((branch.lane for branch in drawn), default=0)
    return Tree(lanes, paths, back, _dots(lineage, lane_of, at), len(branches) - len(drawn))


def _lanes(lineage: Lineage) -> tuple[dict[int, int], list[Branch]]:
    lane_of: dict[int, int] = {}
    following = lineage.head
    while following is not None and following not in lane_of:
        lane_of[following] = 0
        following = lineage.parents.get(following)
    branches: list[Branch] = []
    tips: dict[int, Branch] = {}
    ends: dict[int, int] = {}
    for version, parent in sorted(lineage.parents.items()):
        if version in lane_of:
            continue
        branch = tips.pop(parent or 0, None)
        if branch is None:
            lane = next(lane for lane in count(1) if ends.get(lane, 0) <= (parent or 0))
            branch = Branch(lane, parent or version, version, version)
            branches.append(branch)
        branch.last = ends[branch.lane] = version
        lane_of[version], tips[version] = branch.lane, branch
    return lane_of, branches


def _dots(
    lineage: Lineage, lane_of: Mapping[int, int], at: Callable[[int], tuple[float, int]]
) -> list[tuple[float, float, str, str]]:
    """The versions that a reader looks for; labels that would cover one another are left out."""
    kinds: dict[int, str] = {}
    if lineage.parents:
        kinds[min(lineage.parents)] = "plain"
    for left, to, _ in lineage.rollbacks[-MOST_DOTS:]:
        kinds |= {left: "lost", to: "plain"}
    kinds |= dict.fromkeys(sorted(lineage.pins)[-MOST_DOTS:], "pin")
    kinds |= {
        version: kind for version, kind in ((lineage.best, "best"), (lineage.head, "head")) if version is not None
    }
    dots, labelled = list[tuple[float, float, str, str]](), dict[float, float]()
    for version, kind in sorted(kinds.items(), reverse=True):
        x, y = at(version)
        if lane_of.get(version, 0) > MOST_LANES:
            continue
        fits = kind in ("head", "best") or labelled.get(y, x + LABEL) - x >= LABEL
        words = {"head": " HEAD", "best": " best"}.get(kind, "")
        if version == lineage.best == lineage.head:
            words = " HEAD, best"
        if fits:
            labelled[y] = x
        dots.append((x, y, kind, f"v{version}{words}" if fits else ""))
    return dots
