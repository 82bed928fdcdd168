"""A training run as a process of its own, to be killed, paused and resumed.

    python -m tests.tiny_run BASE RUN ROOT '{"engine": "vllm", "steps": 6, "resume": false, ...}'

`die_in_step`: SIGKILL while that step's rewards are computed. `die_at`: [point, hit], SIGKILL when the store comes by
`point` the `hit`-th time. `pause`: each step prints `step N` and waits for a line on stdin. `poison`: at that step a
weight becomes infinite. The last line of stdout is the run's summary.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from lora_grpo.config import KeepConfig
from lora_grpo.engines.fake import FakeEngine
from tests.conftest import ENGINE_ARGS
from tests.crash.moments import die_at
from tests.tiny_trainer import CONFIG, share_of_low_bytes, tiny_trainer


def fake_engine(base: Path) -> FakeEngine:
    """Answers that depend on the request's seed alone."""

    def reply(prompt: Any, version: Any, seed: int) -> str:
        return "".join(random.Random(seed).choices("aé", k=5))

    return FakeEngine(reply, tokenizer=AutoTokenizer.from_pretrained(base))


def engine_of(kind: str, base: Path) -> Any:
    if kind == "fake":
        return fake_engine(base)
    from lora_grpo.engines.vllm_local import VLLMEngine

    return VLLMEngine(base, max_lora_rank=16, **ENGINE_ARGS)


def main(base: Path, run: Path, root: Path, plan: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    if "die_at" in plan:
        die_at(*plan["die_at"])

    def reward(completions: Sequence[str], trainer_state: Any, **columns: Any) -> list[float]:
        step = trainer_state.global_step
        if step == plan.get("die_in_step"):
            os.kill(os.getpid(), signal.SIGKILL)
        if plan.get("pause"):
            print(f"step {step}", flush=True)
            sys.stdin.readline()
        return share_of_low_bytes(completions)

    config = CONFIG.replace(total_steps=plan["steps"], vllm_importance_sampling_correction=plan["engine"] != "fake")
    engine = engine_of(plan["engine"], base)
    keep = KeepConfig(trainer_states=20)
    with tiny_trainer(base, engine, run, config, reward_funcs=reward, keep=keep, store_root=root) as trainer:
        if plan.get("resume"):
            trainer.resume()
        result = trainer.train()
    engine.close()
    return result


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:4]), json.loads(sys.argv[4]))))
