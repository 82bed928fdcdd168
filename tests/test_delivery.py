"""Whatever vLLM would accept and not apply is refused by name, and nothing half-loaded stays behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from lora_grpo.adapters.files import disk, places
from lora_grpo.adapters.files.disk import digest_buffers
from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import CONFIG_FILE, WEIGHTS_FILE, AdapterVersion
from lora_grpo.engines import compat
from lora_grpo.engines.base import BaseDescription, Witness
from lora_grpo.engines.delivery import probe
from lora_grpo.engines.delivery.agreement import probe_error
from lora_grpo.engines.delivery.probe import run_probe
from lora_grpo.engines.delivery.slots import SlotView
from lora_grpo.engines.fake import FakeEngine
from lora_grpo.engines.vllm_local import VLLMEngine
from lora_grpo.errors import ConfigError, DeliveryError, EngineError, NoRoom, UnknownVersion, UnsupportedAdapter
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.sync import NativeSync
from lora_grpo.types import Sampling
from tests.conftest import ENGINE_ARGS
from tests.store_files import digest_of
from tests.tiny_models import load_model, refill_lora, tiny_lora, tiny_model

pytestmark = pytest.mark.vllm

Tensors = dict[str, torch.Tensor]
GREEDY = Sampling(max_tokens=4, temperature=0.0)
PROMPT = list(range(10, 20))
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def good(llama_dir: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and config of a sound rank-16 adapter in serving form."""
    files = ServingForm(tiny_lora(load_model(llama_dir), r=16), "default", torch.bfloat16).files()
    return load(b"".join(files[WEIGHTS_FILE])), json.loads(files[CONFIG_FILE][0])


def forge(folder: Path, tensors: Tensors | bytes, config: dict[str, Any] | bytes, number: int = 1) -> AdapterVersion:
    """A version whose digest fits its files, whatever is in them."""
    path = folder / "versions" / f"{number:06d}"
    path.mkdir(parents=True)
    weights = tensors if isinstance(tensors, bytes) else save(tensors)
    settings = config if isinstance(config, bytes) else json.dumps(config).encode()
    (path / WEIGHTS_FILE).write_bytes(weights)
    (path / CONFIG_FILE).write_bytes(settings)
    return AdapterVersion(number, None, path, digest_of(path), 0, 0.0)


def renamed(change: Callable[[str], str]) -> Callable[[Tensors, dict[str, Any]], Any]:
    """The adapter under other module names, in file and config alike."""

    def apply(tensors: Tensors, config: dict[str, Any]) -> Any:
        paths = [
            change(f"base_model.model.{path}").removeprefix("base_model.model.") for path in config["target_modules"]
        ]
        return {change(name): tensor for name, tensor in tensors.items()}, {**config, "target_modules": paths}

    return apply


def with_tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors, dict[str, Any]], Any]:
    return lambda tensors, config: ({**tensors, name: make(tensors[name]).contiguous()}, config)


def without(*names: str) -> Callable[[Tensors, dict[str, Any]], Any]:
    return lambda tensors, config: ({k: v for k, v in tensors.items() if k not in names}, config)


def extra(name: str) -> Callable[[Tensors, dict[str, Any]], Any]:
    return lambda tensors, config: ({**tensors, name: torch.ones(16, dtype=torch.bfloat16)}, config)


def configured(**fields: Any) -> Callable[[Tensors, dict[str, Any]], Any]:
    return lambda tensors, config: (tensors, {**config, **fields})


