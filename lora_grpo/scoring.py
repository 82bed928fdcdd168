"""Teacher-forced log-probs of a trainer's model, for proofs: no gradients, no dropout, nothing left changed."""

from collections.abc import Sequence

import torch
from torch import nn

from lora_grpo.grpo.forward import in_mode
from lora_grpo.grpo.head import completion_scores
from lora_grpo.grpo.packing import packed_scores, pays, sizes, trusted
from lora_grpo.types import LogProbs, Sequences


@torch.no_grad()
def teacher_logprobs(
    model: nn.Module, sequences: Sequences, *, starts: Sequence[int] = (), temperature: float = 1.0, rows: int = 8
) -> LogProbs:
    """log p(token | prefix) of each sequence's tokens from its `starts` on (default: 1), fp32, nats; `rows` sequences
    at a time. A model that FSDP2 sharded is to be asked by every process, for as many sequences."""
    starts = starts or [1] * len(sequences)
    result: LogProbs = []
    with in_mode(model, training=False):
        for first in range(0, len(sequences), rows):
            here = slice(first, first + rows)
            result += _score(model, sequences[here], starts[here], temperature)
    return result


def _score(model: nn.Module, sequences: Sequences, starts: Sequence[int], temperature: float) -> LogProbs:
    if trusted(model) and pays(sizes(sequences, starts)):
        logp_M, _ = packed_scores(model, sequences, starts, temperature)
        lengths = [len(ids) - start for ids, start in zip(sequences, starts, strict=True)]
        return [part.tolist() for part in logp_M.split(lengths)]
    device = next(model.parameters()).device
    length = max(len(ids) for ids in sequences)
    ids_BT = torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in sequences], device=device)
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in sequences], device=device)
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    scored_BT = mask_BT.bool() & (torch.arange(length) >= torch.tensor(starts).unsqueeze(1)).to(device)
    logp_BT, _ = completion_scores(model, inputs, ids_BT[:, 1:], scored_BT[:, 1:], temperature)
    return [row[start - 1 : len(ids) - 1].tolist() for row, ids, start in zip(logp_BT, sequences, starts, strict=True)]


def mean_abs_difference(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float:
    """Mean |left - right| over all tokens of ragged rows, nats."""
    pairs = [(a, b) for row_a, row_b in zip(left, right, strict=True) for a, b in zip(row_a, row_b, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)
