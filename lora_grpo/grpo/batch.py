"""Groups of completions with rewards as padded tensors with advantages.

P prompts, G completions a group, B = P*G rows, T completion tokens (the longest), L tokens of prompt and completion, F
reward functions. Prompts are padded on the left and completions on the right, so that column `prompt_length` of every
row is its first completion token and a model's last T+1 positions are those that predict completions.

A NaN reward says that the function does not apply to the row; a row to which none applies has no reward, takes no
part in its group's mean and deviation, and gets advantage 0. Over several processes, rewards are gathered first.
Computed in float64: in float32 the squares of rewards above 1e19 are infinite, and every advantage would be 0."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_grpo.errors import ConfigError
from lora_grpo.grpo_config import GRPOConfig, ScaleRewards
from lora_grpo.types import Completion, Group

_EPSILON = 1e-4  # added to the deviation, as TRL does; bounds the advantages of a group of nearly equal rewards


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
        if advantages_B.shape != (len(pairs),):
            raise ConfigError(f"advantages of shape {tuple(advantages_B.shape)} for {len(pairs)} completions")
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


def weighted_rewards(rewards_BF: Tensor, weights_F: Sequence[float] | None = None) -> Tensor:
    """rewards_B: the weighted sum over the functions that apply to each row; NaN where none does."""
    columns = rewards_BF.shape[1]
    if weights_F is not None and len(weights_F) != columns:
        raise ConfigError(f"reward_weights={tuple(weights_F)} must hold one weight for each of {columns} rewards")
    weights = rewards_BF.new_tensor([1.0] * columns if weights_F is None else list(weights_F))
    return (rewards_BF * weights).nansum(dim=1).masked_fill(rewards_BF.isnan().all(dim=1), torch.nan)


def group_advantages(rewards_B: Tensor, num_generations: int, scale_rewards: ScaleRewards = "group") -> Tensor:
    """advantages_B, fp32, = (r - mean of its group) / (deviation + 1e-4); rows of a group are adjacent.

    The deviation (Bessel-corrected) is the group's (GRPO, arXiv 2402.03300, 4.1.2), the whole batch's (arXiv
    2508.08221), or 1 (Dr. GRPO, arXiv 2503.20783: dividing by it favours questions that are too easy or too hard)."""
    if rewards_B.numel() % num_generations:
        raise ConfigError(f"{rewards_B.numel()} rewards are not a multiple of num_generations={num_generations}")
    rewards_PG = rewards_B.double().view(-1, num_generations)
    # Taken from the group's least, equal rewards are 0 to the bit: a mean of them can be off by its rounding.
    above_PG = rewards_PG - rewards_PG.nan_to_num(nan=torch.inf).amin(dim=1, keepdim=True)
    centred_PG = above_PG - above_PG.nanmean(dim=1, keepdim=True)
    if scale_rewards != "none":
        centred_PG = centred_PG / (_deviation(rewards_PG, scale_rewards) + _EPSILON)
    return centred_PG.nan_to_num(nan=0.0).flatten().float()


def reward_metrics(rewards_BF: Tensor, names: Sequence[str], config: GRPOConfig) -> dict[str, float]:
    """TRL's reward metrics: `reward`, `reward_std`, `frac_reward_zero_std`, and `rewards/NAME/mean|std` a function.

    `frac_reward_zero_std` is the share of rows in groups (with "batch": in batches) whose rewards are all equal: they
    teach nothing."""
    rewards_B = weighted_rewards(rewards_BF, config.reward_weights)
    deviation = _deviation(rewards_B.double().view(-1, config.num_generations), config.scale_rewards)
    metrics = {
        "reward": rewards_B.nanmean().item(),
        "reward_std": nan_std(rewards_B).item(),
        "frac_reward_zero_std": deviation.isclose(torch.zeros_like(deviation)).float().mean().item(),
    }
    for name, column_B in zip(names, rewards_BF.T, strict=True):
        metrics[f"rewards/{name}/mean"] = column_B.nanmean().item()
        metrics[f"rewards/{name}/std"] = nan_std(column_B).item()
    return metrics


def nan_std(values: Tensor, dim: int = 0) -> Tensor:
    """Bessel-corrected standard deviation of the values that are not NaN; NaN where fewer than two are. Keeps `dim`."""
    count = (~values.isnan()).sum(dim=dim, keepdim=True)
    squares = (values - values.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim, keepdim=True)
    return torch.where(count > 1, squares / (count - 1), torch.nan).sqrt()


def _deviation(rewards_PG: Tensor, scale_rewards: ScaleRewards) -> Tensor:
    """A column a group, or one over the batch."""
    return nan_std(rewards_PG.flatten()) if scale_rewards == "batch" else nan_std(rewards_PG, dim=1)
