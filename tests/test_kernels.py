"""The compiled loops: exact, each row on its own, refused where they do not fit, and what happens without them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_grpo import kernels
from lora_grpo.kernels import FEW_ROWS, MOST_WORK, Cast, Copies, SlotRows

BF16 = torch.bfloat16


@pytest.fixture
def fresh_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing is compiled yet, and where what is compiled will be kept; the next test finds things as they were."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    _forget()
    yield tmp_path / "lora-grpo"
    _forget()


def _forget() -> None:
    kernels.library.cache_clear()


def rows_of(a: list[torch.Tensor], b: list[torch.Tensor]) -> SlotRows:
    made = SlotRows.of(a, b)
    assert made is not None
    return made


def layer(
    inputs: int, outputs: tuple[int, ...], rank: int, dtype: torch.dtype = BF16
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    a = [(torch.randn(rank, inputs, generator=generator) / inputs**0.5).to(dtype) for _ in outputs]
    b = [(torch.randn(width, rank, generator=generator) / rank**0.5).to(dtype) for width in outputs]
    return a, b


def batch(rows: int, inputs: int, width: int, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    y, x = (torch.randn(rows, size, generator=generator).to(dtype) for size in (width, inputs))
    return y, x


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
@pytest.mark.parametrize(("dtype", "rounding"), [(BF16, 2**-8), (torch.float32, 2**-18)], ids=["bf16", "fp32"])
def test_the_sum_is_rounded_once(
    rows: int, inputs: int, outputs: tuple[int, ...], rank: int, dtype: torch.dtype, rounding: float
) -> None:
    """In bfloat16 off by no more than rounding the exact sum is."""
    rows = min(rows, FEW_ROWS[dtype])
    a, b = layer(inputs, outputs, rank, dtype)
    y, x = batch(rows, inputs, sum(outputs), dtype)
    wanted, before = exact(y, x, a, b, 0.5), y.clone()
    slot = rows_of(a, b)
    assert slot.takes(y, x)
    slot.add(y, x, 0.5)
    torch.testing.assert_close(y.double(), wanted, rtol=rounding, atol=1e-5)
    assert not torch.equal(y, before)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_a_row_is_what_it_is_alone(threads: int, dtype: torch.dtype) -> None:
    """Bit for bit, beside whatever rows and on however many threads."""
    a, b = layer(96, (48, 40), 16, dtype)
    rows = rows_of(a, b)
    y, x = batch(15, 96, 88, dtype)
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
    rows_of(a, b).add(wide_y[:, :40], wide_x[:, 3:35], 1.0)
    torch.testing.assert_close(wide_y[:, :40].double(), exact(y, x, a, b), rtol=2**-8, atol=1e-5)
    assert (wide_y[:, 40:] == 7.0).all()


def test_zeros_beside_a_lower_rank_change_nothing() -> None:
    a, b = layer(64, (64,), 16)
    a[0][4:], b[0][:, 4:] = 0, 0
    y, x = batch(6, 64, 64)
    narrow = y.clone()
    rows_of(a, b).add(y, x, 1.0)
    rows_of([a[0][:4].contiguous()], [b[0][:, :4].contiguous()]).add(narrow, x, 1.0)
    torch.testing.assert_close(y, narrow)


def test_a_nan_of_all_ones_stays_one() -> None:
    """Rounding up its mantissa would carry into the sign and make it -0."""
    a, b = layer(16, (16,), 8)
    y, x = batch(2, 16, 16)
    x[0] = torch.tensor([0x7FFF] * 16, dtype=torch.int16).view(BF16)
    rows_of(a, b).add(y, x, 1.0)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()
    own = [torch.nn.Parameter(torch.tensor([[0x7FFFFFFF] * 40], dtype=torch.int32).view(torch.float32))]
    flat = torch.zeros(40, dtype=BF16)
    assert not Cast(flat, [40]).run(own, [1.0])
    assert flat.isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    a, b = layer(64, (48,), 16)
    y, x = batch(3, 64, 48)
    y[1, 5] = value
    rows_of(a, b).add(y, x, 1.0)
    torch.testing.assert_close(y[1, 5].float(), torch.tensor(value), equal_nan=True)
    assert y.isfinite().sum() == y.numel() - 1


def test_other_rows_are_left_to_torch() -> None:
    slot = rows_of(*layer(8, (6, 4), 2))
    y, x = torch.zeros(4, 10, dtype=BF16), torch.zeros(4, 8, dtype=BF16)
    assert slot.takes(y, x)
    others = {
        "many": (torch.zeros(FEW_ROWS[BF16] + 1, 10, dtype=BF16), torch.zeros(FEW_ROWS[BF16] + 1, 8, dtype=BF16)),
        "fp32": (y.float(), x.float()),
        "one fp32": (y, x.float()),
        "elements apart": (y, torch.zeros(4, 16, dtype=BF16)[:, ::2]),
        "elements of y apart": (torch.zeros(4, 20, dtype=BF16)[:, ::2], x),
        "narrow x": (y, x[:, :7]),
        "wide x": (y, torch.zeros(4, 9, dtype=BF16)),
        "narrow y": (y[:, :9], x),
        "fewer x": (y, x[:3]),
        "fewer y": (y[:3], x),
    }
    assert [name for name, (y, x) in others.items() if slot.takes(y, x)] == []


def test_much_work_is_left_to_torch() -> None:
    a, b = layer(4096, (4096,), 64)
    rows = MOST_WORK // (64 * 8192)
    y, x = batch(rows + 1, 4096, 4096)
    assert 0 < rows < FEW_ROWS[BF16]
    assert rows_of(a, b).takes(y[:rows], x[:rows])
    assert not rows_of(a, b).takes(y, x)


def test_other_slots_are_left_to_torch() -> None:
    a, b = layer(64, (32, 32), 8)
    assert SlotRows.of(a, b) is not None
    assert SlotRows.of([a[0], a[1][:4]], [b[0], b[1][:, :4].contiguous()]) is None
    assert SlotRows.of(a, [b[0], b[1].t().contiguous().t()]) is None
    assert SlotRows.of(a, [b[0], b[1][:, :4].contiguous()]) is None
    assert SlotRows.of([a[0], a[1][:, :32].contiguous()], b) is None
    assert SlotRows.of([tensor.half() for tensor in a], [tensor.half() for tensor in b]) is None
    assert SlotRows.of(a, [tensor.float() for tensor in b]) is None


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
    assert not any(
        Copies([room]).takes([other]) for other in (one.float(), one.half(), one[:, :5].contiguous(), one.t())
    )


def compiler(folder: Path, script: str) -> str:
    """A compiler of this script's making."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


