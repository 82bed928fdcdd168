"""The demo's task trained through two vLLM servers, with everything going wrong that may; every completion checked.

    python benchmarks/replicas.py [--steps 30] [--output replicas.json]

One server is killed in the middle of a rollout and started again at once, one load is refused by a server, and for a
few steps the store is slow. Afterwards each completion's log-probs are compared with what the trainer computes for the
version that it is stamped with, and for the versions before and after. A completion is told apart when it is less than
half as far from its own version as that is from the nearest of the others (one made by another would be as far from
its own as they are apart); wrong when it is nearer to another, further than noise; and inconclusive where the versions
agree about it. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_grpo.adapters import disk
from lora_grpo.adapters.checks import active_adapter
from lora_grpo.adapters.peft_format import lora_modules, peft_model_of
from lora_grpo.adapters.peft_read import assign_rounded, read_rounded
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.config import RunConfig
from lora_grpo.data import load_data
from lora_grpo.demo.base import ensure_base
from lora_grpo.demo.run import demo_config
from lora_grpo.engines.base import Adapters
from lora_grpo.engines.server.client import Client, Refused
from lora_grpo.engines.server.connect import LOAD
from lora_grpo.engines.server.engine import VLLMServerEngine
from lora_grpo.engines.server.launch import Servers, Serving
from lora_grpo.rewards import load_reward
from lora_grpo.scoring import teacher_logprobs
from lora_grpo.trainer import GRPOTrainer
from lora_grpo.trainer.build import effective_grpo, lora_config
from lora_grpo.types import Completion, Group, Prompt, Sampling

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VLLM_ARGS = ("--max-model-len", "64", "--max-num-seqs", "256", "--enforce-eager", "--gpu-memory-utilization", "0.1")
NOISE_ROWS = 1024

Row = tuple[tuple[int, ...], Completion]


class Witnessed(VLLMServerEngine):
    """Keeps every completion, and kills a server in the middle of one rollout."""

    def __init__(self, servers: Servers, kill_in_call: int, **settings: Any) -> None:
        super().__init__(servers.urls, **settings)
        self.made: list[Row] = []
        self.asked = self.calls = self.in_flight_at_kill = 0
        self._servers, self._kill_in_call = servers, kill_in_call

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, adapter: Adapters) -> list[Group]:
        self.calls += 1
        if self.calls == self._kill_in_call:
            threading.Timer(0.3, self._kill).start()
        groups = super().generate(prompts, sampling, adapter=adapter)
        self.asked += len(prompts) * sampling.n
        self.made += [(group.prompt_token_ids, made) for group in groups for made in group.completions]
        return groups

    def _kill(self) -> None:
        """Kill the first server and start it again at once."""
        killed = self._servers.all[0]
        self.in_flight_at_kill = self._fleet.replicas[0].in_flight
        killed.signal(signal.SIGKILL)
        killed.wait(10)
        killed.start()


class Faults:
    """What goes wrong besides the kill, and how often it did."""

    def __init__(self, refuse_load: int, slow: range) -> None:
        self.refused, self.slow_waits = 0, 0
        self._refuse_load, self._slow = refuse_load, slow
        self._loads = 0
        self._change = Client.change
        faults = self

        async def change(client: Client, path: str, body: dict[str, Any]) -> None:
            await faults.changing(client, path, body)

        Client.change = change  # type: ignore[method-assign]
        self._at = disk.at
        disk.at = self._waiting  # type: ignore[assignment]

    async def changing(self, client: Client, path: str, body: dict[str, Any]) -> None:
        self._loads += path == LOAD
        if path == LOAD and self._loads == self._refuse_load:
            self.refused += 1
            raise Refused(f"{client.url} is made to refuse this load", 500)
        await self._change(client, path, body)

    def _waiting(self, point: str) -> None:
        self._at(point)
        if self._loads // 2 in self._slow:
            self.slow_waits += 1
            time.sleep(0.3)

    def end(self) -> None:
        Client.change = self._change  # type: ignore[method-assign]
        disk.at = self._at


def train(config: RunConfig, engine: VLLMServerEngine) -> GRPOTrainer:
    data, held_out = load_data(config.data)
    trainer = GRPOTrainer(
        config.model,
        [load_reward(reward) for reward in config.rewards],
        effective_grpo(config),
        data,
        eval_dataset=held_out,
        peft_config=lora_config(config.lora),
        engine=engine,
        keep=config.keep,
        run_dir=config.output_dir,
        view=False,
    )
    with trainer:
        trainer.train()
    return trainer


def own_logprobs(model: Any, rows: Sequence[Row]) -> list[list[float]]:
    """The model's log-probs of each row's completion."""
    scored = teacher_logprobs(model, [[*prompt, *made.token_ids] for prompt, made in rows], rows=256)
    return [values[len(prompt) - 1 :] for values, (prompt, _) in zip(scored, rows, strict=True)]


def apart(left: Sequence[float], right: Sequence[float]) -> float:
    """Mean |left - right|, nats a token."""
    return sum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)


def base_noise(model: Any, engine: VLLMServerEngine, rows: Sequence[Row]) -> float:
    """What servers and trainer differ by on the base, for nearly every completion (99.9 of 100), nats a token."""
    chosen = rows[:: max(1, len(rows) // NOISE_ROWS)][:NOISE_ROWS]
    served = engine.logprobs([[*prompt, *made.token_ids] for prompt, made in chosen], adapter=None)
    served = [values[len(prompt) - 1 :] for values, (prompt, _) in zip(served, chosen, strict=True)]
    with peft_model_of(model).disable_adapter():
        own = own_logprobs(model, chosen)
    gaps = sorted(apart(a, b) for a, b in zip(served, own, strict=True))
    return gaps[int(0.999 * (len(gaps) - 1))]


def stored(store: AdapterStore, number: int) -> dict[str, torch.Tensor]:
    with store.reading(number) as folder:
        return read_rounded(replace(store.get(number), path=folder))


def check(model: Any, run: Path, rows: Sequence[Row], noise: float) -> dict[str, Any]:
    """Counts over all completions, as the module says. Greedy ones carry log-probs at temperature 1, as all others."""
    of: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        of[int(row[1].version or 0)].append(row)
    modules = lora_modules(model, active_adapter(model))
    counts = {"checked": 0, "told_apart": 0, "wrong": 0, "inconclusive": 0}
    gaps: list[float] = []
    distances: list[float] = []
    with AdapterStore(archive=run, readonly=True) as store:
        weights = {number: stored(store, number) for number in store.numbers}
    for number, made in sorted(of.items()):
        logp: dict[int, list[list[float]]] = {}
        for other in sorted({number - 1, number, number + 1} & weights.keys()):
            assign_rounded(weights[other], modules)
            logp[other] = own_logprobs(model, made)
        for index, (_, completion) in enumerate(made):
            gap = apart(logp[number][index], completion.logprobs)
            others = [values[index] for other, values in logp.items() if other != number]
            distance = min(apart(values, logp[number][index]) for values in others)
            nearer = any(apart(values, completion.logprobs) < gap for values in others)
            wrong, told = nearer and distance > 2 * noise, gap < 0.5 * distance
            for name, holds in {"checked": True, "told_apart": told, "wrong": wrong}.items():
                counts[name] += holds
            counts["inconclusive"] += not told and not wrong
            gaps.append(gap)
            distances.append(distance)
    return {
        **counts,
        "versions": len(of),
        "noise_nats": round(noise, 5),
        "gap_mean_nats": round(statistics.fmean(gaps), 5),
        "gap_max_nats": round(max(gaps), 5),
        "distance_to_next_version_mean_nats": round(statistics.fmean(distances), 5),
    }


def run(steps: int, folder: Path) -> dict[str, Any]:
    base = ensure_base()
    config = demo_config(base, folder / "run", steps=steps, seed=0)
    serving = Serving(str(base), replicas=2, port=8461, target_modules=LEAVES, arguments=VLLM_ARGS)
    with Servers(serving, folder) as servers:
        engine = Witnessed(servers, kill_in_call=max(2, steps // 4))
        faults = Faults(refuse_load=2 * (steps // 2), slow=range(2 * steps // 3, 2 * steps // 3 + 3))
        started = time.perf_counter()
        trainer = train(config, engine)
        seconds = time.perf_counter() - started
        faults.end()
        lost = engine.asked - len(engine.made)
        noise = base_noise(trainer.model, engine, engine.made)
        states = engine.replicas
        engine.close()
    return {
        "steps": trainer.steps_done,
        "accuracy_before": round(trainer.evaluations[0].metrics["reward"], 4),
        "accuracy_after": round(trainer.evaluations[-1].metrics["reward"], 4),
        "seconds": round(seconds, 1),
        "step_median_s": round(statistics.median(metrics["step_time"] for metrics in trainer.history), 3),
        "load_median_s": round(statistics.median(metrics["sync/load_s"] for metrics in trainer.history), 3),
        "completions": len(engine.made),
        "lost": lost,
        "in_flight_at_kill": engine.in_flight_at_kill,
        "loads_refused": faults.refused,
        "slow_store_waits": faults.slow_waits,
        "replicas_at_the_end": list(states.values()),
        **check(trainer.model, Path(config.output_dir), engine.made, noise),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lora-grpo-replicas-") as folder:
        result = run(arguments.steps, Path(folder))
    line = json.dumps(result)
    if arguments.output:
        arguments.output.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
