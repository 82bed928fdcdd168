"""The compiled loops: exact, each row on its own, refused where they do not fit, and what happens without them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_grpo.kernels import building
from lora_grpo.kernels.moving import Cast, Copies
from lora_grpo.kernels.rows import SlotRows, can_add, compiled, takes

BF16 = torch.bfloat16


@pytest.fixture
def fresh_look() -> Iterator[None]:
    """`compiled` looks again, and the next test does too."""
    building.library.cache_clear()
    compiled.cache_clear()
    yield
    building.library.cache_clear()
    compiled.cache_clear()


def layer(inputs: int, outputs: tuple[int, ...], rank: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    a = [(torch.randn(rank, inputs, generator=generator) / inputs**0.5).to(BF16) for _ in outputs]
    b = [(torch.randn(width, rank, generator=generator) / rank**0.5).to(BF16) for width in outputs]
    return a, b


def batch(rows: int, inputs: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, width, generator=generator).to(BF16), torch.randn(rows, inputs, generator=generator).to(
        BF16
    )


def exact(
    y: torch.Tensor, x: torch.Tensor, a: list[torch.Tensor], b: list[torch.Tensor], scale: float = 1.0
) -> torch.Tensor:
    """In float64."""
    return y.double() + scale * torch.cat(
        [(x.double() @ a_RI.double().T) @ b_OR.double().T for a_RI, b_OR in zip(a, b, strict=True)], dim=1
    )


@pytest.mark.parametrize("rank", [1, 5, 8, 16, 24, 64])
@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [(64, (64,)), (896, (896, 128, 128)), (48, (80, 80)), (37, (21,)), (5, (3, 7, 16))],
    ids=["plain", "qkv", "gate_up", "no multiple of 16", "tiny"],
)
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 13, 32])
def test_the_sum_is_rounded_once(rows: int, inputs: int, outputs: tuple[int, ...], rank: int) -> None:
    """Off by no more than rounding the exact sum to bfloat16 is."""
    a, b = layer(inputs, outputs, rank)
    y, x = batch(rows, inputs, sum(outputs))
    wanted, before = exact(y, x, a, b, 0.5), y.clone()
    assert takes(a, b)
    assert can_add(y, x)
    SlotRows(compiled(), a, b).add(y, x, 0.5)
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8, atol=1e-5)
    assert not torch.equal(y, before)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_is_what_it_is_alone(threads: int) -> None:
    """Bit for bit, beside whatever rows and on however many threads."""
    a, b = layer(96, (48, 40), 16)
    rows = SlotRows(compiled(), a, b)
    y, x = batch(15, 96, 88)
    alone = y.clone()
    for row in range(len(y)):
        rows.add(alone[row : row + 1], x[row : row + 1], 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows.add(y, x, 1.0)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, alone)


def test_rows_may_lie_apart_and_nothing_between_them_is_touched() -> None:
    a, b = layer(32, (40,), 8)
    wide_y, wide_x = torch.full((5, 64), 7.0, dtype=BF16), torch.full((5, 50), 9.0, dtype=BF16)
    y, x = batch(5, 32, 40)
    wide_y[:, :40], wide_x[:, 3:35] = y, x
    SlotRows(compiled(), a, b).add(wide_y[:, :40], wide_x[:, 3:35], 1.0)
    torch.testing.assert_close(wide_y[:, :40].double(), exact(y, x, a, b), rtol=2**-8, atol=1e-5)
    assert (wide_y[:, 40:] == 7.0).all()


def test_zeros_beside_a_lower_rank_change_nothing() -> None:
    a, b = layer(64, (64,), 16)
    a[0][4:], b[0][:, 4:] = 0, 0
    y, x = batch(6, 64, 64)
    narrow = y.clone()
    SlotRows(compiled(), a, b).add(y, x, 1.0)
    SlotRows(compiled(), [a[0][:4].contiguous()], [b[0][:, :4].contiguous()]).add(narrow, x, 1.0)
    torch.testing.assert_close(y, narrow)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    a, b = layer(64, (48,), 16)
    y, x = batch(3, 64, 48)
    y[1, 5] = value
    SlotRows(compiled(), a, b).add(y, x, 1.0)
    torch.testing.assert_close(y[1, 5].float(), torch.tensor(value), equal_nan=True)
    assert y.isfinite().sum() == y.numel() - 1


@pytest.mark.parametrize(
    ("rows", "dtype", "step"), [(33, BF16, 1), (4, torch.float32, 1), (4, BF16, 2)], ids=["many", "fp32", "strided"]
)
def test_other_rows_are_left_to_torch(rows: int, dtype: torch.dtype, step: int) -> None:
    assert can_add(torch.zeros(4, 8, dtype=BF16), torch.zeros(4, 8, dtype=BF16))
    assert not can_add(torch.zeros(rows, 8, dtype=dtype), torch.zeros(rows, 8 * step, dtype=dtype)[:, ::step])


def test_other_slots_are_left_to_torch() -> None:
    a, b = layer(64, (32, 32), 8)
    assert takes(a, b)
    assert not takes([a[0], a[1][:4]], [b[0], b[1][:, :4].contiguous()])
    assert not takes(a, [b[0], b[1][:, ::1].t().contiguous().t()])
    assert not takes([tensor.float() for tensor in a], [tensor.float() for tensor in b])


def parameters(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.nn.Parameter(torch.randn(shape, generator=generator) * 3) for shape in shapes]


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1.0, 0.3, 7.1)])
def test_casting_scales_in_fp32_and_rounds_once(scales: tuple[float, ...]) -> None:
    own = parameters((16, 40), (3, 7), (1, 1))
    flat = torch.zeros(16 * 40 + 21 + 1, dtype=BF16)
    cast = Cast(flat, [one.numel() for one in own])
    assert cast.takes(own)
    assert cast.run(own, scales)
    wanted = torch.cat([(one.detach() * scale).flatten() for one, scale in zip(own, scales, strict=True)])
    assert torch.equal(flat, wanted.to(BF16))


@pytest.mark.parametrize("index", [0, 17, 39, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_casting_tells_what_is_not_finite_in_bfloat16(value: float, index: int) -> None:
    """3.4e38 is finite in fp32 and rounds to infinity."""
    own = parameters((1, 41), (5, 5))
    flat = torch.zeros(66, dtype=BF16)
    cast = Cast(flat, [41, 25])
    assert cast.run(own, [1.0, 1.0])
    with torch.no_grad():
        own[0].view(-1)[index] = value
    assert not cast.run(own, [1.0, 1.0])
    assert flat.isfinite().sum() == 65


def test_casting_refuses_other_parameters() -> None:
    (own,) = parameters((4, 6))
    cast = Cast(torch.zeros(24, dtype=BF16), [24])
    assert cast.takes([own])
    others = [torch.nn.Parameter(own.to(BF16)), torch.nn.Parameter(own.detach().t()), own.detach(), *parameters((4, 5))]
    assert not any(cast.takes([other]) for other in others)
    assert not Cast(torch.zeros(24), [24]).takes([own])


def test_copies_go_where_they_belong_and_nowhere_else() -> None:
    room = torch.full((4, 50), 7.0, dtype=BF16)
    sources = [torch.randn(50).to(BF16), torch.randn(20).to(BF16)]
    copies = Copies([room[1], room[3, :20]])
    assert copies.takes(sources)
    copies.run(sources)
    assert torch.equal(room[1], sources[0])
    assert torch.equal(room[3, :20], sources[1])
    assert (room[0] == 7.0).all()
    assert (room[2] == 7.0).all()
    assert (room[3, 20:] == 7.0).all()


def test_copies_refuse_what_does_not_lie_in_a_row() -> None:
    room, one = torch.zeros(4, 6, dtype=BF16), torch.ones(4, 6, dtype=BF16)
    assert Copies([room]).takes([one])
    assert not Copies([room[:, :3]]).takes([one[:, :3].contiguous()])
    assert not any(Copies([room]).takes([other]) for other in (one.float(), one[:, :5].contiguous(), one.t()))


@pytest.mark.usefixtures("fresh_look")
def test_without_a_compiler_there_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.warns(
        RuntimeWarning, match="/nowhere/g\\+\\+ did not compile the CPU kernels.*slower.*install g\\+\\+"
    ):
        assert compiled() is None


@pytest.mark.usefixtures("fresh_look")
def test_a_compiler_that_refuses_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(building, "FLAGS", (*building.FLAGS, "-fno-such-thing"))
    with pytest.warns(RuntimeWarning, match="It said: .*fno-such-thing"):
        assert compiled() is None
    assert list((tmp_path / "lora-grpo").iterdir()) == []


def test_it_is_compiled_once_and_shares_torchs_threads(tmp_path: Path) -> None:
    """A second OpenMP beside torch's would have two sets of threads fight for the same cores."""
    program = (
        "from lora_grpo.kernels.rows import compiled; assert compiled() is not None;"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    made = set()
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == "1", done.stderr
        (library,) = (tmp_path / "lora-grpo").iterdir()
        made.add(library.stat().st_mtime_ns)
    assert len(made) == 1
    environment["CXX"] = "/bin/false"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "are slower on this CPU" in done.stderr
