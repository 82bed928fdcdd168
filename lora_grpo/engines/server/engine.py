"""`VLLMServerEngine`: the engine protocol over one or many `vllm serve` processes."""

import asyncio
import os
import shutil
import threading
import time
import warnings
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import wait
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer

from lora_grpo.adapters.files.places import Identity
from lora_grpo.adapters.peft_form.files import open_adapter
from lora_grpo.adapters.peft_form.serving import Held
from lora_grpo.adapters.version import AdapterVersion, run_name, served_name
from lora_grpo.config import server_addresses
from lora_grpo.engines import compat
from lora_grpo.engines.base import Adapters, BaseDescription, LoadReceipt, Proof, Samplings, Witness
from lora_grpo.engines.delivery.agreement import describe
from lora_grpo.engines.delivery.probe import probe_sequences
from lora_grpo.engines.delivery.slots import require_published
from lora_grpo.engines.local.targets import checkpoint_config
from lora_grpo.engines.names import BaseReading
from lora_grpo.engines.requests import asked, check_asked, check_fits, to_groups
from lora_grpo.engines.server.client import Client, Result
from lora_grpo.engines.server.fleet import Fleet, connected
from lora_grpo.engines.server.replica import Facts, Names, Replica, Served, slots_of
from lora_grpo.errors import ConfigError
from lora_grpo.types import Group, LogProbs, Prompt, Sequences
from lora_grpo.worker import working

_SCORED_TOGETHER = 16


