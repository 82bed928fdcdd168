"""The serving form: a PEFT adapter as two files of bytes, scaling folded into B; and adapter weights back from it.

vLLM multiplies B by alpha/r in its own dtype when it loads an adapter. Folding the scaling in fp32 before the cast
and writing alpha = r for every module leaves vLLM nothing to multiply: one rounding fewer, rsLoRA and per-module
ranks and alphas included, on every vLLM release whatever it makes of those fields."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lora_grpo.adapters.peft_form.files import PREFIX
from lora_grpo.adapters.peft_form.modules import LoraModule, assign, lora_modules, peft_model_of, whole
from lora_grpo.adapters.version import CONFIG_FILE, WEIGHTS_FILE, AdapterVersion
from lora_grpo.errors import ConfigError, StoreCorrupt, TrainingError, UnsupportedAdapter
from lora_grpo.kernels import Cast

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Held: TypeAlias = list[torch.Tensor]
"""An adapter's tensors, finite, in the file's order, in the trainer's memory until the next `ServingForm.files()`."""


class ServingForm:
    """Turns one adapter's live parameters into the bytes of its PEFT directory. Names, shapes and header are fixed when
    it is built. The tensors share one buffer that every `files()` fills anew: write what it returned before then."""

    def __init__(self, model: nn.Module, adapter: str, dtype: torch.dtype) -> None:
        """`dtype` is the engine's LoRA dtype."""
        if dtype not in _DTYPE_NAMES:
            raise UnsupportedAdapter(f"dtype {dtype} has no serving form; use one of {sorted(map(str, _DTYPE_NAMES))}")
        self.model, self.dtype = model, dtype
        # Looked up once: walking a 0.5B model's modules takes longer than proving its slots.
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.modules = lora_modules(model, adapter)
        if not self.modules:
            raise UnsupportedAdapter(f"adapter {adapter!r} adapts no linear layer; check LoraConfig.target_modules")
        self._adapter = adapter
        self._homes = [getattr(module.layer, f"lora_{kind}")._modules for kind in "AB" for module in self.modules]
        self._linears = [home[adapter] for home in self._homes]
        self._bases: list[Any] = [module.layer.get_base_layer() for module in self.modules]
        self._reshard()
        # Past nn.Module's own look-up, as in `_fill`; of a weight in fewer bits it is that of its packed form.
        self._base_dtypes = [base._parameters["weight"].dtype for base in self._bases]
        own = {id(linear.weight) for linear in self._linears}
        # Weights that the model lets go of, for another device or for shards, go.
        self._others = WeakValueDictionary({name: one for name, one in model.named_parameters() if id(one) not in own})
        self.config_bytes = _config_bytes(peft_model_of(model), adapter, self.modules)
        self.names = [f"{PREFIX}{module.path}.lora_{kind}.weight" for kind in "AB" for module in self.modules]
        self.shapes = [tuple(linear.weight.shape) for linear in self._linears]
        self._header = _safetensors_header(self.names, self.shapes, dtype)
        elements, device = [math.prod(shape) for shape in self.shapes], self.modules[0].a_RI.device
        self._flat = torch.empty(sum(elements), dtype=dtype, device=device)
        self.nbytes = self._flat.nbytes
        self._host = self._flat if device.type == "cpu" else torch.empty(sum(elements), dtype=dtype, pin_memory=True)
        pieces = zip(self._flat.split(elements), self.shapes, strict=True)
        self.held: Held = [piece.view(shape) for piece, shape in pieces]
        # Every A comes before the first B, so that one call can scale them all.
        self._flat_b = self._flat[sum(elements[: len(self.modules)]) :]
        self._cast = Cast(self._flat, elements)
        self._closed = False

    def close(self) -> None:
        self._closed = True

    def require_open(self) -> None:
        if self._closed:
            raise ConfigError("this NativeSync is closed; build a new one on the model, the engine and the store")

    def files(self) -> Mapping[str, tuple[bytes | memoryview, ...]]:
        """The two PEFT files of the adapter as it is now, by name, as buffers. Gathers what FSDP2 sharded of it (a
        collective: call it in every process). Raises `TrainingError` for a tensor that is not finite in the serving
        dtype, and for an adapter that the model does not compute with any more."""
        self.require_open()
        self._reshard()
        self._check_as_built()
        if not self._fill():
            name = next(name for name, view in zip(self.names, self.held, strict=True) if not view.isfinite().all())
            what = f"{name} holds non-finite values in {self.dtype}; it was not published"
            raise TrainingError(f"{what}. Lower the learning rate, or roll back to an earlier version")
        if self._host is not self._flat:
            self._host.copy_(self._flat)
        payload = self._host.view(torch.uint8).numpy().data
        return {WEIGHTS_FILE: (self._header, payload), CONFIG_FILE: (self.config_bytes,)}

    def _reshard(self) -> None:
        for module in self._sharded:
            module.reshard()

    def _check_as_built(self) -> None:
        """What `check_servable` found when this was built can be undone since; it is looked at where it shows."""
        for home, linear in zip(self._homes, self._linears, strict=True):
            if home.get(self._adapter) is not linear:
                fix = "build a new NativeSync (or trainer) on the model as it is now"
                raise TrainingError(f"adapter {self._adapter!r} was deleted or made anew since this was built; {fix}")
        for module, base, dtype in zip(self.modules, self._bases, self._base_dtypes, strict=True):
            active, now, what = module.layer.active_adapters, base._parameters["weight"].dtype, module.idle
            if active != [self._adapter]:
                fix = f"call model.set_adapter({self._adapter!r}), or build a new NativeSync for another adapter"
                what = f"computes with {active}, and {self._adapter!r} would be published: {fix}"
            elif now != dtype:
                what = f"is in {now} and was in {dtype} when this was built: load the model again in {dtype}"
            if what is not None:
                raise TrainingError(f"{module.path} {what}; nothing was published")
        if trained := [name for name, parameter in self._others.items() if parameter.requires_grad]:
            what = f"{trained[0]} (and {len(trained) - 1} more) would be trained but never published: freeze it with"
            fix = "requires_grad_(False), and load the base again if a step has changed it"
            raise TrainingError(f"{what} {fix}; nothing was published")

    @torch.no_grad()
    def _fill(self) -> bool:
        """Whether everything is finite."""
        # Past nn.Module's own look-up, which for hundreds of linears takes as long as casting them.
        parameters = [linear._parameters.get("weight") for linear in self._linears]
        scalings = [module.scaling for module in self.modules]
        if self._cast.takes(parameters):
            return self._cast.run(parameters, [*[1.0] * len(scalings), *scalings])
        tensors = [whole(linear.weight) for linear in self._linears]
        if len(set(scalings)) == 1 and _scales_after_rounding(scalings[0], self.dtype):
            torch._foreach_copy_(self.held, tensors)
            if scalings[0] != 1.0:
                self._flat_b.mul_(scalings[0])
            return all_finite(self._flat)
        count = len(self.modules)
        torch._foreach_copy_(self.held[:count], tensors[:count])
        torch._foreach_copy_(self.held[count:], torch._foreach_mul([b.float() for b in tensors[count:]], scalings))
        return all_finite(self._flat)


