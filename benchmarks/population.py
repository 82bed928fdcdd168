"""Generation time of a population in one engine batch, against its members one after the other, on a 0.5B shape.

    python -m benchmarks.population [--members 8] [--rows 1,2,4,8] [--repeats 3] [--tokens 24] [--out FILE]

One engine, one adapter a member. `alone_s` is the sum of the members' calls, each with its own rows, as lone runs make
them; `together_s` is one call with all of them. Both are medians of `repeats`, taken in turn; `ratio` is of those.
`ratio_cpu` is the same of processor seconds, which other work on the machine changes less. The tokens are compared too.
"""

from __future__ import annotations

import argparse
import json
import operator
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from lora_grpo import AdapterStore, AdapterVersion, Sampling, VLLMEngine
from lora_grpo.adapters.peft_form.modules import lora_modules
from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.bench.provenance import provenance
from lora_grpo.bench.shapes import write_model
from lora_grpo.config import ModelConfig
from lora_grpo.trainer.models import without_memory

SHAPE, RANK, PROMPT = "qwen2.5-0.5b", 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--rows", default="1,2,4,8", help="rows a member")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="the engine's")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    about, rows = provenance("-m", "benchmarks.population"), []
    with tempfile.TemporaryDirectory(prefix="lora-grpo-population-") as folder:
        base = write_model(SHAPE, Path(folder) / "base")
        # Compiling this shape takes a CPU longer than all that is measured.
        limits = {"max_model_len": PROMPT + options.tokens, "enforce_eager": True, "dtype": options.dtype}
        engine = VLLMEngine(base, max_lora_rank=RANK, max_loras=options.members, **limits)
        with AdapterStore(archive=Path(folder) / "run") as store:
            versions = [adapter(store, base, engine, seed) for seed in range(options.members)]
            for each in map(int, options.rows.split(",")):
                rows.append({"rows": each, **compared(engine, versions, each, options.tokens, options.repeats)})
                print(json.dumps(rows[-1]), flush=True)
        engine.close()
    result = {"shape": SHAPE, "rank": RANK, "prompt": PROMPT, **vars(options), "out": None, "curve": rows}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**about, **result}, indent=1) + "\n")


def adapter(store: AdapterStore, base: Path, engine: VLLMEngine, seed: int) -> AdapterVersion:
    """A version with random A and B in every linear layer, loaded and proven."""
    empty = without_memory(ModelConfig(name=str(base)), LoraConfig(r=RANK, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(seed)
    for module in lora_modules(empty, "default"):
        for layers in (module.layer.lora_A, module.layer.lora_B):
            drawn = torch.randn(layers["default"].weight.shape, generator=generator) / 64
            layers["default"].weight = nn.Parameter(drawn)
    files = ServingForm(empty, "default", getattr(torch, engine.lora_dtype)).files()
    version = store.publish(files, step=seed)
    engine.load(version)
    return version


def compared(
    engine: VLLMEngine, versions: Sequence[AdapterVersion], rows: int, tokens: int, repeats: int
) -> dict[str, Any]:
    """A row of the curve. A prompt is shorter than a block of the prefix cache, so none is kept from call to call."""
    generator = torch.Generator().manual_seed(rows)
    vocabulary = engine.describe_base().vocabulary
    prompts = torch.randint(vocabulary, (len(versions) * rows, PROMPT), generator=generator).tolist()
    named = [version for version in versions for _ in range(rows)]
    sampling = [Sampling(max_tokens=tokens, seed=row, ignore_eos=True) for row in range(len(named))]

    def generated(part: slice) -> list[Any]:
        return engine.generate(prompts[part], sampling[part], adapter=named[part])

    parts = {"alone": [slice(start, start + rows) for start in range(0, len(named), rows)], "together": [slice(None)]}
    taken_s: dict[str, list[float]] = {name: [] for name in parts}
    cpu_s: dict[str, list[float]] = {name: [] for name in parts}
    texts: dict[str, list[Any]] = {}
    for _ in range(repeats):
        for name, calls in parts.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            groups = [group for call in calls for group in generated(call)]
            taken_s[name].append(time.perf_counter() - started)
            cpu_s[name].append(time.process_time() - started_cpu)
            texts[name] = [group.completions[0].token_ids for group in groups]
    wall, cpu = ({name: statistics.median(times) for name, times in of.items()} for of in (taken_s, cpu_s))
    return {
        "alone_s": round(wall["alone"], 3),
        "together_s": round(wall["together"], 3),
        "ratio": round(wall["together"] / wall["alone"], 3),
        "ratio_cpu": round(cpu["together"] / cpu["alone"], 3),
        "same_completions": sum(map(operator.eq, texts["alone"], texts["together"])) / len(named),
    }


if __name__ == "__main__":
    main()
