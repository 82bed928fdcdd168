"""Of the tokens that are sampled, how many have to the bit the log-prob that scoring them as a prompt gives.

    python benchmarks/gpu/invariance.py --model DIR --device cuda:0

With an adapter and without, on a GPU under VLLM_BATCH_INVARIANT=1 for the whole process. The last line is JSON."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from lora_grpo.bench.host import asked

SIZES = {"cpu": (4, 8), "cuda": (64, 64)}  # rows, and tokens of each


def main() -> None:
    options = asked(__doc__, model=Path, device=str)
    if options.device != "cpu":
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    from lora_grpo.bench.plan import Subject
    from lora_grpo.bench.strategies.native import Native
    from lora_grpo.engines import compat

    compat.import_vllm()
    from vllm import envs

    rows, length = SIZES[options.device.partition(":")[0]]
    with tempfile.TemporaryDirectory() as folder:
        limits = {"max_model_len": 256, "max_num_seqs": rows, "gpu_memory_utilization": 0.2}
        subject = Subject("native", str(options.model), 16, "all-linear", options.device, folder, folder, **limits)
        strategy = Native(subject)
        without = equal_share(strategy, rows, length)
        strategy.trainer.randomise(0.2)
        strategy.sync()
        shares = {"with_adapter": equal_share(strategy, rows, length), "without_adapter": without}
        strategy.close()
    on = os.environ.get("VLLM_BATCH_INVARIANT") == "1" and "VLLM_BATCH_INVARIANT" in envs.environment_variables
    print(json.dumps({"batch_invariant": on, **shares, "tokens": rows * length, "model": options.model.name}))


def equal_share(strategy: Any, rows: int, length: int) -> float:
    import torch

    from lora_grpo.types import Sampling

    drawn = torch.randint(1, 1000, (rows, length), generator=torch.Generator().manual_seed(1)).tolist()
    groups = strategy.generate(drawn, Sampling(n=1, max_tokens=length, temperature=1.0, seed=1, ignore_eos=True))
    made = [(group.prompt_token_ids, group.completions[0]) for group in groups]
    scored = strategy.logprobs([[*prompt, *completion.token_ids] for prompt, completion in made])
    pairs = [
        (sampled, again)
        for (_, completion), row in zip(made, scored, strict=True)
        for sampled, again in zip(completion.logprobs, row[-length:], strict=True)
    ]
    return sum(sampled == again for sampled, again in pairs) / len(pairs)


if __name__ == "__main__":
    main()
