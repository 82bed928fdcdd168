"""Rows without padding: sequences one behind the other in a single row of the model, each prompt only once.

A row is made of spans. A completion whose prompt stands in the row already is a span of its own that sees that prompt
and itself; any other sequence is a span that sees itself. Attention is computed span by span with the model's own
function and the model's own mask, as if prompt and completion stood alone, so that no token of another sequence is
ever seen or computed.

Letters: N tokens of the row, M scored tokens, H heads, D their size."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_grpo.grpo.head import completion_scores

_PACKED = {name: f"lora_grpo_packed_{name}" for name in ("sdpa", "eager")}
"""transformers' attention implementations that are called span by span, and the names they then have."""


class Span(NamedTuple):
    """Tokens `start` to `stop` of a row, behind those from `before` to `before + seen`."""

    start: int
    stop: int
    before: int = 0
    seen: int = 0


@dataclass(frozen=True)
class _Seen:
    """Stands for the mask in a packed forward: the spans, each with its mask, (1, 1, queries, keys)."""

    spans: Sequence[Span]
    masks: tuple[Tensor | None, ...]


_EAGER = "eager_attention_forward"  # each of transformers' model files has its own
_SPANS: ContextVar[Sequence[Span] | None] = ContextVar("spans", default=None)  # of the row on its way through a model


# The row.


class Packed(NamedTuple):
    ids: list[int]
    positions: list[int]  # each sequence's tokens count from 0, its prompt's included
    spans: list[Span]
    predicting: list[int]  # (M,) where in the row each scored token is predicted
    scored: list[int]  # (M,) the tokens from their sequences' starts on, one sequence after the other


