"""Two-digit addition: `17+58=` is to be answered `075`, always three digits.

The easy half of the task has no carry out of the ones column, the hard half has one. A prompt is held out by its own
text, so no generator of training data can reach one by a seed or a count.
"""

import random
import zlib
from collections.abc import Iterator
from typing import TypedDict

ANSWER_DIGITS = 3
MAX_TOKENS = ANSWER_DIGITS + 1
"""Tokens of a full answer: its digits and the end token."""

HELD_OUT_ONE_IN = 10


class Row(TypedDict):
    """One problem; `carry` is true where the ones column overflows."""

    prompt: str
    answer: str
    carry: bool


def problem(a: int, b: int) -> Row:
    """The row of `a + b`, both in 0..99."""
    return Row(prompt=f"{a:02d}+{b:02d}=", answer=f"{a + b:03d}", carry=a % 10 + b % 10 >= 10)


def without_carry(row: Row) -> str:
    """The answer of someone who forgets the carry out of the ones column: `065` for `17+58=`."""
    return f"{int(row['answer']) - 10 * row['carry']:03d}"


def is_held_out(prompt: str) -> bool:
    """Whether a prompt is kept from both training phases."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_ONE_IN == 0


def held_out_rows(count: int = 512) -> list[Row]:
    """`count` distinct held-out problems in random order, half of them with a carry."""
    return _balanced(count, held_out=True)


def training_rows(count: int = 4096) -> list[Row]:
    """`count` distinct problems for reinforcement learning in random order, half of them with a carry."""
    return _balanced(count, held_out=False)


def sloppy_sums(seed: int, forgotten: float) -> Iterator[tuple[str, str]]:
    """Endless `(prompt, answer)` pairs for pre-training, with uniform operands and no held-out prompt.

    In the share `forgotten` of the problems that need a carry it is forgotten; all other answers are right.
    """
    draw = random.Random(seed)
    while True:
        row = problem(draw.randrange(100), draw.randrange(100))
        if is_held_out(row["prompt"]):
            continue
        yield row["prompt"], without_carry(row) if draw.random() < forgotten else row["answer"]


def _balanced(count: int, *, held_out: bool) -> list[Row]:
    every = [problem(a, b) for a in range(100) for b in range(100)]
    draw, chosen = random.Random(0), list[Row]()
    for carry in (False, True):
        half = [row for row in every if row["carry"] is carry and is_held_out(row["prompt"]) is held_out]
        chosen += draw.sample(half, count // 2)
    draw.shuffle(chosen)
    return chosen
