"""`NativeSync`: from a live PEFT model to a proven version in the engine, and nothing merged on the way."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lora_grpo.adapters.files.disk import STAGING, digest_buffers
from lora_grpo.adapters.peft_form.checks import active_adapter, check_rank, check_same_dtype, check_servable
from lora_grpo.adapters.peft_form.export import RECIPE_FILE, Recipe, Weights, export_adapter, keep_tokenizer
from lora_grpo.adapters.peft_form.modules import keep_trainable, peft_model_of
from lora_grpo.adapters.peft_form.serving import ServingForm, weights_of
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion, Target, as_step
from lora_grpo.engines.base import Engine, LoadReceipt
from lora_grpo.engines.delivery.agreement import CANARY_NOISE, BaseMatch, CanaryReport, take_canary
from lora_grpo.engines.delivery.probe import ProbeReport, Proofs, prove
from lora_grpo.engines.wrapped import joint
from lora_grpo.errors import ConfigError, TrainingError
from lora_grpo.grpo.processes import Processes
from lora_grpo.rollback import RollbackReport, kept_state, load_as_it_is, roll_back
from lora_grpo.state import Training, capture_state, restore_state
from lora_grpo.types import Group


@dataclass(frozen=True, slots=True)
class PushReceipt:
    """One push: seconds by phase until the version can be sampled from (gather, write, check, load, prove, promote),
    adapter bytes, and how it was proven. `keeping_s` is what keeping the trainer's state and pruning took then."""

    version: AdapterVersion
    seconds: dict[str, float]
    adapter_bytes: int
    load: LoadReceipt
    keeping_s: float

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def metrics(self) -> dict[str, float]:
        return {f"sync/{phase}_s": seconds for phase, seconds in self.seconds.items()}


