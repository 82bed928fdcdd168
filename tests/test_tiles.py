"""Tiles of Intel processors: asked for in each process that may compute, and done without where they are refused."""

from __future__ import annotations

import errno
import platform
import signal
import subprocess
import sys

import pytest
import torch

from lora_grpo.engines.compat import patching

REQUEST = (158, 0x1023, 18)
"""arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA) on x86-64."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The system calls made on a processor with tiles, whose kernel gives them."""
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(patching, "_syscall", lambda *call: calls.append(call) or 0)
    return calls


def test_the_permission_is_asked_for_where_there_are_tiles(asked: list[tuple[int, ...]]) -> None:
    patching.allow_tiles()
    assert asked == [REQUEST]
    assert torch.cpu._is_amx_tile_supported()


def test_nothing_is_asked_where_there_are_none(asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    patching.allow_tiles()
    assert asked == []


@pytest.mark.vllm
@pytest.mark.parametrize(("refusal", "says"), [(errno.EOPNOTSUPP, "arch_prctl"), (errno.ENOSPC, "signal stack")])
@pytest.mark.usefixtures("asked")
def test_a_refusal_is_told_and_vllm_computes_without(monkeypatch: pytest.MonkeyPatch, refusal: int, says: str) -> None:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    assert _get_attn_isa(torch.bfloat16, 128, 64) == "amx"
    monkeypatch.setattr(patching, "_syscall", lambda *_: refusal)
    with pytest.warns(RuntimeWarning, match=f"AMX tiles.*refuses.*{says}.*without them"):
        patching.allow_tiles()
    assert _get_attn_isa(torch.bfloat16, 128, 64) == "vec"


@pytest.mark.vllm
@pytest.mark.usefixtures("asked")
def test_each_process_of_a_server_asks(asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_grpo.engines.resolver import URL_VARIABLE, register

    monkeypatch.delenv(URL_VARIABLE, raising=False)
    register()
    assert asked == [REQUEST]


KERNEL = """
import ctypes, torch, warnings
from lora_grpo.engines.compat.patching import allow_tiles
warnings.simplefilter("ignore")
torch.cpu._is_amx_tile_supported = lambda: True
allow_tiles()
given = ctypes.c_uint64(0)
ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(given))
print(bool(given.value >> 18 & 1), torch.cpu._is_amx_tile_supported())
"""


def test_the_kernel_is_asked_in_earnest() -> None:
    """In a fresh process, on any machine: what vLLM then goes by is what the kernel says that it gave."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("system calls of Linux on x86-64")
    said = subprocess.run([sys.executable, "-c", KERNEL], check=True, capture_output=True, text=True).stdout.split()
    assert said in (["True", "True"], ["False", "False"])
    if torch.cpu._is_amx_tile_supported():
        assert said == ["True", "True"]


ATTENTION = """
import sys, torch, vllm._custom_ops as ops
from lora_grpo.engines.compat.patching import allow_tiles
isa, asks = sys.argv[1:]
if asks == "asks":
    allow_tiles()
bf16, lengths = torch.bfloat16, torch.tensor([16], dtype=torch.int32)
rows = [torch.randn(16, 2, 64, dtype=bf16) for _ in range(3)]
keys, values = (torch.zeros(4, 2, 128, 64, dtype=bf16) for _ in range(2))
ops.cpu_attn_reshape_and_cache(rows[1], rows[2], keys, values, torch.arange(16), isa)
starts = torch.tensor([0, 16], dtype=torch.int32)
plan = ops.cpu_attn_get_scheduler_metadata(1, 2, 2, 64, lengths, bf16, starts, True, -1, isa, False)
table, out = torch.zeros(1, 1, dtype=torch.int32), torch.full_like(rows[0], float("nan"))
ops.cpu_attention_with_kv_cache(
    rows[0], keys, values, out, starts, lengths, 0.125, True, None, -1, table, 0.0, plan, None
)
assert torch.isfinite(out).all()
"""


@pytest.mark.vllm
@pytest.mark.parametrize("isa", ["vec", "amx"])
def test_attention_in_a_process_whose_layers_have_not_asked(isa: str) -> None:
    """Without the permission the kernel ends it, unless a library of vLLM's asked; with it attention computes."""
    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has no AMX tiles (amx_tile)")
    command = [sys.executable, "-c", ATTENTION, isa]
    silent, asking = (subprocess.run([*command, asks], capture_output=True) for asks in ("", "asks"))
    assert silent.returncode in ((0, -signal.SIGILL) if isa == "amx" else (0,)), silent.stderr.decode()
    assert asking.returncode == 0, asking.stderr.decode()