def all_finite(flat: torch.Tensor) -> bool:
    """From the two extremes, of which NaN is always one: a quarter of `isfinite`'s time, and nothing allocated."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(flat))).all())


def _scales_after_rounding(scaling: float, dtype: torch.dtype) -> bool:
    """A power of two moves the exponent alone, as large in bfloat16 as in fp32; in float16, small values lose bits."""
    return scaling == 1.0 or dtype == torch.float32 or (dtype == torch.bfloat16 and abs(math.frexp(scaling)[0]) == 0.5)


def _config_bytes(peft_model: Any, adapter: str, modules: list[LoraModule]) -> bytes:
    """adapter_config.json with alpha = rank everywhere and every module named in full; the rest is PEFT's default."""
    config = peft_model.peft_config[adapter]
    ranks = {module.path: module.a_RI.shape[0] for module in modules}
    rank = max(ranks.values())
    pattern = {re.escape(path): value for path, value in ranks.items() if value != rank}
    fields = {
        "peft_type": "LORA",
        "task_type": config.task_type if isinstance(config.task_type, str) else None,
        "base_model_name_or_path": config.base_model_name_or_path,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
    }
    return json.dumps(fields, indent=1).encode()


def _safetensors_header(names: list[str], shapes: list[tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """The header of a safetensors file: a little-endian length, then JSON padded to 8 bytes with spaces."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in zip(names, shapes, strict=True):
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name. Raises `StoreCorrupt` for a file that is none."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise StoreCorrupt(f"{path} cannot be read: {error}") from error


def assign_rounded(tensors: Mapping[str, torch.Tensor], modules: list[LoraModule]) -> None:
    """Set A and B from a serving form's tensors, scaling taken out of B; all of them, or none for `StoreCorrupt`."""
    for module in modules:
        for kind, parameter in (("A", module.a_RI), ("B", module.b_OR)):
            name = f"{PREFIX}{module.path}.lora_{kind}.weight"
            found = tuple(tensors[name].shape) if name in tensors else None
            if found != tuple(parameter.shape):
                raise StoreCorrupt(f"{name} is {found} in the version but {tuple(parameter.shape)} in the model")
    for module in modules:
        assign(module.a_RI, tensors[f"{PREFIX}{module.path}.lora_A.weight"])
        assign(module.b_OR, tensors[f"{PREFIX}{module.path}.lora_B.weight"].float() / module.scaling)


@contextmanager
def restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Whatever they are made inside, afterwards they are their own again, to the bit."""
    own = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, own, strict=True):
                parameter.copy_(values)


@contextmanager
def weights_of(version: AdapterVersion, modules: list[LoraModule]) -> Iterator[None]:
    with restored([parameter for module in modules for parameter in (module.a_RI, module.b_OR)]):
        assign_rounded(load_tensors(version.path / WEIGHTS_FILE), modules)
        yield
