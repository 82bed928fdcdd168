"""The demo's task trained through two vLLM servers, with everything going wrong that may; every completion checked.

    python benchmarks/replicas.py [--steps 30] [--max-staleness 0] [--out FILE]

One server is killed in the middle of a rollout and started again at once. Another refuses a load, since some other
client has loaded an older version's files under the very name that is to be given out next. For three steps the store
is slow. Afterwards each completion's log-probs are compared with what the trainer computes for the version that it is
stamped with, and for every other version of the run; `lora_grpo.bench.attribution` has the rule. The servers compute
in float32, as the trainer does: so rounding hides no difference between versions.

Whether the check would see a wrong version is measured in the same run, with the same rule: on the same completions,
each claiming its neighbour's number, and on completions that the base made, each claiming a version's.

`--max-staleness` is how many versions a batch may lag behind. The result is printed as a line of JSON."""

import json
import signal
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.files.disk import write_file
from lora_grpo.adapters.peft_form.checks import active_adapter
from lora_grpo.adapters.peft_form.modules import lora_modules, peft_model_of
from lora_grpo.adapters.peft_form.serving import weights_of
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.bench.attribution import Rows, judge
from lora_grpo.bench.host import asked, provenance, write_result
from lora_grpo.demo import demo_config, ensure_base
from lora_grpo.engines.base import Adapters, LoadReceipt
from lora_grpo.engines.local.targets import linear_leaves
from lora_grpo.engines.server.engine import VLLMServerEngine
from lora_grpo.engines.server.launch import Servers, Serving
from lora_grpo.engines.server.replica import LOAD
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs
from lora_grpo.trainer import GRPOTrainer
from lora_grpo.trainer.build import member_spec
from lora_grpo.types import Completion, Group, Prompt, Sampling

VLLM_ARGS = "--max-model-len 64 --max-num-seqs 256 --gpu-memory-utilization 0.1 --enforce-eager --dtype float32"
PORT, MIN_STEPS, NOISE_ROWS = 8461, 6, 1024

Row = tuple[tuple[int, ...], Completion]