def poisoned(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(tensor: torch.Tensor) -> torch.Tensor:
        spoiled = tensor.clone()
        spoiled[0, 0] = value
        return spoiled

    return apply


OVERLAPPING = ("", ".lora_B.weight")
"""Together the two tensors of a module that is called as one of them."""
DEFECTS: dict[str, tuple[Callable[[Tensors, dict[str, Any]], Any], str]] = {
    "backbone prefix": (renamed(lambda n: n.replace("model.model.", "model.", 1)), "no LoRA module for layers.0"),
    "multimodal prefix": (
        renamed(lambda n: n.replace("model.model.layers", "model.language_model.model.layers")),
        "no LoRA module for language_model",
    ),
    "compiled prefix": (renamed(lambda n: n.replace("model.model.", "model._orig_mod.model.", 1)), "_orig_mod"),
    "DDP prefix": (lambda t, c: ({f"module.{name}": v for name, v in t.items()}, c), "module.base_model"),
    "bare prefix": (lambda t, c: ({n.removeprefix("base_model.model."): v for n, v in t.items()}, c), "is not named"),
    "adapter name kept": (
        lambda t, c: ({n.replace(".weight", ".default.weight"): v for n, v in t.items()}, c),
        "is not named",
    ),
    "unknown module": (renamed(lambda n: n.replace("q_proj", "qq_proj")), "qq_proj"),
    "fused module": (
        renamed(lambda n: n.replace("layers.0.self_attn.q_proj", "layers.0.self_attn.qkv_proj")),
        "qkv_proj",
    ),
    "head": (renamed(lambda n: n.replace("model.layers.0.self_attn.q_proj", "lm_head")), "no LoRA module for lm_head"),
    "layer beyond the model": (renamed(lambda n: n.replace("layers.1.", "layers.7.")), "layers.7"),
    "layer missing": (without(Q0.format("A"), Q0.format("B")), "q_proj is named by the config but missing"),
    "only A": (without(Q0.format("B")), "q_proj has .lora_A.weight only"),
    "only B": (without(Q0.format("A")), "q_proj has .lora_B.weight only"),
    "config names too few": (configured(target_modules=["model.layers.0.self_attn.q_proj"]), "not named by the config"),
    "rank below the tensors'": (configured(r=8, lora_alpha=8), "rank 16 and B of rank 16; its config says 8"),
    "rank above the tensors'": (configured(r=32, lora_alpha=32), "its config says 32"),
    "wrong alpha": (configured(lora_alpha=32), "has alpha 32 at rank 16"),
    "alpha null": (configured(lora_alpha=None), "has alpha None"),
    "rsLoRA": (configured(use_rslora=True), "rsLoRA"),
    "DoRA": (configured(use_dora=True), "DoRA"),
    "bias": (configured(bias="all"), "bias"),
    "DoRA vectors": (extra("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"), "magnitude"),
    "names that overlap": (
        lambda t, c: (
            {f"base_model.model.lora_A.weight{rest}": t[Q0.format("A")].clone() for rest in OVERLAPPING},
            {**c, "target_modules": ["lora_A.weight"]},
        ),
        "cannot be served: 'base_model.model.lora_A.weight.lora_A.weight'",
    ),
    "norm": (extra("base_model.model.model.norm.weight"), "norm.weight"),
    "B with too few rows": (
        with_tensor(Q0.format("B"), lambda b: b[:32]),
        "lora_B of size 32 where the engine's layer has 64",
    ),
    "A of another width": (with_tensor(Q0.format("A"), lambda a: a[:, :32]), "lora_A of size 32"),
    "NaN": (with_tensor(Q0.format("B"), poisoned(float("nan"))), "q_proj.lora_B.weight holds non-finite"),
    "Inf": (with_tensor(Q0.format("A"), poisoned(float("inf"))), "q_proj.lora_A.weight holds non-finite"),
    "fp32": (
        lambda t, c: ({n: v.float() for n, v in t.items()}, c),
        "keeps adapters in bfloat16",
    ),
    "mixed dtypes": (with_tensor(Q0.format("A"), lambda a: a.float()), "mixes dtypes"),
    "empty file": (lambda t, c: (b"", c), "cannot be served"),
    "no tensors": (lambda t, c: ({}, c), "truncated or empty"),
    "truncated": (lambda t, c: (save(t)[:-100], c), "truncated"),
    "garbage": (lambda t, c: (b"\xff" * 4096, c), "cannot be served"),
    "bad json": (lambda t, c: (t, b"{"), "adapter_config.json is no JSON"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_cannot_be_served_faithfully_is_refused_by_name(
    llama_engine: VLLMEngine, good: tuple[Tensors, dict[str, Any]], shm_dir: Path, defect: str
) -> None:
    spoil, message = DEFECTS[defect]
    version = forge(shm_dir / "bad", *spoil(*good))
    registered = compat.lora_manager(llama_engine._llm).list_adapters().keys()
    before = llama_engine.generate([PROMPT], GREEDY, adapter=None)
    with pytest.raises(DeliveryError, match=message):
        llama_engine.load(version)
    assert compat.lora_manager(llama_engine._llm).list_adapters().keys() == registered
    with pytest.raises(UnknownVersion):
        llama_engine.generate([PROMPT], GREEDY, adapter=version)
    assert llama_engine.generate([PROMPT], GREEDY, adapter=None) == before


def test_rank_above_the_engines(llama_engine: VLLMEngine, llama_dir: Path, shm_dir: Path) -> None:
    files = ServingForm(tiny_lora(load_model(llama_dir), r=32), "default", torch.bfloat16).files()
    version = forge(shm_dir, b"".join(files[WEIGHTS_FILE]), files[CONFIG_FILE][0])
    with pytest.raises(DeliveryError, match="rank 32, the engine takes at most 16"):
        llama_engine.load(version)


def test_missing_directory_and_changed_bytes(
    llama_engine: VLLMEngine, good: tuple[Tensors, dict[str, Any]], shm_dir: Path
) -> None:
    version = forge(shm_dir, *good)
    with pytest.raises(DeliveryError, match="not the ones that were published"):
        llama_engine.load(replace(version, digest="0" * 32))
    shutil.rmtree(version.path)
    with pytest.raises(UnknownVersion, match=rf"is no longer in .*store.restore\({version.number}\) brings back"):
        llama_engine.load(version)


def test_other_bytes_under_a_loaded_path_are_refused(
    llama_engine: VLLMEngine, good: tuple[Tensors, dict[str, Any]], shm_dir: Path
) -> None:
    """vLLM would go on serving the old weights under the same id, and stale KV under the same name and path."""
    version = forge(shm_dir, *good)
    llama_engine.load(version)
    with pytest.raises(DeliveryError, match="a path must not change"):
        llama_engine.load(replace(version, digest="1" * 32))
    llama_engine.unload(version)


def slot_tensors(engine: VLLMEngine, version: AdapterVersion) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of each wrapped layer's first slice, in the slot that `version` holds."""
    slot = compat.slot_of(engine._llm, engine._find(version).request.lora_int_id)
    assert slot is not None
    layers = compat.wrapped_modules(engine._llm).items()
    return {name: (layer.lora_a_stacked[0][slot, 0], layer.lora_b_stacked[0][slot, 0]) for name, layer in layers}


def halve(engine: VLLMEngine, version: AdapterVersion, older: AdapterVersion) -> None:
    slot_tensors(engine, version)["model.layers.1.mlp.down_proj"][1].mul_(0.5)


def drop_layer(engine: VLLMEngine, version: AdapterVersion, older: AdapterVersion) -> None:
    slot_tensors(engine, version)["model.layers.1.mlp.down_proj"][1].zero_()


def half_write(engine: VLLMEngine, version: AdapterVersion, older: AdapterVersion) -> None:
    slot_tensors(engine, version)["model.layers.1.mlp.down_proj"][0][5:].zero_()


def stale(engine: VLLMEngine, version: AdapterVersion, older: AdapterVersion) -> None:
    new, old = slot_tensors(engine, version), slot_tensors(engine, older)
    for name in new:
        for kept, served in zip(new[name], old[name], strict=True):
            kept.copy_(served)


@pytest.mark.parametrize(
    ("tamper", "named"),
    [(halve, "layers.1.mlp.down_proj.lora_B"), (drop_layer, "layers.1.mlp.down_proj.lora_B"),
     (half_write, "layers.1.mlp.down_proj.lora_A"), (stale, "lora_B")],
    ids=["wrong scale", "missing layer", "half written", "one step stale"],
)  # fmt: skip
def test_slot_proof_catches(
    llama_engine: VLLMEngine, llama_dir: Path, shm_dir: Path, tamper: Callable[..., None], named: str
) -> None:
    """The stale adapter differs by one step of 1e-6: no log-prob could tell it from the fresh one."""
    model = tiny_lora(load_model(llama_dir), r=16)
    with AdapterStore(shm_dir / "store") as store:
        sync = NativeSync(model, llama_engine, store)
        older = sync.push(step=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(1e-4 * torch.sign(parameter))
        version = sync.push(step=1)
        llama_engine.load(version)
        tamper(llama_engine, version, older)
        with pytest.raises(DeliveryError, match=named):
            llama_engine.load(version)
        assert version not in llama_engine.loaded()
        assert older in llama_engine.loaded()


def test_untargeted_module_must_be_empty(llama_engine: VLLMEngine, llama_dir: Path, shm_dir: Path) -> None:
    with AdapterStore(shm_dir / "store") as store:
        version = NativeSync(tiny_lora(load_model(llama_dir), r=8, targets="attention"), llama_engine, store).push(0)
        slot_tensors(llama_engine, version)["model.layers.0.mlp.down_proj"][0][3, 3] = 1.0
        with pytest.raises(DeliveryError, match=r"down_proj\[0\] holds values"):
            llama_engine.load(version)


@pytest.mark.parametrize("loader", ["stock", "direct"])
def test_a_load_that_fails_half_way_leaves_nothing(
    loader: str, llama_engine: VLLMEngine, llama_dir: Path, shm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.32 registers an adapter and marks it active before its layers are set."""
    model = tiny_lora(load_model(llama_dir), r=16)
    with AdapterStore(shm_dir / "store") as store:
        sync = NativeSync(model, llama_engine, store)
        first = sync.push(step=0)
        answer = llama_engine.generate([PROMPT], GREEDY, adapter=first)
        refill_lora(model, seed=9)
        layer = compat.wrapped_modules(llama_engine._llm)["model.layers.1.self_attn.o_proj"]

        def explode(*args: Any) -> None:
            raise RuntimeError("out of slots")

        def write_half(view: SlotView, file: Any, tensors: list[torch.Tensor]) -> None:
            for served, published in zip(view.tensors[::2], tensors[::2], strict=True):
                served.copy_(published)
            explode()

        monkeypatch.setattr(llama_engine._residents, "_loader", loader)
        monkeypatch.setattr(type(layer), "set_lora", explode)
        monkeypatch.setattr(SlotView, "write", write_half)
        with pytest.raises(EngineError, match="could not load v2: RuntimeError: out of slots"):
            sync.push(step=1)
        monkeypatch.undo()
        assert store.head == first
        assert llama_engine.generate([PROMPT], GREEDY, adapter=first) == answer
        third = sync.push(step=2)
        assert (third.number, third.parent) == (3, first.number)
        assert llama_engine.generate([PROMPT], GREEDY, adapter=third)[0].completions[0].version == 3


def test_probe_catches_a_sampler_on_the_base(llama_engine: VLLMEngine, llama_dir: Path, shm_dir: Path) -> None:
    class Cut(VLLMEngine):
        def __init__(self) -> None:
            self.__dict__ = llama_engine.__dict__

        def logprobs(self, sequences: Any, *, adapter: Any) -> Any:
            return super().logprobs(sequences, adapter=None)

    with AdapterStore(shm_dir / "store") as store, pytest.raises(DeliveryError, match="does not apply the adapter"):
        NativeSync(tiny_lora(load_model(llama_dir)), Cut(), store)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_probe_catches_a_wrong_scale(
    llama_engine: VLLMEngine, llama_dir: Path, shm_dir: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """A scale that is wrong where the file is made passes the slot proof: the bytes arrive as they were written."""
    model = tiny_lora(load_model(llama_dir), r=8)
    fill = ServingForm._fill

    def misscaled(self: ServingForm) -> bool:
        finite = fill(self)
        for view in self.held[1::2]:
            view.mul_(factor)
        return finite

    monkeypatch.setattr(ServingForm, "_fill", misscaled)
    with AdapterStore(shm_dir / "store") as store, pytest.raises(DeliveryError, match="does not apply the adapter"):
        NativeSync(model, llama_engine, store)


@pytest.mark.parametrize(("growth", "most"), [(1.0, 0.14), (3.0, 0.2)])
def test_a_base_with_much_noise_widens_the_probes_limit_by_a_share_of_the_signal_at_most(
    growth: float, most: float
) -> None:
    witness = Witness(base=[[-3.0]], loud=[[-2.0]], signal=1.0, most_noise=0.2, growth=growth)
    assert witness.most_error(0.02) == pytest.approx(most)
    assert probe_error([[-2.0 + most - 0.01]], witness, 0.02) == pytest.approx(most - 0.01)
    with pytest.raises(DeliveryError, match=rf"differ by .* \(at most {most}; base noise 0.02\)"):
        probe_error([[-2.0 + most + 0.01]], witness, 0.02)


def test_probe_leaves_no_trace(llama_engine: VLLMEngine, llama_dir: Path, shm_dir: Path) -> None:
    model = tiny_lora(load_model(llama_dir), r=8)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    loaded = llama_engine.loaded()
    with AdapterStore(shm_dir / "store") as store:
        report = NativeSync(model, llama_engine, store).probe
        assert [path.name for path in shm_dir.iterdir()] == ["store"]
        assert list((store.root / "staging").iterdir()) == []
    assert report is not None
    assert report.least_signal == max(1e-3, 20 * report.noise) <= report.signal
    assert report.error < report.most_error <= 0.2 * report.signal
    assert 0.1 * report.signal + 2 * report.noise <= report.most_error or report.most_error == 0.2 * report.signal
    assert llama_engine.loaded() == loaded
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_probe_cut_short_is_swept_by_the_next_start(
    llama_engine: VLLMEngine, llama_dir: Path, shm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Path] = []

    def load(version: AdapterVersion, **_: object) -> None:
        served.append(version.path)
        shutil.copytree(version.path.parents[1], shm_dir / "killed")
        raise EngineError("no memory")

    monkeypatch.setattr(llama_engine, "load", load)
    with AdapterStore(shm_dir / "store") as store, pytest.raises(EngineError, match="no memory"):
        NativeSync(tiny_lora(load_model(llama_dir)), llama_engine, store)
    # What a kill in that moment leaves.
    shutil.copytree(shm_dir / "killed", served[0].parents[1])
    with AdapterStore(shm_dir / "store") as store:
        assert [Path(name).name for name in store.recovered.swept] == [served[0].parents[1].name]
    assert not served[0].exists()


def test_a_probe_that_does_not_fit_says_so_before_it_is_written(
    llama_engine: VLLMEngine, llama_dir: Path, shm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000, total=20_000))
    with AdapterStore(shm_dir / "store") as store:
        with pytest.raises(NoRoom, match=r"the probe of the engine needs 0\.\d\d MiB .*/staging has room .*--shm-size"):
            NativeSync(tiny_lora(load_model(llama_dir), r=8), llama_engine, store)
        monkeypatch.undo()
        write = disk.write_file

        def full(path: Path, *arguments: Any, **options: Any) -> None:
            if "lora-grpo-probe-" in str(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            write(path, *arguments, **options)

        monkeypatch.setattr(disk, "write_file", full)
        with pytest.raises(NoRoom, match=r"writing the probe failed: No space left.*--shm-size"):
            NativeSync(tiny_lora(load_model(llama_dir), r=8), llama_engine, store)
        assert list((store.root / "staging").iterdir()) == []


def test_a_trainer_in_another_half_precision_hears_of_its_dtype(
    llama_engine: VLLMEngine, llama_dir: Path, shm_dir: Path
) -> None:
    model = tiny_lora(load_model(llama_dir).half())
    with AdapterStore(shm_dir / "store") as store, pytest.raises(UnsupportedAdapter, match=r"float16.*bfloat16"):
        NativeSync(model, llama_engine, store)


def overflowing(model: Any) -> None:
    model.get_input_embeddings().weight.data[:] = float("inf")


def replaced(model: Any) -> None:
    """The output no longer depends on what the adapted layers compute."""
    model.lm_head.weight.data.zero_()


def quieter(model: Any) -> None:
    """No adapter moves the log-probs much."""
    model.lm_head.weight.data *= 0.02


@pytest.mark.parametrize(
    ("spoil", "longest", "off", "error", "says"),
    [
        (lambda model: None, 20, 0.0, ConfigError, "max_model_len=20 .*probe.*24 tokens.*max_model_len=25"),
        (overflowing, 128, 0.0, UnsupportedAdapter, "base, without any adapter, gives log-probs that are not finite"),
        (replaced, 128, 0.0, DeliveryError, "large random adapter moves .* by 0 nats .*forward does not compute"),
        (quieter, 128, 0.15, UnsupportedAdapter, "^the bases of engine and trainer differ by 0.15 nats"),
    ],
)
def test_a_probe_that_cannot_be_says_why(
    spoil: Callable[[Any], None],
    longest: int,
    off: float,
    error: type[Exception],
    says: str,
    llama_dir: Path,
    shm_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the engine is asked for anything but the base: it answers as the trainer does, `off` by so many nats."""
    monkeypatch.setattr(probe, "ROUNDINGS", 1e9)
    model = tiny_lora(load_model(llama_dir))
    spoil(model.get_base_model())

    class Answering(FakeEngine):
        max_model_len = longest

        def describe_base(self) -> BaseDescription:
            return BaseDescription("bfloat16", {}, 260)

        def logprobs(self, sequences: Any, *, adapter: Any) -> Any:
            assert adapter is None
            with model.disable_adapter():
                return [[value - off for value in row] for row in teacher_logprobs(model, sequences)]

    with pytest.raises(error, match=says):
        run_probe(ServingForm(model, "default", torch.bfloat16), Answering(lambda *_: ""), shm_dir)


def scaled_attention(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.05


def hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda _, __, output: output * 1.02)


def autocast(model: Any) -> None:
    """Weights in float32, and products that are not."""
    forward = model.forward

    def cast(*arguments: Any, **named: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*arguments, **named)

    model.forward = cast


def hotter(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda _, __, output: output * 1.04)


class Arrived(Exception):
    """The base was taken for the engine's."""


@pytest.mark.parametrize(
    ("change", "served_in", "ends"),
    [
        (scaled_attention, "float32", UnsupportedAdapter),
        (hooked, "float32", UnsupportedAdapter),
        (hotter, "bfloat16", UnsupportedAdapter),
        (lambda model: None, "float32", Arrived),
        (lambda model: model.to(torch.bfloat16), "bfloat16", Arrived),
        (lambda model: model.to(torch.bfloat16), "float32", Arrived),
        (autocast, "float32", Arrived),
    ],
    ids=["attention", "hook", "temperature", "float32", "bfloat16", "bfloat16 here", "autocast"],
)
def test_a_trainer_that_computes_otherwise_is_refused_and_one_that_rounds_is_not(
    change: Callable[[Any], object], served_in: str, ends: type[Exception], llama_dir: Path, shm_dir: Path
) -> None:
    """No weight differs. The engine answers as the model does in float32."""
    model = tiny_lora(load_model(llama_dir).float())
    sequences = probe.probe_sequences(BaseDescription("float32", {}, 260))
    with model.disable_adapter():
        right = teacher_logprobs(model, sequences)
    change(model.get_base_model())

    class Answering(FakeEngine):
        def describe_base(self) -> BaseDescription:
            return BaseDescription(served_in, {}, 260)

        def logprobs(self, sequences: Any, *, adapter: Any) -> Any:
            if adapter is not None:
                raise Arrived
            return right

    with pytest.raises(ends, match="rounding explains" if ends is UnsupportedAdapter else None):
        run_probe(ServingForm(model, "default", torch.bfloat16), Answering(lambda *_: ""), shm_dir)


def test_another_base_is_refused(llama_dir: Path, llama_engine: VLLMEngine, shm_dir: Path, tmp_path: Path) -> None:
    same_shape = tiny_lora(load_model(tiny_model("llama", tmp_path / "other", seed=1)))
    with AdapterStore(shm_dir / "store") as store, pytest.raises(UnsupportedAdapter, match="embed_tokens"):
        NativeSync(same_shape, llama_engine, store)
    wider = tiny_lora(load_model(tiny_model("llama", tmp_path / "wider", hidden=128)))
    with AdapterStore(shm_dir / "store2") as store, pytest.raises(UnsupportedAdapter, match="hidden_size=64"):
        NativeSync(wider, llama_engine, store)
    shutil.copytree(llama_dir, tmp_path / "steadier")
    settings = tmp_path / "steadier" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "rms_norm_eps": 0.25}))
    steadier = tiny_lora(load_model(tmp_path / "steadier"))
    with AdapterStore(shm_dir / "store3") as store, pytest.raises(UnsupportedAdapter, match=r"trainer's 0\.25: load"):
        NativeSync(steadier, llama_engine, store)


def test_engine_that_wraps_fewer_layers(llama_dir: Path, shm_dir: Path) -> None:
    """vLLM loads an adapter for layers outside lora_target_modules and applies nothing there (vLLM #55193)."""
    engine = VLLMEngine(llama_dir, max_lora_rank=8, max_loras=1, target_modules=["q_proj", "v_proj"], **ENGINE_ARGS)
    try:
        with (
            AdapterStore(shm_dir / "store") as store,
            pytest.raises(DeliveryError, match=r"no LoRA module for model\.layers"),
        ):
            NativeSync(tiny_lora(load_model(llama_dir), r=8), engine, store)
        with AdapterStore(shm_dir / "narrow") as store:
            model = tiny_lora(load_model(llama_dir), r=4, targets=["q_proj", "v_proj"], scale=0.5)
            version = NativeSync(model, engine, store).push(step=0)
            moved = engine.logprobs([PROMPT], adapter=version)
            assert mean_abs_difference(moved, engine.logprobs([PROMPT], adapter=None)) > 0.05
    finally:
        engine.close()


def test_digests_agree(good: tuple[Tensors, dict[str, Any]], tmp_path: Path) -> None:
    version = forge(tmp_path, *good)
    files = {name: [(version.path / name).read_bytes()] for name in (WEIGHTS_FILE, CONFIG_FILE)}
    assert digest_buffers(files) == version.digest