SCRIPTS = {
    "refuses": ("echo no such flag >&2; exit 1", "no such flag"),
    "says nothing": ("echo >&2; exit 1", "CalledProcessError"),
    "in Latin-1": ("printf 'caf\\351' >&2; exit 1", "caf"),
    "makes nothing": ("exit 0", "No such file"),
    "hangs": ("exec sleep 60", "timed out"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_compiler_that_fails_is_a_warning(
    name: str, fresh_look: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script, said = SCRIPTS[name]
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    monkeypatch.setattr(kernels, "PATIENCE_S", 0.3)
    with pytest.warns(RuntimeWarning, match=f"compiler did not compile.*slower.*install g.*said: .*{said}"):
        assert SlotRows.of(*layer(64, (32,), 8)) is None
    assert not Cast(torch.zeros(24, dtype=BF16), [24]).takes(parameters((4, 6)))
    assert not Copies([torch.zeros(4)]).takes([torch.zeros(4)])
    assert not fresh_look.exists() or list(fresh_look.iterdir()) == []


@pytest.mark.usefixtures("fresh_look")
def test_without_a_compiler_there_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.warns(RuntimeWarning, match="/nowhere/g.. did not compile the CPU kernels.*No such file"):
        assert kernels.library() is None


def test_a_compiler_may_have_arguments(fresh_look: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env LANG=C g++")
    assert kernels.library() is not None
    assert len(list(fresh_look.iterdir())) == 1


@pytest.mark.parametrize("changed", ["processor", "machine", "header", "source", "flags"])
def test_other_machines_and_other_sources_have_a_library_of_their_own(
    changed: str, fresh_look: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cache may lie in a home that unlike machines share, and outlives this version of the sources."""
    assert kernels.library() is not None
    (first,) = fresh_look.iterdir()
    if changed == "processor":
        monkeypatch.setattr(kernels, "_processor", lambda: "flags : another")
    elif changed == "machine":
        monkeypatch.setattr(kernels.platform, "machine", lambda: "another")
    elif changed == "flags":
        monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, "-DANOTHER"))
    else:
        for name in ("SOURCES", "HEADERS"):
            copies = [Path(shutil.copy(file, tmp_path)) for file in getattr(kernels, name)]
            monkeypatch.setattr(kernels, name, copies)
            if name == f"{changed.upper()}S":
                copies[0].write_text(copies[0].read_text() + "\n")
    kernels.library.cache_clear()
    assert kernels.library() is not None
    assert len(list(fresh_look.iterdir())) == 2
    assert first.exists()


def test_the_processor_is_told_by_its_flags_and_its_kind() -> None:
    """`-march=native` asks the processor for both; a name may stand for several, as of virtual machines."""
    if platform.machine() != "x86_64":
        pytest.skip("an x86-64 processor's /proc/cpuinfo")
    lines = dict(line.split("\t", 1) for line in kernels._processor().splitlines())
    assert {"flags", "vendor_id", "cpu family", "model"} == set(lines)
    assert "sse2" in lines["flags"].split()


def test_what_was_compiled_and_does_not_load_is_compiled_again(fresh_look: Path) -> None:
    assert kernels.library() is not None
    (path,) = fresh_look.iterdir()
    path.unlink()  # the loaded one stays mapped; written over, it would crash the process at its end
    path.write_bytes(b"")
    kernels.library.cache_clear()
    assert kernels.library() is not None


def test_no_home_is_no_reason(fresh_look: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Containers run as users that have none, or none that they can write to."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kernels, "user_cache", homeless)
    assert kernels.library() is not None
    (tmp_path / "file").touch()
    monkeypatch.setattr(kernels, "user_cache", lambda: tmp_path / "file" / "cache")
    kernels.library.cache_clear()
    assert kernels.library() is not None
    assert not fresh_look.exists()


@pytest.mark.parametrize("flag", ["-march=haswell", "-march=x86-64"])
def test_narrower_vectors_give_the_same(flag: str, fresh_look: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a processor without 512-bit vectors computes; this one can compute it too."""
    if platform.machine() != "x86_64":
        pytest.skip("flags of x86-64")
    a, b = layer(37, (21, 64), 24)
    y, x = batch(13, 37, 85)
    native, wanted = y.clone(), exact(y, x, a, b)
    rows_of(a, b).add(native, x, 1.0)
    _forget()
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, flag, "-Wno-psabi"))
    rows_of(a, b).add(y, x, 1.0)
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(y, native, rtol=2**-7, atol=1e-5)
    assert len(list(fresh_look.iterdir())) == 2


def test_it_is_compiled_once_and_shares_torchs_threads(tmp_path: Path) -> None:
    """A second OpenMP beside torch's would have two sets of threads fight for the same cores."""
    program = (
        "import torch; from lora_grpo.kernels import library; assert library() is not None;"
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
