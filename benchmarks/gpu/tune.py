"""Launch settings for vLLM's LoRA kernels on this GPU, found by timing them in CUDA graphs, as decoding replays them.

    python benchmarks/gpu/tune.py --shape qwen2.5-7b --out DIR

For each layer and number of rows one setting after the other is varied, from vLLM's own choice on. A setting that does
not compile or gives other numbers is passed over. DIR gets the files that VLLM_TUNED_CONFIG_FOLDER=DIR has vLLM read;
what another shape left there stays.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lora_grpo.bench.shapes import shape_config
from lora_grpo.engines import compat

GRID: dict[str, dict[str, tuple[int, ...]]] = {
    "shrink": {
        "split_k": (8, 16, 32, 64),
        "block_k": (64, 128, 256, 512),
        "block_m": (16, 32, 64),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3),
    },
    "expand": {
        "block_n": (32, 64, 128, 256),
        "block_m": (16, 32, 64),
        "block_k": (16, 32),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3),
    },
}
MARGIN = 0.98
"""Of the best time so far: less of a gain than that is noise."""
PREFILL_ROWS = (1024, 8192)
"""vLLM takes the settings of the nearest number of rows: its own choice stands where rows are many."""
BENCH_MS = 10


@dataclass(frozen=True)
class Layer:
    """A wrapped layer: its input width, and the output width of each member that vLLM fused."""

    name: str
    inputs: int
    outputs: tuple[int, ...]


def layers_of(shape: str) -> list[Layer]:
    """The linear layers of one decoder layer of a shape."""
    config = shape_config(shape)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    return [
        Layer("qkv_proj", hidden, (hidden, kv, kv)),
        Layer("o_proj", hidden, (hidden,)),
        Layer("gate_up_proj", hidden, (inner, inner)),
        Layer("down_proj", inner, (hidden,)),
    ]


class Chosen:
    """Stands in for what an operation's module asks for its launch settings: vLLM's choice, with changes."""

    def __init__(self, module: Any) -> None:
        self.stock = module.get_lora_op_configs
        self.changes: Mapping[str, int] = {}
        self.asked: dict[str, Any] = {}
        module.get_lora_op_configs = self

    def __call__(self, op_type: str, **asked: Any) -> dict[str, Any]:
        self.asked = {"op_type": op_type, **asked}
        return {**self.stock(op_type, **asked), **self.changes}

    def own(self, **changed: Any) -> dict[str, Any]:
        """vLLM's choice for what was asked last, or for a question that differs from it."""
        return dict(self.stock(**{**self.asked, **changed}))

    def grid(self, operation: str) -> dict[str, tuple[int, ...]]:
        """What may be varied: not the stages of the kernel that is kept from having several."""
        fixed = {"num_stages"} if getattr(self.stock, "one_stage", False) else set()
        return {name: values for name, values in GRID[operation].items() if name not in fixed}


class Batch:
    """One layer's LoRA for rows of one adapter, through the wrapper that vLLM's layers call."""

    def __init__(self, layer: Layer, rows: int, rank: int, slots: int, device: str) -> None:
        """Everything random but the outputs; `slots` adapters have room, the first one is used."""
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            return values / shape[-1] ** 0.5

        self.layer = layer
        self.a = tuple(random(slots, 1, rank, layer.inputs) for _ in layer.outputs)
        self.b = tuple(random(slots, 1, width, rank) for width in layer.outputs)
        self.x = random(rows, layer.inputs) * layer.inputs**0.5
        self.y = torch.zeros(rows, sum(layer.outputs), device=device, dtype=torch.bfloat16)
        self.wrapper = wrapper_for(rows, rank, slots, device)
        pairs = zip(self.a, self.b, strict=True)
        self.expected = torch.cat([self.x.float() @ a[0, 0].float().t() @ b[0, 0].float().t() for a, b in pairs], 1)

    def __call__(self) -> None:
        self.wrapper.add_lora_linear(self.y, self.x, self.a, self.b, 1.0, self.layer.outputs)

    def is_right(self) -> bool:
        """Whether one call gives what plain products give."""
        self.y.zero_()
        self()
        off = (self.y.float() - self.expected).abs().max()
        return bool(off < 0.05 * self.expected.abs().max())


