"""Groups of completions as padded tensors.

B rows, T completion tokens (the longest), L tokens of prompt and completion. Prompts are padded on the left and
completions on the right, so that column `prompt_length` of every row is its first completion token and a model's
last T+1 positions are those that predict completions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_grpo.errors import ConfigError
from lora_grpo.types import Completion, Group


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to learn from; logp and entropy in fp32, nats. The last three are None until `Policy.prepare` fills them."""

    input_ids_BL: Tensor  # int64; padding holds 0, which every vocabulary has, and is masked everywhere
    attention_mask_BL: Tensor  # int64; 1 where a token is
    mask_BT: Tensor  # bool; the completion tokens that count in the loss
    sampler_logp_BT: Tensor  # what the sampler said of its tokens, NaN where it did not, 0 where padded
    advantages_B: Tensor  # fp32
    old_logp_BT: Tensor | None = None  # of the policy before this batch's first update, at the sampling temperature
    entropy_BT: Tensor | None = None  # of that same policy
    ref_logp_BT: Tensor | None = None  # of what the KL is measured to; None as long as no KL is asked for

    @classmethod
    def from_groups(cls, groups: Sequence[Group], advantages_B: Tensor, *, mask_truncated: bool = False) -> "Batch":
        """A row a completion, in the groups' order.

        Completions hold their end token. `Completion.token_mask` takes tokens out of the loss that the policy did not
        sample, `mask_truncated` whole rows that were cut at the limit (DAPO, arXiv 2503.14476, 3.4)."""
        pairs = [(group.prompt_token_ids, row) for group in groups for row in group.completions]
        if not pairs or advantages_B.shape != (len(pairs),):
            told = f"advantages of shape {tuple(advantages_B.shape)} for {len(pairs)} completions"
            raise ConfigError(f"{told}: give one for each, at least one")
        if not any(row.token_ids for _, row in pairs):
            raise ConfigError(f"none of {len(pairs)} completions has a token: there is nothing to learn from")
        _check(pairs)
        prompts = [torch.tensor(ids, dtype=torch.long) for ids, _ in pairs]
        completions = [torch.tensor(row.token_ids, dtype=torch.long) for _, row in pairs]
        masks = [torch.tensor(row.token_mask or [True] * len(row.token_ids), dtype=torch.bool) for _, row in pairs]
        left_out_B = torch.tensor([mask_truncated and row.truncated for _, row in pairs])
        logprobs = [torch.tensor(row.logprobs, dtype=torch.float32) for _, row in pairs]
        return cls(
            input_ids_BL=_join(prompts, completions),
            attention_mask_BL=_join(*([torch.ones_like(ids) for ids in part] for part in (prompts, completions))),
            mask_BT=pad_sequence(masks, batch_first=True) & ~left_out_B.unsqueeze(1),
            sampler_logp_BT=pad_sequence(logprobs, batch_first=True),
            advantages_B=advantages_B.float(),
        )

    def __len__(self) -> int:
        return self.input_ids_BL.shape[0]

    @property
    def completion_length(self) -> int:
        return self.mask_BT.shape[1]

    @property
    def prompt_length(self) -> int:
        return self.input_ids_BL.shape[1] - self.completion_length

    @property
    def completion_mask_BT(self) -> Tensor:
        """bool; where completion tokens are, in the loss or not."""
        return self.attention_mask_BL[:, self.prompt_length :].bool()

    @property
    def position_ids_BL(self) -> Tensor:
        """A row's first token has position 0, however wide its padding; as an unpadded engine counts."""
        return (self.attention_mask_BL.cumsum(dim=1) - 1).clamp(min=0)

    def to(self, device: torch.device | str) -> "Batch":
        return self._map(lambda _, tensor: tensor.to(device))

    def select(self, rows: Tensor) -> "Batch":
        """The rows at these indices, without the columns that only other rows needed."""
        used_L = self.attention_mask_BL[rows].any(dim=0)
        first = self.prompt_length - int(used_L[: self.prompt_length].sum())
        length = max(int(used_L[self.prompt_length :].sum()), 1)
        columns = {"BL": slice(first, self.prompt_length + length), "BT": slice(length)}
        return self._map(lambda axes, tensor: tensor[rows][:, columns[axes]] if axes in columns else tensor[rows])

    def idle(self) -> "Batch":
        """A row of two tokens, none of which counts: the loss on it and its gradient are 0."""
        shapes = {"BL": (1, 2), "BT": (1, 1), "B": (1,)}
        zeros = self._map(lambda axes, tensor: tensor.new_zeros(shapes[axes]))
        return replace(zeros, attention_mask_BL=torch.ones_like(zeros.attention_mask_BL))

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> "Batch":
        """`change` gets each tensor that is there, and its axes, such as "BT"."""
        there = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: change(name.rpartition("_")[2], t) for name, t in there.items() if t is not None}
        return replace(self, **changed)


def _check(pairs: Sequence[tuple[Sequence[int], Completion]]) -> None:
    for row, (prompt, completion) in enumerate(pairs):
        if not prompt:
            raise ConfigError(f"row {row} has an empty prompt, so its first token cannot be scored")
        mask = completion.token_ids if completion.token_mask is None else completion.token_mask
        lengths = [len(completion.token_ids), len(completion.logprobs), len(mask)]
        if len(set(lengths)) > 1:
            raise ConfigError(f"row {row}: token_ids, logprobs and token_mask differ in length: {lengths}")


def _join(prompts: list[Tensor], completions: list[Tensor]) -> Tensor:
    left = pad_sequence(prompts, batch_first=True, padding_side="left")
    return torch.cat([left, pad_sequence(completions, batch_first=True)], dim=1)