class VLLMServerEngine:
    """Unmodified vLLM servers that serve immutable adapter versions, each proven by what every server answers.

    Methods may be called from several threads: a load does not wait for completions, nor they for it.

    >>> engine = VLLMServerEngine(["http://127.0.0.1:8000"])  # as `lora-grpo serve` starts it
    >>> engine.proof, engine.max_lora_rank
    ('behaviour', 16)
    """

    proof: Proof = "behaviour"
    device: None = None
    max_lora_rank: int
    max_model_len: int
    lora_dtype: str
    pulls: bool
    tokenizer: Any

    def __init__(
        self,
        urls: Sequence[str],
        *,
        model: str | Path | None = None,
        api_key: str | None = None,
        max_loras: int = 2,
        adapters: Literal["path", "resolver"] = "path",
        on_failure: Literal["raise", "drop"] = "raise",
        concurrency: int = 256,
        timeout_s: float = 600.0,
        patience_s: float = 300.0,
        lora_dtype: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Connect to the servers and check them; what dead runs left on them is unloaded.

        `model` is where this process finds their checkpoint (default: where they say that they do), `api_key` theirs
        (default: VLLM_API_KEY). `max_loras` versions stay in use; each server needs as many slots.
        `adapters`: "path" has servers read a version where the store keeps it, "resolver" has them pull it by name.
        `on_failure`: a version that one replica fails to load fails on all ("raise"), or that replica leaves the
        rotation until it can be brought back ("drop").
        `concurrency` bounds the requests on each replica, `timeout_s` each one's time, waiting in line included.
        `patience_s` is how long a replica that went away is waited for.
        `lora_dtype` is what the servers keep adapters in, where it is not the checkpoint's dtype.
        Raises `ConfigError` naming the flag that a server lacks, `UnsupportedVersion`, or `EngineError`.
        """
        if isinstance(urls, str) or not (isinstance(urls, Sequence) and urls and all(isinstance(u, str) for u in urls)):
            raise ConfigError(f'urls={urls!r} must be a list of texts; give ["http://..."], one at least')
        addresses = server_addresses(urls)
        if max_loras < 2 or concurrency < 1:
            fix = "at least 2 (HEAD and its successor)"
            raise ConfigError(f"max_loras={max_loras} must be {fix}, concurrency={concurrency} at least 1")
        _check_choice("adapters", adapters, "path", "resolver")
        _check_choice("on_failure", on_failure, "raise", "drop")
        self.pulls = adapters == "resolver"
        with ExitStack() as opened:
            self._names = Names()
            opened.callback(self._names.close)
            if not self.pulls:
                self._names.write_rank_probe()
            self._loop = _Loop()
            opened.callback(self._loop.close)
            clients = [Client(address, api_key or os.environ.get("VLLM_API_KEY"), timeout_s) for address in addresses]
            replicas = self._loop.run(connected(clients, self._names))
            self._describe([replica.facts for replica in replicas], model, lora_dtype, trust_remote_code)
            checked, drops = probe_sequences(self._base), on_failure == "drop"
            self._fleet = Fleet(replicas, concurrency, patience_s, self._names, max_loras, drops, checked)
            opened.callback(lambda: self._loop.run(self._fleet.close()))
            self._opened = opened.pop_all()

    def _describe(self, facts: Sequence[Facts], model: str | Path | None, lora_dtype: str | None, trust: bool) -> None:
        root = str(model or facts[0].root)
        try:
            config = checkpoint_config(root, trust_remote_code=trust)
            self.tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=trust)
        except (OSError, ValueError) as error:
            said = f"the servers' checkpoint cannot be read here as {root}: {error}"
            raise ConfigError(f"{said}; pass model= with its path or name on this host") from error
        self._base = describe(config, lora_dtype or str(config.dtype or "float32").removeprefix("torch."))
        ranks = [own.max_lora_rank for own in facts if own.max_lora_rank is not None]
        self.max_lora_rank = min(ranks, default=compat.LORA_RANKS[-1])
        self.max_model_len, self.lora_dtype = facts[0].max_model_len, self._base.dtype

    @property
    def replicas(self) -> dict[str, str]:
        """Each server's state by URL: "serving", or what keeps it out of rotation."""
        return {r.url: "serving" if r.state == "serving" else f"{r.state}: {r.trouble}" for r in self._fleet.replicas}

    def served_names(self, version: AdapterVersion) -> dict[str, str]:
        """The model name to ask for `version` by on each server in rotation, for other OpenAI clients."""
        served = self._fleet.in_use.find(version)
        return {replica.url: replica.names[served] for replica in self._fleet.serving}

    def load(
        self, version: AdapterVersion, *, held: Held | None = None, expected: LogProbs | None = None
    ) -> LoadReceipt:
        """Load `version` on every server or on none. `expected` are the trainer's log-probs of the probe's tokens, as
        `NativeSync.push` passes them; the receipt's `verdict` says whether they tell the version from others.
        Raises `DeliveryError` or `EngineError`, and what was in use before still is.
        """
        started = time.perf_counter()
        file = open_adapter(version)
        require_published(version, file)
        checked = time.perf_counter()
        report = self._loop.run(self._fleet.load(self._served(version, expected or [])))
        seconds = {"check": checked - started, "load": time.perf_counter() - checked}
        verdict: Literal["ok", "inconclusive"] = "ok" if report and report.verdict == "ok" else "inconclusive"
        return LoadReceipt("behaviour", seconds, len(file.paths), 0, "stock", verdict)

    def _served(self, version: AdapterVersion, answers: LogProbs) -> Served:
        """Pulled by RUN@NUMBER, by which a resolver finds it. Raises `ConfigError` for one of no store."""
        if not self.pulls:
            return Served(version, answers, None)
        root = version.path.parent.parent
        if (identity := Identity.read(root)) is None:
            said = f"{version} at {version.path} is in no store, so no resolver can pull it"
            raise ConfigError(f"{said}; publish it first")
        run = run_name(Path(identity.other or root), identity.run_id)
        return Served(version, answers, served_name(run, version.number))

    def unload(self, version: AdapterVersion) -> None:
        self._loop.run(self._fleet.unload(self._fleet.in_use.find(version)))

    def loaded(self) -> tuple[AdapterVersion, ...]:
        return self._fleet.in_use.versions

    def generate(self, prompts: Sequence[Prompt], sampling: Samplings, *, adapter: Adapters) -> list[Group]:
        """`VLLMEngine.generate`, the prompts shared among the servers. Raises `EngineError` when all are gone for
        `patience_s`."""
        each = asked(self.tokenizer, prompts, sampling, adapter)
        check_asked(each, self.max_model_len, self._base)
        complete = partial(Client.complete, placeholders=self._base.placeholders)
        asks_P = [(one.adapter, [partial(complete, asked=one, seed=seed) for seed in one.seeds]) for one in each]
        return to_groups(each, self._loop.run(self._fleet.answer(asks_P)))

    def logprobs(self, sequences: Sequences, *, adapter: AdapterVersion | None) -> LogProbs:
        return self._score(sequences, adapter, None)

    def logprobs_of_each(self, sequences: Sequences, *, adapter: AdapterVersion | None) -> list[LogProbs]:
        return [self._score(sequences, adapter, replica) for replica in self._fleet.serving]

    def _score(self, sequences: Sequences, adapter: AdapterVersion | None, only: Replica | None) -> LogProbs:
        check_fits(sequences, [1] * len(sequences), self.max_model_len, self._base.vocabulary)
        asks = adapter, [partial(Client.score, ids=ids) for ids in sequences]
        return self._loop.run(self._fleet.answer([asks], size=_SCORED_TOGETHER, only=only))

    def keep_probe(self, version: AdapterVersion, witness: Witness, noise: float) -> None:
        if not self.pulls:
            kept = self._names.folder / "probe" / "versions" / version.path.name
            shutil.copytree(version.path, kept, dirs_exist_ok=True)
            version = replace(version, path=kept)
        self._fleet.probe = self._served(version, witness.loud), witness, noise
        most = self._fleet.max_loras
        for replica in self._fleet.serving:
            slots = self._loop.run(slots_of(replica.client))
            if slots is not None and slots < most:
                fewer = f", or pass max_loras={slots}" if slots > 1 else ""
                said = f"{replica.url} has {slots} adapter slots for the {most} versions in use, and would swap them"
                warnings.warn(f"{said}: start it with --max-loras {most}{fewer}", stacklevel=2)

    def describe_base(self) -> BaseDescription:
        return self._base

    def read_base(self, shapes: Mapping[str, Sequence[int]]) -> list[BaseReading]:
        return self._loop.run(self._fleet.read_base(shapes))

    def close(self) -> None:
        """Unload this engine's versions from the servers, which go on. A second call does nothing."""
        self._opened.close()


class _Loop:
    """An event loop on a thread of its own, for callers in any thread; what they share is only ever touched in it."""

    def __init__(self) -> None:
        self._loop, self._ended = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._work, name="lora-grpo-servers", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._ended.wait())

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """The coroutine's result. Ctrl-C in the caller cancels it, and so does the end of the job of a worker here."""
        worker, future = working.get(), asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            while worker is not None and not wait([future], timeout=0.2).done:
                worker.look()
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what still runs, and end the thread."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()


def _check_choice(name: str, given: str, *known: str) -> None:
    if given not in known:
        raise ConfigError(f"{name}={given!r} must be one of {known}")