class Witnessed(VLLMServerEngine):
    """Keeps every completion with the server that made it, and has everything go wrong in its time."""

    def __init__(self, servers: Servers, steps: int, **settings: Any) -> None:
        super().__init__(servers.urls, lora_dtype="float32", **settings)
        self.made: list[Row] = []
        self.asked = self.calls = self.loads = self.in_flight_at_kill = self.refused = self.slow_waits = 0
        self._servers = servers
        self._kill_in_call, self._refuse_load = max(2, steps // 4), 1 + steps // 2
        self._slow_loads = range(2 + 2 * steps // 3, 5 + 2 * steps // 3)
        self._answered: dict[Any, list[int]] = defaultdict(list)
        for index, replica in enumerate(self._fleet.replicas):
            replica.client.ask = self._noting(index, replica.client.ask)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, adapter: Adapters) -> list[Group]:
        self.calls += 1
        self.asked += len(prompts) * sampling.n
        if self.calls == self._kill_in_call:
            threading.Timer(0.3, self._kill).start()
        groups = super().generate(prompts, sampling, adapter=adapter)
        self.made += rows_of(groups)
        return groups

    def load(self, version: AdapterVersion, **named: Any) -> LoadReceipt:
        """One of them once its name is taken on the last server, by what is in use already."""
        self.loads += 1
        if self.loads != self._refuse_load:
            return super().load(version, **named)
        stem, _, counter = self._names.fresh(version).rpartition(".")
        name, url = f"{stem}.{int(counter) + len(self._servers.urls)}", self._servers.urls[-1]
        body = {"lora_name": name, "lora_path": str(self.loaded()[-1].path)}
        httpx.post(f"{url}{LOAD}", json=body, timeout=60).raise_for_status()
        receipt = super().load(version, **named)
        self.refused += self.served_names(version)[url] != name
        return receipt

    def servers_of(self, rows: Sequence[Row]) -> list[int]:
        """Which server made each; rows that are alike to the last bit are anyone's."""
        return [self._answered[prompt, made.token_ids, made.logprobs].pop() for prompt, made in rows]

    def write_slowly(self, *given: Any, **named: Any) -> None:
        if self.loads in self._slow_loads:
            self.slow_waits += 1
            time.sleep(0.3)
        write_file(*given, **named)

    def _noting(self, server: int, ask: Callable[..., Any]) -> Callable[..., Any]:
        async def noted(path: str, body: dict[str, Any], **named: Any) -> dict[str, Any]:
            answer: dict[str, Any] = await ask(path, body, **named)
            if body.get("return_token_ids") and "prompt_logprobs" not in body:
                choice = answer["choices"][0]
                logprobs = tuple(choice["logprobs"]["token_logprobs"])
                self._answered[tuple(body["prompt"]), tuple(choice["token_ids"]), logprobs].append(server)
            return answer

        return noted

    def _kill(self) -> None:
        killed = self._servers.all[0]
        self.in_flight_at_kill = self._fleet.replicas[0].in_flight
        killed.signal(signal.SIGKILL)
        killed.wait(10)
        killed.start()


def rows_of(groups: Sequence[Group]) -> list[Row]:
    return [(group.prompt_token_ids, made) for group in groups for made in group.completions]


def made_by_the_base(trainer: GRPOTrainer, engine: Witnessed) -> list[Row]:
    """Completions as in training, but for the version."""
    sampling = Sampling(n=8, max_tokens=trainer.config.max_completion_length, seed=1)
    return rows_of(engine.generate(trainer.source.data.select(range(64))[0], sampling, adapter=None))


def own_logprobs(model: Any, rows: Sequence[Row]) -> list[list[float]]:
    """The model's log-probs of each row's completion; rows of the same tokens are computed once."""
    sequences = [(*prompt, *made.token_ids) for prompt, made in rows]
    distinct = list(dict.fromkeys(sequences))
    scored = dict(zip(distinct, teacher_logprobs(model, distinct, rows=256), strict=True))
    return [scored[ids][len(prompt) - 1 :] for ids, (prompt, _) in zip(sequences, rows, strict=True)]


def base_noise(model: Any, engine: VLLMServerEngine, rows: Sequence[Row]) -> float:
    """The most that servers and trainer differ by on a completion, computed by the base, nats a token."""
    chosen = rows[:: max(1, len(rows) // NOISE_ROWS)][:NOISE_ROWS]
    served = engine.logprobs([[*prompt, *made.token_ids] for prompt, made in chosen], adapter=None)
    with peft_model_of(model).disable_adapter():
        own = own_logprobs(model, chosen)
    return max(
        mean_abs_difference([values[len(prompt) - 1 :]], [other])
        for values, other, (prompt, _) in zip(served, own, chosen, strict=True)
    )


def by_every_version(model: Any, run: Path, rows: Sequence[Row]) -> tuple[list[int], list[list[list[float]]]]:
    """The versions' numbers, and the rows' log-probs by each; greedy rows, too, carry those of temperature 1."""
    modules = lora_modules(model, active_adapter(model))
    logp = []
    with AdapterStore(archive=run, readonly=True) as store:
        numbers = sorted(store.numbers)
        for number in numbers:
            with store.reading(number) as folder, weights_of(replace(store.get(number), path=folder), modules):
                logp.append(own_logprobs(model, rows))
    return numbers, logp


def check(trainer: GRPOTrainer, engine: Witnessed, of_the_base: list[Row], noise: float) -> dict[str, Any]:
    """The verdicts on all completions, and on both kinds that claim a version which did not make them."""
    rows = [row for row in engine.made if row[1].version is not None]
    numbers, logp = by_every_version(trainer.model, trainer.run_dir, [*rows, *of_the_base])
    # The first version's B is zero, so it is the base.
    claims = [1 + index % (len(numbers) - 1) for index in range(len(of_the_base))]

    def rows_with(part: Sequence[Row], stamped: list[int], here: slice) -> Rows:
        sampler = [list(made.logprobs) for _, made in part]
        return Rows.of([values[here] for values in logp], sampler, stamped, engine.servers_of(part))

    own = rows_with(rows, [numbers.index(made.version) for _, made in rows], slice(0, len(rows)))
    base = rows_with(of_the_base, claims, slice(len(rows), None))
    controls = {"claiming_the_next_version": judge(own.next_stamped(), noise), "made_by_the_base": judge(base, noise)}
    return {
        **judge(own, noise),
        "versions": len(numbers),
        "control_detected": {name: round(found["wrong"] / found["checked"], 4) for name, found in controls.items()},
        "controls": controls,
        "noise_nats": float(f"{noise:.3g}"),
        "gap_mean_nats": float(f"{own.own_gap().mean():.3g}"),
        "gap_max_nats": float(f"{own.own_gap().max():.3g}"),
        "distance_to_next_version_mean_nats": float(f"{own.next_distance().mean():.3g}"),
    }


def run(steps: int, most: int, folder: Path) -> dict[str, Any]:
    base = ensure_base()
    config = demo_config(base, folder / "run", steps=steps, seed=0)
    spec = member_spec(config.replace(grpo=config.grpo.replace(max_staleness=most)))
    slots, leaves = max(2, most + 1), tuple(linear_leaves(str(base)))
    serving = Serving(
        str(base), replicas=2, port=PORT, max_loras=slots, target_modules=leaves, arguments=tuple(VLLM_ARGS.split())
    )
    with Servers(serving, folder).running() as servers:
        engine = Witnessed(servers, steps, max_loras=slots)
        started = time.perf_counter()
        trainer = GRPOTrainer(config.model, **spec.arguments(), engine=engine, view=False)
        with patch.object(disk, "write_file", engine.write_slowly), trainer:
            trainer.train()
        seconds = time.perf_counter() - started
        made, lost, states = list(engine.made), engine.asked - len(engine.made), engine.replicas
        of_the_base, noise = made_by_the_base(trainer, engine), base_noise(trainer.model, engine, made)
        engine.close()
    return {
        "steps": trainer.steps_done,
        "max_staleness": most,
        "lag_mean": round(statistics.fmean(row.get("sample/staleness_mean", 0.0) for row in trainer.history), 3),
        "accuracy_before": round(trainer.evaluations[0].metrics["reward"], 4),
        "accuracy_after": round(trainer.evaluations[-1].metrics["reward"], 4),
        "seconds": round(seconds, 1),
        "step_median_s": round(statistics.median(metrics["step_time"] for metrics in trainer.history), 3),
        "load_median_s": round(statistics.median(metrics["sync/load_s"] for metrics in trainer.history), 3),
        "completions": len(made),
        "lost": lost,
        "in_flight_at_kill": engine.in_flight_at_kill,
        "loads_refused": engine.refused,
        "slow_store_waits": engine.slow_waits,
        "replicas_at_the_end": list(states.values()),
        **check(trainer, engine, of_the_base, noise),
    }


def main() -> None:
    options = asked(__doc__, steps=30, max_staleness=0, out=None)
    if options.steps < MIN_STEPS or options.max_staleness < 0:
        raise SystemExit(f"--steps must be at least {MIN_STEPS}, for everything to go wrong in, --max-staleness 0")
    with tempfile.TemporaryDirectory(prefix="lora-grpo-replicas-") as folder:
        result = provenance("benchmarks/replicas.py") | run(options.steps, options.max_staleness, Path(folder))
    write_result(options.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