def pack(sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Packed:
    """`sequences` are scored from their `starts` on; those that are the same up to there share their tokens."""
    row = Packed([], [], [], [], [])
    places: dict[tuple[int, ...], int] = {}
    for ids, start in zip(sequences, starts, strict=True):
        here, prompt = len(row.ids), tuple(ids[:start])
        there = places.setdefault(prompt, here)
        first = start if there != here else 0
        row.ids.extend(ids[first:])
        row.positions.extend(range(first, len(ids)))
        if len(ids) > first:
            row.spans.append(Span(here, len(row.ids), there, first))
        if len(ids) > start:
            row.predicting.extend([there + start - 1, *range(len(row.ids) - len(ids) + start, len(row.ids) - 1)])
            row.scored.extend(ids[start:])
    return row


def packed_scores(
    model: nn.Module, sequences: Sequence[Sequence[int]], starts: Sequence[int], temperature: float
) -> tuple[Tensor, Tensor]:
    """logp_M and entropy_M of the scored tokens, fp32, nats; see `completion_scores`.

    With gradient checkpointing the backward has to be `in_spans` too."""
    row, device = pack(sequences, starts), next(model.parameters()).device
    ids_1N = torch.tensor([row.ids], device=device)
    scored_1M = torch.tensor([row.scored], device=device)
    positions_1N, kept = (torch.tensor(of, device=device) for of in ([row.positions], [*row.predicting, 0]))
    inputs = {"input_ids": ids_1N, "attention_mask": torch.ones_like(ids_1N), "use_cache": False}
    inputs |= {"position_ids": positions_1N, "logits_to_keep": kept}
    wanted_1M = torch.ones_like(scored_1M, dtype=torch.bool)
    with in_spans(model, row.spans):
        logp_1M, entropy_1M = completion_scores(model, inputs, scored_1M, wanted_1M, temperature)
    return logp_1M[0], entropy_1M[0]


# The model's attention, span by span.


@contextmanager
def in_spans(model: nn.Module, spans: Sequence[Span] | None = None) -> Iterator[None]:
    """The model takes a packed row of these spans meanwhile; rows of another length go through it as ever."""
    configs: dict[int, Any] = {id(one.config): one.config for one in model.modules() if hasattr(one, "config")}
    named = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
    changed = [(config, name) for config, name in named if name in _PACKED]
    for config, name in changed:
        config._attn_implementation = {"": _PACKED[name]}
    before = _SPANS.set(spans)
    try:
        yield
    finally:
        _SPANS.reset(before)
        for config, name in changed:
            config._attn_implementation = {"": name}


def _attend(
    name: str, module: nn.Module, query_1HND: Tensor, key_1HND: Tensor, value_1HND: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    own_file = sys.modules[type(module).__module__]
    attend: Callable[..., tuple[Tensor, None]] = ALL_ATTENTION_FUNCTIONS.get(name) or getattr(own_file, _EAGER)
    if not isinstance(mask, _Seen):
        return attend(module, query_1HND, key_1HND, value_1HND, mask, **kwargs)
    # Cut in one go: the gradient of each slice would be a whole tensor, zero but for it.
    lengths = [span.stop - span.start for span in mask.spans]
    cut = [tensor.split(lengths, dim=2) for tensor in (query_1HND, key_1HND, value_1HND)]
    pieces: dict[int, list[Tensor]] = {}
    prompts: dict[int, list[Tensor]] = {}
    outputs_1THD = []
    for span, span_mask, query, *own in zip(mask.spans, mask.masks, *cut, strict=True):
        pieces[span.start] = own
        if span.seen:
            if span.before not in prompts:
                prompts[span.before] = [piece[:, :, : span.seen] for piece in pieces[span.before]]
            own = [torch.cat(both, dim=2) for both in zip(prompts[span.before], own, strict=True)]
        outputs_1THD.append(attend(module, query, *own, span_mask, **kwargs)[0])
    return torch.cat(outputs_1THD, dim=1), None


def _masks(name: str, *, q_length: int, kv_length: int, q_offset: int, attention_mask: Any, **kwargs: Any) -> Any:
    """The model's mask for each span, as if what the span sees stood alone: windows and chunks count from there."""
    make, spans = ALL_MASK_ATTENTION_FUNCTIONS[name], _SPANS.get()
    if spans is None or spans[-1].stop != q_length:
        return make(q_length=q_length, kv_length=kv_length, q_offset=q_offset, attention_mask=attention_mask, **kwargs)
    made: dict[tuple[int, int], Tensor | None] = {}
    for span in spans:
        size = (span.stop - span.start, span.seen)
        if size not in made:
            mask = make(q_length=size[0], kv_length=sum(size), q_offset=size[1], attention_mask=None, **kwargs)
            if mask is not None and mask.dtype == torch.bool:
                # Else attention would make such a one in each layer, and keep it for the way back.
                mask = mask.new_zeros(mask.shape, dtype=kwargs["dtype"]).masked_fill_(~mask, -torch.inf)
            made[size] = mask
    return _Seen(spans, tuple(made[span.stop - span.start, span.seen] for span in spans))


for _name, _packed_name in _PACKED.items():
    AttentionInterface.register(_packed_name, partial(_attend, _name))
    AttentionMaskInterface.register(_packed_name, partial(_masks, _name))


# Which models take packed rows, and when it pays.

_SEE_ALL = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layer types whose tokens meet in attention alone; others carry something over from what stands before in the row."""


class Size(NamedTuple):
    """Tokens of a sequence's prompt and completion; `prompt` is the first sequence that has the same one."""

    prompt: int
    prompt_length: int
    length: int


def sizes(sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Size]:
    first: dict[tuple[int, ...], int] = {}
    pairs = enumerate(zip(sequences, starts, strict=True))
    return [Size(first.setdefault(tuple(ids[:at]), row), at, len(ids) - at) for row, (ids, at) in pairs]


def packed_tokens(rows: Sequence[Size]) -> int:
    return sum({row.prompt: row.prompt_length for row in rows}.values()) + sum(row.length for row in rows)


def padded_tokens(rows: Sequence[Size]) -> int:
    """With prompts padded to the longest, and completions too."""
    return len(rows) * (max(row.prompt_length for row in rows) + max(row.length for row in rows))


def pays(rows: Sequence[Size]) -> bool:
    """Whether packing saves a tenth of the tokens at least: from there on, time goes with them (measured)."""
    return 10 * packed_tokens(rows) <= 9 * padded_tokens(rows)


TRUSTED: WeakSet[PreTrainedModel] = WeakSet()  # they have said of packed rows what they say of padded ones


def transformers_model(model: nn.Module) -> list[PreTrainedModel]:
    """The outermost one, if there is any."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)][:1]


def refusal(model: nn.Module) -> str | None:
    """Why a model cannot take packed rows, as far as its class and config say."""
    base = next(iter(transformers_model(model)), None)
    if base is None or not type(base).__module__.startswith("transformers."):
        return "its code is not transformers' own"
    if hasattr(model, "_orig_mod") or any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        return "it is compiled"
    text: Any = base.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - _SEE_ALL
    if kinds or base._is_stateful:
        return f"it has layers with a state ({', '.join(sorted(kinds)) or 'by its class'})"
    own_file = sys.modules[type(base.get_decoder()).__module__]
    found = text._attn_implementation != "eager" or hasattr(own_file, _EAGER)
    if text._attn_implementation not in _PACKED or not base._supports_attention_backend or not found:
        return f"its attention ({text._attn_implementation}) is not called span by span"
    return None
