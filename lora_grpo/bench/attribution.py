"""Whose completion it is, told by log-probs: what it was sampled with against what the trainer computes.

One rule, for a completion and for a bucket of them: it is told apart from every other version when it lies less than
half as far from its own as that one lies from each other, and wrong when it lies less than half as far from another as
its own does, and further from its own than noise. Distances are mean absolute differences of log-probs, so no
completion is both. What is neither is judged again with those of the same version and server, by their means. Noise
has no direction, so on average it leaves them as far from another version as that one is from theirs at least."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_grpo.types import LogProbs

MIN_BUCKET = 10  # completions of a bucket that may be called wrong: fewer could lie near another version by chance


@dataclass(frozen=True)
class Rows:
    """B completions of up to T tokens, and what each of V versions makes of them. logp_VBT are the trainer's log-probs,
    sampler_BT those that came with them; both are zero after a row's end. stamped_B is the index of the version that
    each claims, server_B that of the server that made it."""

    logp_VBT: Tensor
    sampler_BT: Tensor
    length_B: Tensor
    stamped_B: Tensor
    server_B: Tensor

    @classmethod
    def of(cls, logp: Sequence[LogProbs], sampler: LogProbs, stamped: Sequence[int], server: Sequence[int]) -> "Rows":
        """From ragged rows of log-probs; `logp` has such rows for each version."""
        about = (torch.tensor(values) for values in ([len(row) for row in sampler], stamped, server))
        return cls(torch.stack([_padded(rows) for rows in logp]), _padded(sampler), *about)

    def next_stamped(self) -> "Rows":
        """Each claims the version after the one that made it, those of the last the one before."""
        last = len(self.logp_VBT) - 1
        return replace(self, stamped_B=torch.where(self.stamped_B < last, self.stamped_B + 1, self.stamped_B - 1))

    def own_gap(self) -> Tensor:
        """(B,) nats per token between a completion and the version that it claims."""
        return _claimed(self.gap(), self.stamped_B)

    def next_distance(self) -> Tensor:
        """(B,) nats per token between the version that a completion claims and its nearest neighbour in number."""
        number_V = torch.arange(len(self.logp_VBT))
        return self.distance().where((number_V[:, None] - self.stamped_B).abs() == 1, torch.inf).amin(0)

    def gap(self) -> Tensor:
        """(V, B) nats per token between each version and the sampler."""
        return (self.logp_VBT - self.sampler_BT).abs().sum(2) / self.length_B

    def distance(self) -> Tensor:
        """(V, B) nats per token between each version and the one that is claimed."""
        claimed_BT = self.logp_VBT[self.stamped_B, torch.arange(len(self.stamped_B))]
        return (self.logp_VBT - claimed_BT).abs().sum(2) / self.length_B


def judge(rows: Rows, noise: float) -> dict[str, float]:
    """Counts of completions, then of the buckets of those that are `inconclusive` by themselves. `undecided` are the
    completions whose bucket is inconclusive too. `bucket_gap_share` is the greatest gap of a decided bucket, as a share
    of the distance to the nearest other version: about the share of its completions that could be another's unseen.
    `noise` is the most that server and trainer differ by on a completion of the base, nats per token."""
    gap_VB, distance_VB = rows.gap(), rows.distance()
    told_B, wrong_B, own_B = _verdict(gap_VB, distance_VB, rows.stamped_B)
    wrong_B &= own_B > noise
    left_B = ~(told_B | wrong_B)
    keys_N2, bucket_L = torch.stack([rows.stamped_B, rows.server_B], 1)[left_B].unique(dim=0, return_inverse=True)
    size_N = bucket_L.bincount(minlength=len(keys_N2))
    sums_VN = gap_VB.new_zeros(len(gap_VB), len(size_N))
    gap_VN, distance_VN = (sums_VN.index_add(1, bucket_L, v_VB[:, left_B]) / size_N for v_VB in (gap_VB, distance_VB))
    told_N, wrong_N, own_N = _verdict(gap_VN, distance_VN, keys_N2[:, 0])
    wrong_N &= size_N >= MIN_BUCKET
    unknown_N = ~(told_N | wrong_N)
    share_N = own_N / _others(distance_VN, keys_N2[:, 0]).amin(0)
    return {
        "checked": len(left_B),
        "told_apart": int(told_B.sum()),
        "wrong": int(wrong_B.sum()),
        "inconclusive": int(left_B.sum()),
        "buckets_told_apart": int(told_N.sum()),
        "buckets_wrong": int(wrong_N.sum()),
        "buckets_inconclusive": int(unknown_N.sum()),
        "undecided": int(size_N[unknown_N].sum()),
        "bucket_gap_share": round(float(share_N[told_N].max()), 4) if told_N.any() else 0.0,
    }


def _verdict(gap_VN: Tensor, distance_VN: Tensor, claimed_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(told apart, nearer to another, gap to its own) of each."""
    own_N = _claimed(gap_VN, claimed_N)
    told_N = (own_N < 0.5 * _others(distance_VN, claimed_N)).all(0)
    return told_N, (_others(gap_VN, claimed_N) < 0.5 * distance_VN).any(0), own_N


def _claimed(values_VN: Tensor, claimed_N: Tensor) -> Tensor:
    return values_VN.gather(0, claimed_N[None])[0]


def _others(values_VN: Tensor, claimed_N: Tensor) -> Tensor:
    """The values, infinite where the version is the one that is claimed."""
    return values_VN.scatter(0, claimed_N[None], torch.inf)


def _padded(rows: LogProbs) -> Tensor:
    """(B, T) float64, zeros after each row's end."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float64) for row in rows], batch_first=True)
