"""Generation time of a population in one engine batch, against its members one after the other, on a 0.5B shape.

    python -m benchmarks.population [--members 8] [--rows 1,2,4,8] [--repeats 3] [--tokens 24] [--dtype auto]
                                    [--shape qwen2.5-0.5b] [--device cpu] [--out FILE]

One engine of a dtype, one adapter a member, `rows` a member. `alone_s` is the sum of the members' calls, each with its
own rows, as lone runs make them; `together_s` is one call with all of them. Both are medians of `repeats`, taken in
turn; `ratio` is of those. `ratio_cpu` is the same of processor seconds, which other work on the machine changes less.
The tokens are compared too. On a GPU, decoding is captured in CUDA graphs; a CPU's engine is eager, since compiling
this shape takes longer than all that is measured."""

import json
import operator
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_grpo import AdapterStore, AdapterVersion, Sampling, VLLMEngine
from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.bench.host import asked, provenance, write_result
from lora_grpo.bench.plan import Subject
from lora_grpo.bench.shapes import write_model
from lora_grpo.bench.strategy import ADAPTER, Trainer, engine_arguments

RANK, PROMPT = 16, 32


def main() -> None:
    defaults = {"members": 8, "rows": "1,2,4,8", "repeats": 3, "tokens": 24, "dtype": "auto"}
    options = asked(__doc__, **defaults, shape="qwen2.5-0.5b", device="cpu", out=None)
    about, curve = provenance("-m", "benchmarks.population", device=options.device), []
    sizes = [int(rows) for rows in options.rows.split(",")]
    with tempfile.TemporaryDirectory(prefix="lora-grpo-population-") as folder:
        base = write_model(options.shape, Path(folder) / "base", device=options.device)
        batches = (*sizes, *(options.members * rows for rows in sizes))
        limits: dict[str, Any] = {"max_model_len": PROMPT + options.tokens, "max_num_seqs": max(batches)}
        limits |= {"graphs": "alone", "rows": batches}
        subject = Subject("native", str(base), RANK, "all-linear", options.device, **limits)
        given = {"dtype": options.dtype, "enable_prefix_caching": False, **engine_arguments(subject)}
        engine = VLLMEngine(base, max_lora_rank=RANK, max_loras=options.members, **given)
        with AdapterStore(archive=Path(folder) / "run") as store:
            trainer, versions = Trainer(subject), list[AdapterVersion]()
            for seed in range(options.members):
                trainer.randomise(0.02, seed)
                form = ServingForm(trainer.model, ADAPTER, getattr(torch, engine.lora_dtype))
                versions.append(store.publish(form.files(), step=seed))
                engine.load(versions[-1])
            for rows in sizes:
                curve.append({"rows": rows, **compared(engine, versions, rows, options)})
                print(json.dumps(curve[-1]), flush=True)
        engine.close()
    write_result(options.out, {**about, "rank": RANK, "prompt": PROMPT, **vars(options), "out": None, "curve": curve})


def compared(engine: VLLMEngine, versions: Sequence[AdapterVersion], rows: int, options: Any) -> dict[str, Any]:
    """A row of the curve. Without a prefix cache, or a call would find the prompts of the one before."""
    generator = torch.Generator().manual_seed(rows)
    shape = len(versions) * rows, PROMPT
    prompts = torch.randint(engine.describe_base().vocabulary, shape, generator=generator).tolist()
    named = [version for version in versions for _ in range(rows)]
    sampling = [Sampling(max_tokens=options.tokens, seed=row, ignore_eos=True) for row in range(len(named))]

    def generated(calls: Sequence[slice]) -> tuple[float, float, list[Any]]:
        """Seconds, processor seconds, and the tokens of each row."""
        started, started_cpu = time.perf_counter(), time.process_time()
        groups = [one for part in calls for one in engine.generate(prompts[part], sampling[part], adapter=named[part])]
        taken = time.perf_counter() - started, time.process_time() - started_cpu
        return *taken, [group.completions[0].token_ids for group in groups]

    ways = [slice(start, start + rows) for start in range(0, len(named), rows)], [slice(None)]
    alone, together = zip(*[[generated(calls) for calls in ways] for _ in range(options.repeats)], strict=True)
    (alone_s, alone_cpu_s), (together_s, together_cpu_s) = (
        [statistics.median(run[what] for run in runs) for what in (0, 1)] for runs in (alone, together)
    )
    return {
        "alone_s": round(alone_s, 3),
        "together_s": round(together_s, 3),
        "ratio": round(together_s / alone_s, 3),
        "ratio_cpu": round(together_cpu_s / alone_cpu_s, 3),
        "same_completions": sum(map(operator.eq, alone[-1][2], together[-1][2])) / len(named),
    }


if __name__ == "__main__":
    main()
