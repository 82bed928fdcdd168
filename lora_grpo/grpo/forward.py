"""Forwards: a policy's (which rows make a micro-batch, packed or padded, in what mode), and log-probs for proofs.

Letters: B rows, T completion tokens, L tokens of prompt and completion."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn

from lora_grpo.adapters.peft_form.modules import reshard
from lora_grpo.errors import ConfigError
from lora_grpo.grpo import packing
from lora_grpo.grpo.batch import Batch
from lora_grpo.grpo.head import completion_scores
from lora_grpo.grpo.processes import Processes
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.types import LogProbs, Sequences

_FIRST = 4  # tokens of a completion where what leaks from the row's other sequences shows most


class Forward:
    """Of one model. All processes that hold a shard of it call `micro_batches`, and then one forward for each."""

    def __init__(self, model: PeftModel, config: GRPOConfig, processes: Processes, *, sharded: bool) -> None:
        self._model, self._config, self._processes, self._sharded = model, config, processes, sharded
        self._dtype = base_dtype(model)
        self._packs: bool | None = None  # None until a micro-batch is better packed

    def __call__(self, rows: Batch, *, packed: bool) -> tuple[Tensor, Tensor]:
        """logp_BT and entropy_BT of completion tokens at the sampling temperature, fp32, nats; 0 where padded."""
        device = next(self._model.parameters()).device.type
        autocast = nullcontext() if self._dtype == torch.float32 else torch.autocast(device, dtype=self._dtype)
        with self._uncast(), autocast:
            return self._packed(rows) if packed else self._padded(rows)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Where the backward of these forwards runs: what is checkpointed is computed again there."""
        with self._uncast(), packing.in_spans(self._model) if self._packs else nullcontext():
            yield

    def micro_batches(self, rows: Batch, wanted_B: Tensor) -> list[tuple[Tensor, Batch, bool]]:
        """The wanted rows, as many at a time as the config says: packed by prompt, or padded and of like length. Each
        with its rows' indices in the batch, and whether packed.

        Packed where a micro-batch is better so and the model can do it, whatever came before. A sharded model takes
        its forwards in all processes at once: one that has fewer goes on with an idle batch."""
        wanted = wanted_B.nonzero().squeeze(1)
        of_rows = packing.sizes(*_listed(rows.select(wanted))) if len(wanted) else []
        parts = self._cut(of_rows, packed=True)
        better = any(packing.pays([of_rows[row] for row in part]) for part in parts)
        if self._packs is None and self._most(float(better)):
            self._packs = self._settle(rows.select(wanted[[0, -1]]) if len(wanted) else rows.idle())
        packed = better and bool(self._packs)
        cut = []
        for part in parts if packed else self._cut(of_rows, packed=False):
            index = wanted[torch.tensor(part, device=wanted.device)]
            cut.append((index, rows.select(index), packed and packing.pays([of_rows[row] for row in part])))
        lacking = int(self._most(len(cut))) - len(cut)
        return cut + [(wanted[:0], rows.idle(), False) for _ in range(lacking)]

    def _cut(self, rows: Sequence[packing.Size], *, packed: bool) -> list[list[int]]:
        parts: list[list[int]] = []
        for row in sorted(range(len(rows)), key=lambda row: (packed and rows[row].prompt, -sum(rows[row][1:]))):
            if parts and self._fits([rows[other] for other in [*parts[-1], row]], packed=packed):
                parts[-1].append(row)
            else:
                parts.append([row])
        return parts

    def _fits(self, rows: Sequence[packing.Size], *, packed: bool) -> bool:
        most = self._config.max_tokens_per_micro_batch
        if most is None:
            return len(rows) <= self._config.per_device_train_batch_size
        return (packing.packed_tokens if packed and packing.pays(rows) else packing.padded_tokens)(rows) <= most

    # Packed and padded.

    def _packed(self, rows: Batch) -> tuple[Tensor, Tensor]:
        there_BT = rows.completion_mask_BT
        logp_M, entropy_M = packing.packed_scores(self._model, *_listed(rows), self._config.temperature)
        nothing_BT = torch.zeros(there_BT.shape, device=there_BT.device)
        return nothing_BT.masked_scatter(there_BT, logp_M), nothing_BT.masked_scatter(there_BT, entropy_M)

    def _padded(self, rows: Batch) -> tuple[Tensor, Tensor]:
        inputs = {"input_ids": rows.input_ids_BL, "attention_mask": rows.attention_mask_BL, "use_cache": False}
        inputs |= {"position_ids": rows.position_ids_BL, "logits_to_keep": rows.completion_length + 1}
        ids_BT, there_BT = rows.input_ids_BL[:, rows.prompt_length :], rows.completion_mask_BT
        return completion_scores(self._model, inputs, ids_BT, there_BT, self._config.temperature)

    def _uncast(self) -> AbstractContextManager[None]:
        """PEFT would make an fp32 copy of each layer's input, of which autocast makes a half-precision one to keep."""
        return disable_input_dtype_casting(self._model, self._dtype != torch.float32)

    def _settle(self, rows: Batch) -> bool:
        """Whether the model can be given packed rows, and then says of these what it says of padded ones."""
        reason = packing.refusal(self._model)
        gap = 0.0 if reason else self._most(self._gap(rows))
        if not gap <= math.sqrt(torch.finfo(self._dtype).eps):
            reason = f"its log-probs are then {gap:.3g} nats off"
        if reason is None:
            packing.TRUSTED.update(packing.transformers_model(self._model))
        elif self._processes.index == 0:
            warnings.warn(f"rows are padded, and prompts computed once per completion: {reason}", stacklevel=2)
        return reason is None

    def _most(self, value: float) -> float:
        """The greatest of what the processes that share the model's shards have."""
        if not self._sharded:
            return value
        return self._processes.max(torch.tensor(value, device=next(self._model.parameters()).device)).item()

    @torch.no_grad()
    def _gap(self, rows: Batch) -> float:
        """Mean |packed - padded| log-prob, nats: of all completion tokens or of the first ones, where it is larger.

        The first row is packed twice, so that a prompt is shared."""
        twice = torch.tensor([0, *range(len(rows))])
        packed, there_BT = rows.select(twice), rows.completion_mask_BT[twice]
        with in_mode(self._model, training=False):
            gap_BT = (self(rows, packed=False)[0][twice] - self(packed, packed=True)[0]).abs()
        return max(gap_BT[:, part][there_BT[:, part]].mean().item() for part in (slice(None), slice(_FIRST)))


def _listed(rows: Batch) -> tuple[list[list[int]], list[int]]:
    """The rows' tokens without padding, and where their completions start."""
    ids_BL, there_BL = rows.input_ids_BL.cpu(), rows.attention_mask_BL.bool().cpu()
    sequences = [ids_L[there_L].tolist() for ids_L, there_L in zip(ids_BL, there_BL, strict=True)]
    return sequences, there_BL[:, : rows.prompt_length].sum(dim=1).tolist()


# The model.


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model trains or evaluates meanwhile; a sharded one is given back in shards."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        reshard(model)
        for module, mode in before:
            module.training = mode


def base_dtype(model: nn.Module) -> torch.dtype:
    """The frozen weights' dtype. Raises `ConfigError` for float16."""
    frozen = (p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    dtype = next(frozen, torch.float32)
    if dtype == torch.float16:
        raise ConfigError("a float16 base loses small gradients without loss scaling: use bfloat16 or float32")
    return dtype


# For proofs.


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
    trusted = any(base in packing.TRUSTED for base in packing.transformers_model(model))
    if trusted and packing.pays(packing.sizes(sequences, starts)):
        logp_M, _ = packing.packed_scores(model, sequences, starts, temperature)
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
