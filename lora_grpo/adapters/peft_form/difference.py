"""How far apart two versions are, measured on what they do to the base: the effective update W = B A of each module.

For W1 = B1 A1 and W2 = B2 A2 of ranks r1 and r2, the Frobenius inner product needs no out x in matrix:

    <W1, W2> = tr(A1' B1' B2 A2) = sum over (r1, r2) of (B1' B2) * (A1 A2')

from which |W2 - W1|^2 = |W1|^2 + |W2|^2 - 2 <W1, W2>, the relative change is |W2 - W1| / |W1|, and the cosine is
<W1, W2> / (|W1| |W2|). Over all modules, inner products add up. Sums are in fp64, so that changes down to about 1e-7 of
the update are told from none."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_grpo.adapters.peft_form.serving import WEIGHTS_FILE, load_tensors
from lora_grpo.errors import StoreCorrupt

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class Difference:
    """`first` and `second` are |W1| and |W2|; `change` is |W2 - W1| / |W1| (None from zero), `cosine` of the two."""

    module: str
    first: float
    second: float
    change: float | None
    cosine: float | None


def difference(first: Path, second: Path) -> tuple[Difference, list[Difference]]:
    """Over all modules ("all"), and of each, of two folders in serving form that adapt the same modules."""
    inner = dict(_inner_products(load_tensors(first / WEIGHTS_FILE), load_tensors(second / WEIGHTS_FILE)))
    total = [math.fsum(one[index] for one in inner.values()) for index in range(3)]
    return _difference("all", *total), [_difference(module, *one) for module, one in inner.items()]


def _inner_products(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Iterator[tuple[str, list[float]]]:
    """Of each module <W1, W1>, <W2, W2> and <W1, W2>."""
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())[0]
        raise StoreCorrupt(f"the two versions adapt different modules: only one of them has {odd}")
    for name in sorted(first):
        if name.endswith(_A):
            other = name.removesuffix(_A) + _B
            if not all(_is_pair(tensors.get(other), tensors[name]) for tensors in (first, second)):
                raise StoreCorrupt(f"{name} has no matching B")
            one, two = ((tensors[other].double(), tensors[name].double()) for tensors in (first, second))
            if (one[0].shape[0], one[1].shape[1]) != (two[0].shape[0], two[1].shape[1]):
                raise StoreCorrupt(f"the two versions adapt different modules: {name} has different sizes")
            yield name.removeprefix(_PREFIX).removesuffix(_A), [_dot(one, one), _dot(two, two), _dot(one, two)]


def _is_pair(b_OR: Tensor | None, a_RI: Tensor) -> bool:
    return b_OR is not None and b_OR.dim() == a_RI.dim() == 2 and b_OR.shape[1] == a_RI.shape[0]


def _dot(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> float:
    """<B1 A1, B2 A2> by (r1, r2) products."""
    (b1_OR, a1_RI), (b2_OR, a2_RI) = one, two
    return float(((b1_OR.T @ b2_OR) * (a1_RI @ a2_RI.T)).sum())


def _difference(module: str, inner_1: float, inner_2: float, both: float) -> Difference:
    first, second = math.sqrt(max(0.0, inner_1)), math.sqrt(max(0.0, inner_2))
    apart = math.sqrt(max(0.0, inner_1 + inner_2 - 2 * both))
    product = first * second
    cosine = max(-1.0, min(1.0, both / product)) if product else None
    return Difference(module, first, second, apart / first if first else None, cosine)
