"""From how many completion tokens on a merge is the faster way, by the sync and decode figures of one run.

A step costs sync + prefill + tokens; what a merge loses at the sync it may win back token by token.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_grpo.bench.schema import BreakEvenRow, DecodeRow, SyncRow
from lora_grpo.bench.strategies import NATIVE


def break_even(sync: Sequence[SyncRow], decode: Sequence[DecodeRow]) -> list[BreakEvenRow]:
    """A row for each merge of the sync table (sweeps left out) and each batch size that its engine was decoded with."""
    rows: list[BreakEvenRow] = []
    first = {(row.strategy, row.shape): row for row in reversed(sync) if row.strategy != NATIVE}
    for pair in reversed(first.values()):
        native_s = pair.median_s / pair.ratio_to_native
        curves = [
            row
            for row in decode
            if row.shape == pair.shape and row.strategy == pair.decodes_like and pair.decodes_like != NATIVE
        ]
        for count in sorted({row.rows for row in curves}):
            longest = max((row for row in curves if row.rows == count), key=lambda row: row.completion_tokens)
            rows.append(_row(pair, longest, native_s))
    return rows


def _row(pair: SyncRow, decoded: DecodeRow, native_s: float) -> BreakEvenRow:
    gain_s = pair.median_s - native_s
    loss_s = decoded.tpot_s / decoded.tpot_ratio_to_native - decoded.tpot_s
    prefill_s = decoded.prefill_s / decoded.prefill_ratio_to_native - decoded.prefill_s
    return BreakEvenRow(
        strategy=pair.strategy,
        shape=pair.shape,
        rows=decoded.rows,
        sync_gain_s=gain_s,
        decode_loss_s_per_token=loss_s,
        prefill_loss_s=prefill_s,
        completion_tokens=crossing(gain_s - prefill_s, loss_s),
        measured_up_to_tokens=decoded.completion_tokens,
    )


def crossing(gain_s: float, loss_s_per_token: float) -> float | None:
    """The completion length at which a constant gain is used up by a loss at each token after the first.

    None when it never is; 1 when there is nothing to use up.
    """
    if loss_s_per_token <= 0:
        return None if gain_s >= 0 else 1.0
    return max(1.0, 1.0 + gain_s / loss_s_per_token)


def sentence(row: BreakEvenRow) -> str:
    """What a row says."""
    where = f"{row.shape}, {row.rows} rows"
    if row.completion_tokens is None:
        return (
            f"{where}: {row.strategy} never wins: it syncs {_more(row.sync_gain_s)} and decodes no faster than native "
            f"({1e3 * -row.decode_loss_s_per_token:+.2f} ms a token)."
        )
    extrapolated = " (extrapolated)" if row.completion_tokens > row.measured_up_to_tokens else ""
    return (
        f"{where}: {row.strategy} wins from {row.completion_tokens:,.0f} completion tokens on{extrapolated}: it syncs "
        f"{_more(row.sync_gain_s)} but saves {1e3 * row.decode_loss_s_per_token:.2f} ms a token."
    )


def _more(gain_s: float) -> str:
    return f"{abs(gain_s):.3f} s {'slower' if gain_s >= 0 else 'faster'}"
