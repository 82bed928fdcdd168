"""From how many completion tokens on a merge is the faster way, by the sync and decode figures of one run.

A step costs sync + prefill + tokens; what a merge loses at the sync it may win back token by token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_grpo.bench.schema import BreakEvenRow, DecodeRow, SyncRow, Winner
from lora_grpo.bench.strategies import NATIVE
from lora_grpo.errors import counted


def break_even(sync: Sequence[SyncRow], decode: Sequence[DecodeRow], device: str) -> list[BreakEvenRow]:
    """A row for each merge of the sync table (sweeps left out) and each batch size that its engine was decoded with."""
    rows: list[BreakEvenRow] = []
    first = {(row.strategy, row.shape): row for row in reversed(sync) if not row.strategy.startswith(NATIVE)}
    for pair in reversed(first.values()):
        native_s = pair.median_s / pair.ratio_to_native
        curves = _curves(pair, decode, device)
        for count in sorted({row.rows for row in curves}):
            longest = max((row for row in curves if row.rows == count), key=lambda row: row.completion_tokens)
            rows.append(_row(pair, longest, native_s))
    return rows


def _curves(pair: SyncRow, decode: Sequence[DecodeRow], device: str) -> list[DecodeRow]:
    """The merge's own decode figures, or merge-trl's: merged weights are merged weights, but for those of merge-fold on
    a CPU, which are not prepacked."""
    of_shape = [row for row in decode if row.shape == pair.shape]
    found = [row for row in of_shape if row.strategy == pair.strategy]
    if not found and pair.strategy.startswith("merge") and (device != "cpu" or pair.strategy != "merge-fold"):
        found = [row for row in of_shape if row.strategy == "merge-trl"]
    # Of engines that run otherwise, the first ones measured.
    return [row for row in found if row.engine == found[0].engine]


def _row(pair: SyncRow, decoded: DecodeRow, native_s: float) -> BreakEvenRow:
    gain_s = pair.median_s - native_s
    loss_s = decoded.tpot_s / decoded.tpot_ratio_to_native - decoded.tpot_s
    prefill_s = decoded.prefill_s / decoded.prefill_ratio_to_native - decoded.prefill_s
    tokens, beyond = crossing(gain_s - prefill_s, loss_s)
    return BreakEvenRow(
        strategy=pair.strategy,
        shape=pair.shape,
        rows=decoded.rows,
        sync_gain_s=gain_s,
        decode_loss_s_per_token=loss_s,
        prefill_loss_s=prefill_s,
        completion_tokens=tokens,
        beyond=beyond,
        measured_up_to_tokens=decoded.completion_tokens,
    )


def crossing(gain_s: float, loss_s_per_token: float) -> tuple[float | None, Winner]:
    """The completion length at which native's constant gain meets its loss at each token after the first (None: they
    never meet), and who is faster on longer ones."""
    if gain_s >= 0 and loss_s_per_token <= 0:
        return None, "native"
    if gain_s <= 0 and loss_s_per_token >= 0:
        return None, "merge"
    return 1.0 + gain_s / loss_s_per_token, "merge" if loss_s_per_token > 0 else "native"


def earliest(rows: Sequence[BreakEvenRow]) -> list[BreakEvenRow]:
    """Of each shape and batch size, the merge that wins from the shortest completions on; the first of those that
    never do."""
    kinds: dict[tuple[str, int], list[BreakEvenRow]] = {}
    for row in rows:
        kinds.setdefault((row.shape, row.rows), []).append(row)
    return [min(alike, key=_wins_from) for alike in kinds.values()]


def _wins_from(row: BreakEvenRow) -> float:
    if row.completion_tokens is None:
        return 0.0 if row.beyond == "merge" else math.inf
    return row.completion_tokens if row.beyond == "merge" else 0.0


def sentence(row: BreakEvenRow) -> str:
    """What a row says."""
    beyond = row.completion_tokens is not None and row.completion_tokens > row.measured_up_to_tokens
    where = f"{row.merging_wins}{' (extrapolated)' if beyond else ''}"
    return (
        f"{row.shape}, {counted(row.rows, 'row')}: {row.strategy} wins {where}: its sync is "
        f"{_than_native(row.sync_gain_s)}, its prefill {_than_native(-row.prefill_loss_s)}, each token "
        f"{_than_native(-row.decode_loss_s_per_token)} than native's."
    )


def _than_native(seconds: float) -> str:
    return f"{1e3 * abs(seconds):,.2f} ms {'slower' if seconds >= 0 else 'faster'}"