class NativeSync:
    """Publishes a PEFT model's adapter after each step and makes an engine serve it.

    The model may be wrapped (DDP, FSDP2, torch.compile). It is never merged, and its base is never changed. With an
    accelerator of several processes, all of them must call every method in the same order, except `close`, `export`
    and properties. The first process has the store and publishes. Of a sharded model only the adapter is gathered.
    If something fails in one process, all raise the same error, which names that process.

    >>> sync = NativeSync(model, engine, AdapterStore(archive="runs/own"), optimizer=optimizer)
    >>> first = sync.push(step=0)
    >>> second = sync.push(step=1)  # after a step of the optimizer
    >>> print(sync.rollback(to=first))
    rolled back from v2 to v1 (step 0): weights exact, ...
    """

    def __init__(
        self,
        model: torch.nn.Module,
        engine: Engine | None,
        store: AdapterStore | None,
        *,
        accelerator: Accelerator | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        keep_state: Callable[[AdapterVersion], bool] = lambda version: True,
        tokenizer: Any = None,
        proofs: Proofs | None = None,
    ) -> None:
        """Check that `engine` can serve everything about `model` correctly, and prove the path with a probe.

        With several processes, `store` is None in all but the first. Each process has its own in-process engine, which
        reads what the first process published; other engines belong to the first process only (None elsewhere).

        A rollback also restores `optimizer` and `scheduler`. `keep_state` says for which versions the exact trainer
        state is archived (several times an adapter's size), by default all. `tokenizer` goes into exports (default:
        the engine's). `proofs` were made with other adapters on the same engine and the same base tensors; see
        `prove`. `base_match` and `probe` hold the results (None for a fake engine). Raises `UnsupportedAdapter` for an
        adapter that cannot be served or a different base, and `DeliveryError` if the probe adapter does not arrive.
        """
        self.processes = Processes(accelerator)
        self.model, self._own_engine, self._store = model, engine, store
        self.engine = joint(engine, self.processes)
        self.optimizer, self.scheduler, self.keep_state = optimizer, scheduler, keep_state
        self.tokenizer = getattr(engine, "tokenizer", None) if tokenizer is None else tokenizer
        self.adapter = active_adapter(model)
        keep_trainable(model)
        check_rank(check_servable(model, self.adapter), self.engine.max_lora_rank)
        self._form = ServingForm(model, self.adapter, getattr(torch, self.engine.lora_dtype))
        self.adapter_bytes = self._form.nbytes
        """What a push moves: the adapter's tensors in the engine's dtype."""
        self._root, self._head = self.processes.first(lambda: (self.store.root, self.store.head))
        self._leased, self._kept = set[int](), list[int]()
        self.base_match: BaseMatch | None = None
        self.probe: ProbeReport | None = None
        if self.engine.proof != "none":
            base, home = self.engine.describe_base(), self._root / STAGING
            self.processes.each(lambda: check_same_dtype(model, base.dtype))
            given: Proofs = {} if proofs is None else proofs
            self.base_match, self.probe = prove(given, self._form, self.engine, self.processes, home, self._keep_probe)
        self.noise = 0.0 if self.probe is None else self.probe.noise
        self.last_receipt: PushReceipt | None = None
        self.processes.first(lambda: self.recipe.check(self.store))

    def push(self, step: int, *, extra: Mapping[str, Any] | None = None) -> AdapterVersion:
        """Publish the current adapter, load, prove and promote it; returns when it can be sampled from.

        With an archive, the exact trainer state is kept with the version (see `keep_state`), with `extra` (JSON) in it.
        If publishing, loading or proving fails, `HEAD` and the served version do not change. Raises `TrainingError` for
        non-finite weights, `NoRoom` or `StoreError` for the store, `DeliveryError` or `EngineError` for the engine.
        If keeping the state or pruning fails, it raises `StoreError`, but the version is promoted.
        """
        began = time.perf_counter()
        files = self.processes.each(self._form.files)
        gathered = time.perf_counter()
        version = self.processes.first(lambda: self._publish(files, as_step(step)))
        self.processes.each(lambda: self._check_equal(files, version))
        written = time.perf_counter()
        load = load_as_it_is(self.engine, version, self.model, self._form.held)
        loaded = time.perf_counter()
        try:
            self.processes.first(lambda: self.store.promote(version))
            self._head = version
        except BaseException:
            self.engine.unload(version)
            raise
        keeping = time.perf_counter()
        seconds = {"gather": gathered - began, "write": written - gathered, **load.seconds, "promote": keeping - loaded}
        self._lease_loaded()
        if self.processes.first(lambda: self.store.archive is not None and self.keep_state(version)):
            state = self.processes.each(lambda: capture_state(self.training, extra or {}))
            self.processes.first(lambda: self.store.archive_state(version, *state.to_files()))
        self.processes.first(lambda: self.store.prune())
        self.last_receipt = PushReceipt(version, seconds, self.adapter_bytes, load, time.perf_counter() - keeping)
        return version

    def rollback(self, to: Target) -> RollbackReport:
        """Take engine and trainer back to an earlier version: its number, "parent", "best", "best:METRIC" or itself.

        The next push gets a new number, with that version as parent. If any part fails, nothing changes. Raises
        `UnknownVersion`, `StoreCorrupt`, `DeliveryError` or `EngineError`.
        """
        self.processes.each(self._form.require_open)
        try:
            report = roll_back(lambda: self.store, self.engine, self.training, to)
            self._head = report.version
        finally:
            self._lease_loaded()
        if self.optimizer is None:
            kept = f"its moments are those of {report.left} still; pass optimizer= (and scheduler=) to restore them too"
            warnings.warn(f"{report}: NativeSync knows no optimizer, so {kept}", RuntimeWarning, stacklevel=2)
        return report

    def restore_trainer(self, version: AdapterVersion) -> bool:
        """Restore only the trainer to its state when `version` was published; False if that was not kept."""
        state = kept_state(lambda: self.store, version, self.training)
        if state is not None:
            restore_state(state, self.training)
        return state is not None

    def adopt(self, version: AdapterVersion) -> bool:
        """Serve `version` and go on from it, the model being that version already; False when it is another."""
        if not self.holds(version):
            return False
        version = self.processes.first(lambda: self.store.restore(version))
        load_as_it_is(self.engine, version, self.model, self._form.held)
        self.processes.first(lambda: self.store.promote(version))
        self._head = version
        self._lease_loaded()
        return True

    def holds(self, version: AdapterVersion) -> bool:
        """Whether the model is what `version` serves, to the bit."""
        files = self._form.files()
        return self.processes.first(lambda: digest_buffers(files) == version.digest)

    def serve(self) -> None:
        """Load `head` into the engine again, after other versions took its place; the model has its weights."""
        load_as_it_is(self.engine, self.head, self.model)
        self._lease_loaded()

    def close(self) -> None:
        """Have the engine forget this store's versions, and let go of their files."""
        self._form.close()
        if (engine := self._own_engine) is not None:
            for version in engine.loaded():
                if version.path.is_relative_to(self._root):
                    engine.unload(version)
        for number in [*self._leased, *self._kept] if self._store is not None else ():
            self.store.release(number)
        self._leased, self._kept = set(), []

    @property
    def store(self) -> AdapterStore:
        """Raises `ConfigError` in a process that has none."""
        if self._store is None:
            raise ConfigError("only the first process has the store: pass store= there and use it there")
        return self._store

    @property
    def training(self) -> Training:
        """The parts that a trainer state is made of: model, optimizer, scheduler, random state."""
        return Training(self.model, self._form.modules, self.optimizer, self.scheduler, self.processes)

    def _check_equal(self, files: Mapping[str, Any], version: AdapterVersion) -> None:
        if self.processes.index and digest_buffers(files) != version.digest:
            raise TrainingError(f"the adapter here is not the {version} that the first process published: they drifted")

    def _lease_loaded(self) -> None:
        """Files outlive their readers: what an engine holds stays on tmpfs, what all let go of may be pruned."""
        own = {version.number for version in self.engine.loaded() if version.path.is_relative_to(self._root)}
        loaded = set().union(*self.processes.gather(own))
        if self._store is not None:
            for number in loaded - self._leased:
                self._store.acquire(number)
            for number in self._leased - loaded:
                self._store.release(number)
        self._leased = loaded

    def _publish(self, files: Mapping[str, Sequence[Any]], step: int) -> AdapterVersion:
        if (head := self.store.head) != self._head:
            # Another one publishes to this store.
            found = f"HEAD in {self._root} is {head or 'nowhere'}, but this sync left it at {self._head or 'nowhere'}"
            raise ConfigError(f"{found}: give each model a store of its own, and go back with sync.rollback")
        if self.last_receipt is None and self.store.archive is not None:
            self.recipe.write(self.store.archive / RECIPE_FILE)
            keep_tokenizer(self.tokenizer, self.store.archive)
        return self.store.publish(files, step=step)

    @property
    def recipe(self) -> Recipe:
        """What a plain PEFT folder needs in addition to a version's files."""
        return Recipe.of(peft_model_of(self.model), self.adapter, self._form.modules)

    def export(self, version: Target, directory: Path) -> Weights:
        """Write `version` as a plain PEFT folder with its own alpha, as `PeftModel.from_pretrained` loads it.

        Call it in the process that has the store. Returns "exact" if the state is kept, else "rounded".
        """
        return export_adapter(self.store, version, self.recipe, directory, self.tokenizer)

    def canary(
        self, groups: Sequence[Group], *, version: Target | None = None, temperature: float = 1.0, batch_rows: int = 8
    ) -> CanaryReport:
        """Compare the sampler's log-probs with the model's current ones; call it before the optimizer steps.

        `groups` must come from the last pushed version, at `temperature`, or from an earlier `version`, whose weights
        the model then gets for this call. The model computes `batch_rows` completions at a time. Raises
        `DeliveryError` if they do not fit.
        """
        if self.probe is None:
            raise ConfigError(f"{type(self.engine).__name__} proves nothing; a canary needs a real engine")
        named: Target = self.head if version is None else version
        version = named if isinstance(named, AdapterVersion) else self.processes.first(lambda: self.store.get(named))
        rows = [(group.prompt_token_ids, made) for group in groups for made in group.completions]
        if stale := {made.version for _, made in rows} - {version.number}:
            raise ConfigError(f"completions of versions {stale} cannot be checked against {version}; pass its own")
        weights = nullcontext() if version == self.head else weights_of(version, self._form.modules)
        limits = {"known_noise": self.noise, "most_noise": CANARY_NOISE * self.probe.noise}
        report = take_canary(self.model, self.engine.logprobs, rows, weights, temperature, batch_rows, **limits)
        self.noise = report.noise
        self.processes.each(lambda: report.check(version))
        return report

    @property
    def head(self) -> AdapterVersion:
        """The version that was pushed last, or rolled back to. Raises `ConfigError` before the first push."""
        head = self._head if self._store is None else self._store.head
        if head is None:
            raise ConfigError("nothing was pushed yet; call sync.push(step) first")
        return head

    def _keep_probe(self, files: Mapping[str, Any]) -> AdapterVersion:
        """Put the probe into the store, of step -1 and never promoted, for servers to pull; it stays for restarts."""
        version = self.processes.first(lambda: self.store.acquire(self.store.publish(files, step=-1, parent=None)))
        self._kept.append(version.number)
        return version