def wrapper_for(rows: int, rank: int, slots: int, device: str) -> Any:
    """vLLM's wrapper of its kernels, told that every row is of the adapter in the first slot."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper import get_punica_wrapper

    config = LoRAConfig(max_lora_rank=compat.allowed_rank(rank), max_loras=slots)
    wrapper = get_punica_wrapper(
        max(rows, slots), max_batches=rows, device=torch.device(device), max_loras=slots, lora_config=config
    )
    mapping = LoRAMapping(index_mapping=(1,) * rows, prompt_mapping=(1,) * rows, is_prefill=False)
    wrapper.update_metadata(mapping, [1, *([None] * (slots - 1))], slots, 32000)
    return wrapper


def graph_seconds(batch: Batch) -> float:
    """Of one call, replayed from a CUDA graph; infinite where it does not compile or gives other numbers."""
    from triton.errors import TritonError
    from triton.testing import do_bench_cudagraph

    try:
        if not batch.is_right():
            return float("inf")
        return float(do_bench_cudagraph(batch, rep=BENCH_MS)) / 1e3
    except TritonError:
        return float("inf")


def descend(
    start: Mapping[str, Any], grid: Mapping[str, Sequence[int]], seconds_of: Callable[[dict[str, Any]], float]
) -> tuple[dict[str, Any], float, float]:
    """The best settings found by varying one after the other, the seconds of the first ones, and of the best."""
    best = dict(start)
    first_s = best_s = seconds_of(best)
    for name, values in grid.items():
        for value in values:
            candidate = {**best, name: value}
            if candidate != best and (taken_s := seconds_of(candidate)) < MARGIN * best_s:
                best, best_s = candidate, taken_s
    return best, first_s, best_s


def tune(
    batches: Sequence[Batch], chosen: Mapping[str, Chosen], seconds: Callable[[Batch], float], keep: Callable[..., None]
) -> Iterator[dict[str, Any]]:
    """For each batch and operation: what was found, in microseconds; `keep` is given each question and its settings."""
    for batch in batches:
        for operation, choice in chosen.items():
            choice.changes = {}
            batch()

            def seconds_of(settings: dict[str, Any], choice: Chosen = choice, batch: Batch = batch) -> float:
                choice.changes = settings
                return seconds(batch)

            best, first_s, best_s = descend(choice.own(), choice.grid(operation), seconds_of)
            choice.changes = {}
            keep(choice.asked, best)
            for rows in PREFILL_ROWS:
                keep({**choice.asked, "batch": rows}, choice.own(batch=rows))
            row = {"layer": batch.layer.name, "rows": batch.x.shape[0], "operation": operation}
            yield {**row, "stock_us": round(1e6 * first_s, 2), "tuned_us": round(1e6 * best_s, 2), "settings": best}


class Folder:
    """Settings in vLLM's files: by max_loras, members of the layer, rows, and the widths k and n."""

    def __init__(self, path: Path, gpu: str) -> None:
        self._path, self._gpu = path, gpu.replace(" ", "_").replace("-", "_")
        path.mkdir(parents=True, exist_ok=True)

    def keep(self, asked: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        shrinks = asked["op_type"] == "shrink"
        suffix = "SHRINK" if shrinks else f"EXPAND_{str(asked['add_inputs']).upper()}"
        file = self._path / f"{self._gpu}_{suffix}.json"
        held: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        widths = (asked["hidden_size"], asked["rank"]) if shrinks else (asked["rank"], asked["hidden_size"])
        place = held
        for key in (asked["max_loras"], asked["num_slices"], asked["batch"], widths[0]):
            place = place.setdefault(str(key), {})
        place[str(widths[1])] = dict(settings)
        staged = file.with_suffix(".new")
        staged.write_text(json.dumps(held, indent=1))
        os.replace(staged, file)


def operations() -> dict[str, ModuleType]:
    """The modules that vLLM launches its kernels in."""
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

    return {"shrink": lora_shrink_op, "expand": lora_expand_op}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-7b", help="a model shape, such as qwen2.5-7b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--slots", type=int, default=2, help="max_loras of the engine that will use the settings")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128], help="completions that are decoded at a time")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the settings")
    options = parser.parse_args()
    compat.import_vllm()
    folder = Folder(options.out, torch.cuda.get_device_name())
    layers = layers_of(options.shape)
    # All stay alive: vLLM remembers weights by their address.
    batches = [Batch(layer, rows, options.rank, options.slots, "cuda") for layer in layers for rows in options.rows]
    chosen = {name: Chosen(module) for name, module in operations().items()}
    found = []
    for row in tune(batches, chosen, graph_seconds, folder.keep):
        print(json.dumps(row), flush=True)
        found.append(row)
    print(json.dumps({"shape": options.shape, "device": torch.cuda.get_device_name(), "found": found}))


if __name__ == "__main__":
    main()
