"""Versions outside of their run: back in a plain PEFT folder, with their own scaling; and how far two are apart."""

import copy
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import save

from lora_grpo.adapters.asking.view import StoreView
from lora_grpo.adapters.files import disk
from lora_grpo.adapters.peft_form.files import PREFIX
from lora_grpo.adapters.peft_form.modules import LoraModule, is_multimodal
from lora_grpo.adapters.peft_form.serving import load_tensors
from lora_grpo.adapters.version import CONFIG_FILE, STATE_TENSORS_FILE, WEIGHTS_FILE, AdapterVersion, Target
from lora_grpo.errors import ConfigError, StoreCorrupt, StoreError

RECIPE_FILE = "adapter.json"
TOKENIZER = "tokenizer"
_A, _B = ".lora_A.weight", ".lora_B.weight"

Weights: TypeAlias = Literal["exact", "rounded"]
Tensors: TypeAlias = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """What the serving form leaves out: the adapter's own PEFT config, and each module's scaling by path."""

    config: Mapping[str, Any]
    scalings: Mapping[str, float]

    @classmethod
    def of(cls, model: Any, adapter: str, modules: list[LoraModule]) -> "Recipe":
        """What `PeftModel.save_pretrained` would write, and the revision of the base where it is known."""
        config, base = model.peft_config[adapter], model.get_base_model()
        fields = {name: sorted(value) if isinstance(value, Set) else value for name, value in config.to_dict().items()}
        if config.task_type is None:
            kind = _importable(type(base))
            fields["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        if is_multimodal(base):
            # By last name, PEFT would adapt the towers of the full model as well.
            fields["target_modules"] = sorted(module.path for module in modules)
        name = config.base_model_name_or_path or getattr(base, "name_or_path", None)
        # A folder is found from wherever the adapter is loaded.
        fields["base_model_name_or_path"] = os.path.abspath(name) if name and os.path.isdir(name) else name
        fields["revision"] = config.revision or getattr(base.config, "_commit_hash", None)
        return cls({**fields, "inference_mode": True}, {module.path: module.scaling for module in modules})

    def check(self, store: StoreView) -> None:
        """Raises `ConfigError` where a run has versions that scale otherwise: they are exported with one recipe."""
        run = store.archive
        if run is None or not store.numbers or not (run / RECIPE_FILE).exists():
            return
        before = Recipe.read(run).scalings
        if before != self.scalings:
            odd = min(path for path in {*before, *self.scalings} if before.get(path) != self.scalings.get(path))
            now = f"{odd} is scaled by {self.scalings.get(odd)}, in the versions of {run} by {before.get(odd)}"
            fix = "use the rank, alpha and target modules of before, or begin another run"
            raise ConfigError(f"{now} (None: not adapted); {fix}")

    def write(self, path: Path) -> None:
        content = json.dumps(asdict(self), indent=1).encode()
        if disk.read_small(path) != content:
            with disk.reported(f"writing {path}"):
                disk.replace_file(path, content, sync=True)

    @classmethod
    def read(cls, run: Path) -> "Recipe":
        path = run / RECIPE_FILE
        if (recipe := disk.read_record(path, lambda values: cls(**values)._checked())) is None:
            raise StoreError(f"{run} has no {RECIPE_FILE}: only runs of NativeSync or GRPOTrainer can be exported")
        return recipe

    def _checked(self) -> "Recipe":
        if not isinstance(self.config, dict) or not all(scale + 0.0 for scale in self.scalings.values()):
            raise ValueError("it has no config with scalings")
        return self


def export_adapter(store: StoreView, version: Target, recipe: Recipe, folder: Path, tokenizer: Any = None) -> Weights:
    """Write `version` as PEFT would save it, in fp32 with its own alpha, and the `tokenizer`, or else the run's."""
    version = store.get(version)
    if (folder / WEIGHTS_FILE).exists() or (folder / CONFIG_FILE).exists():
        raise StoreError(f"{folder} already holds an adapter; name an empty or new directory")
    tensors, weights = adapter_tensors(store, version, recipe)
    with disk.reported(f"exporting {version} to {folder}"), _staged(folder) as staged:
        kept = None if store.archive is None else store.archive / TOKENIZER
        if not _save_tokenizer(tokenizer, staged) and kept is not None and kept.is_dir():
            shutil.copytree(kept, staged, copy_function=shutil.copyfile, dirs_exist_ok=True)
        (staged / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        (staged / CONFIG_FILE).write_text(json.dumps(dict(recipe.config), indent=1))
    return weights


def adapter_tensors(store: StoreView, version: AdapterVersion, recipe: Recipe) -> tuple[Tensors, Weights]:
    """A version's A and B by PEFT's names, in fp32, without the scaling: the trainer's own where its state is kept."""
    files = store.load_state(version.number) or {}
    if STATE_TENSORS_FILE in files:
        kept = load_tensors(files[STATE_TENSORS_FILE])
        exact = {name.removeprefix("weights/"): kept[name].float() for name in kept if name.startswith("weights/")}
        return {f"{PREFIX}{name[:-2]}.lora_{name[-1]}.weight": tensor for name, tensor in exact.items()}, "exact"
    rounded = load_tensors(store.readable(version) / WEIGHTS_FILE)
    return {name: _unscaled(name, tensor.float(), recipe) for name, tensor in rounded.items()}, "rounded"


@contextmanager
def _staged(directory: Path) -> Iterator[Path]:
    """A folder to fill, whose files are then in `directory`: all at once where that is new, else the config last."""
    directory = directory.resolve()
    new = not directory.is_dir()
    staged = (directory.parent if new else directory) / f".{directory.name}.new"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        if new:
            os.rename(staged, directory)
        else:
            for path in sorted(staged.iterdir(), key=lambda path: path.name == CONFIG_FILE):
                os.replace(path, directory / path.name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def keep_tokenizer(tokenizer: Any, run: Path) -> None:
    staged = run / f".{TOKENIZER}.new"
    with disk.reported(f"writing {run / TOKENIZER}"):
        shutil.rmtree(staged, ignore_errors=True)
        if _save_tokenizer(tokenizer, staged):
            shutil.rmtree(run / TOKENIZER, ignore_errors=True)
            os.rename(staged, run / TOKENIZER)


def _save_tokenizer(tokenizer: Any, directory: Path) -> bool:
    if not hasattr(tokenizer, "save_pretrained"):
        return False
    plain = copy.copy(tokenizer)
    # An engine's may be of a class made at run time, by whose name nothing would find it again.
    plain.__class__ = _importable(type(tokenizer))
    plain.save_pretrained(directory)
    return True


def _importable(kind: type) -> type:
    """The class of transformers that `kind` is or was derived from at run time (by FSDP, for a cache)."""
    for one in kind.__mro__:
        if hasattr(one, "from_pretrained") and getattr(sys.modules.get(one.__module__), one.__name__, None) is one:
            return one
    return kind


def _unscaled(name: str, tensor: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    path, _, kind = name.removeprefix(PREFIX).rpartition(".lora_")
    if kind != "B.weight":
        return tensor
    if path not in recipe.scalings:
        raise StoreCorrupt(f"{RECIPE_FILE} has no scaling for {path}, which the version adapts: it is another run's")
    return tensor / recipe.scalings[path]


@dataclass(frozen=True, slots=True)
class Difference:
    """`first` and `second` are |W1| and |W2|; `change` is |W2 - W1| / |W1| (None from zero), `cosine` of the two."""

    module: str
    first: float
    second: float
    change: float | None
    cosine: float | None


def difference(first: Path, second: Path) -> tuple[Difference, list[Difference]]:
    """How far apart two folders in serving form are, over all modules ("all") and of each, in what they do to the base:
    W = B A. For W1 = B1 A1 and W2 = B2 A2 of ranks r1 and r2, the Frobenius inner product needs no out x in matrix:

        <W1, W2> = tr(A1' B1' B2 A2) = sum over (r1, r2) of (B1' B2) * (A1 A2')

    from which |W2 - W1|^2 = |W1|^2 + |W2|^2 - 2 <W1, W2>, and the cosine is <W1, W2> / (|W1| |W2|). Over all modules,
    inner products add up. Sums are in fp64, so that changes down to about 1e-7 of the update are told from none."""
    inner = dict(_inner_products(load_tensors(first / WEIGHTS_FILE), load_tensors(second / WEIGHTS_FILE)))
    total = [math.fsum(one[index] for one in inner.values()) for index in range(3)]
    return _difference("all", *total), [_difference(module, *one) for module, one in inner.items()]


def _inner_products(first: Tensors, second: Tensors) -> Iterator[tuple[str, list[float]]]:
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
            yield name.removeprefix(PREFIX).removesuffix(_A), [_dot(one, one), _dot(two, two), _dot(one, two)]


def _is_pair(b_OR: torch.Tensor | None, a_RI: torch.Tensor) -> bool:
    return b_OR is not None and b_OR.dim() == a_RI.dim() == 2 and b_OR.shape[1] == a_RI.shape[0]


def _dot(one: tuple[torch.Tensor, torch.Tensor], two: tuple[torch.Tensor, torch.Tensor]) -> float:
    (b1_OR, a1_RI), (b2_OR, a2_RI) = one, two
    return float(((b1_OR.T @ b2_OR) * (a1_RI @ a2_RI.T)).sum())


def _difference(module: str, inner_1: float, inner_2: float, both: float) -> Difference:
    first, second = math.sqrt(max(0.0, inner_1)), math.sqrt(max(0.0, inner_2))
    apart = math.sqrt(max(0.0, inner_1 + inner_2 - 2 * both))
    product = first * second
    cosine = max(-1.0, min(1.0, both / product)) if product else None
    return Difference(module, first, second, apart / first if first else None, cosine)
