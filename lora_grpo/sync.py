"""`NativeSync`: from a live PEFT model to a proven version in the engine, and nothing merged on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_grpo.adapters.checks import active_adapter, check_rank, check_servable
from lora_grpo.adapters.digest import digest_buffers
from lora_grpo.adapters.export import RECIPE_FILE, Recipe, Weights, export_adapter
from lora_grpo.adapters.peft_format import ServingForm, clean_name, peft_model_of
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import Engine, LoadReceipt
from lora_grpo.engines.delivery.base_match import check_same_base, describe
from lora_grpo.engines.delivery.canary import CanaryReport, judge
from lora_grpo.engines.delivery.probe import ProbeReport, run_probe
from lora_grpo.errors import ConfigError, DeliveryError
from lora_grpo.rollback import RollbackReport, Target, kept_state, roll_back
from lora_grpo.scoring import mean_abs_difference, teacher_logprobs
from lora_grpo.state import capture_state, restore_state
from lora_grpo.types import Completion, Group


@dataclass(frozen=True, slots=True)
class PushReceipt:
    """One push: seconds by phase until the version can be sampled from (gather, write, check, load, prove, promote),
    adapter bytes, and how it was proven. `keeping_s` is what keeping the trainer's state and pruning took after that.
    """

    version: AdapterVersion
    seconds: dict[str, float]
    adapter_bytes: int
    load: LoadReceipt
    keeping_s: float

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


class NativeSync:
    """Publishes a PEFT model's adapter and has an engine serve it, step after step.

    The model may be wrapped (DDP, FSDP2, torch.compile); it is never merged and its base is never touched.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        store: AdapterStore,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        keep_state: Callable[[AdapterVersion], bool] = lambda version: True,
    ) -> None:
        """Check that everything about `model` can be served faithfully by `engine`, and prove the path with a probe.

        `optimizer` and `scheduler` are restored with the weights on a rollback; `keep_state` says of which versions
        the exact trainer state is archived (several times an adapter's size), by default all. `probe` holds the
        probe's figures (None for an engine that is a fake and says so). Raises `UnsupportedAdapter` for what cannot be
        served or another base, `DeliveryError` when the probe does not arrive.
        """
        self.model, self.engine, self.store = model, engine, store
        self.optimizer, self.scheduler, self.keep_state = optimizer, scheduler, keep_state
        self.adapter = active_adapter(model)
        check_rank(check_servable(model, self.adapter), engine.max_lora_rank)
        self._form = ServingForm(model, self.adapter, getattr(torch, engine.lora_dtype))
        self.probe = None if engine.proof == "none" else self._prove_path()
        self.noise = 0.0 if self.probe is None else self.probe.noise
        self.last_receipt: PushReceipt | None = None
        self._leased: set[int] = set()
        if store.archive is not None:
            self.recipe.write(store.archive / RECIPE_FILE)

    def push(self, step: int, *, extra: Mapping[str, Any] | None = None) -> AdapterVersion:
        """Publish the adapter as it is now, load it, prove it, promote it; returns when it can be sampled from.

        With an archive the trainer's exact state is kept with the version (see `keep_state`), and `extra` (JSON) in it.

        A failure leaves `HEAD` and what the engine serves as they were. Raises `TrainingError` for non-finite
        weights, `NoRoom` or `StoreError` for the store, `DeliveryError` or `EngineError` for the engine.
        """
        marks = [time.perf_counter()]
        files = self._form.files()
        marks.append(time.perf_counter())
        version = self.store.publish(files, step=step)
        marks.append(time.perf_counter())
        load = self.engine.load(version)
        promoting = time.perf_counter()
        self.store.promote(version)
        seconds = {
            "gather": marks[1] - marks[0],
            "write": marks[2] - marks[1],
            **load.seconds,
            "promote": time.perf_counter() - promoting,
        }
        keeping = time.perf_counter()
        self._lease_loaded()
        if self.store.archive is not None and self.keep_state(version):
            state = capture_state(self._form.modules, self.optimizer, self.scheduler, extra or {})
            self.store.archive_state(version, *state.to_files())
        self.store.prune()
        self.last_receipt = PushReceipt(version, seconds, self._form.nbytes, load, time.perf_counter() - keeping)
        return version

    def rollback(self, to: Target) -> RollbackReport:
        """Engine and trainer are back on an earlier version: its number, "parent" or "best:METRIC".

        The next push gets a new number with that version as parent. If any part fails, nothing has changed. Raises
        `UnknownVersion`, `StoreCorrupt`, `DeliveryError` or `EngineError`.
        """
        try:
            return roll_back(self.store, self.engine, self._form.modules, self.optimizer, self.scheduler, to)
        finally:
            self._lease_loaded()

    def restore_trainer(self, version: AdapterVersion) -> bool:
        """Put only the trainer back as it was when `version` was published; False where its state was not kept."""
        state = kept_state(self.store, version, self._form.modules)
        if state is not None:
            restore_state(state, self._form.modules, self.optimizer, self.scheduler)
        return state is not None

    def adopt(self, version: AdapterVersion) -> bool:
        """Serve `version` and go on from it, the model being that version already; False when it is another."""
        if digest_buffers(self._form.files()) != version.digest:
            return False
        version = self.store.restore(version)
        self.engine.load(version)
        self.store.promote(version)
        self._lease_loaded()
        return True

    def close(self) -> None:
        """Have the engine forget this store's versions, and let go of their files."""
        for version in self.engine.loaded():
            if version.path.is_relative_to(self.store.root):
                self.engine.unload(version)
        self._lease_loaded()

    def _lease_loaded(self) -> None:
        """Files outlive their readers: what the engine holds stays on tmpfs, what it let go of may be pruned."""
        own = (version for version in self.engine.loaded() if version.path.is_relative_to(self.store.root))
        loaded = {version.number for version in own}
        for number in loaded - self._leased:
            self.store.acquire(number)
        for number in self._leased - loaded:
            self.store.release(number)
        self._leased = loaded

    @property
    def adapter_bytes(self) -> int:
        """Bytes that a push moves: the adapter's tensors in the engine's dtype."""
        return self._form.nbytes

    @property
    def recipe(self) -> Recipe:
        """What a plain PEFT folder needs beyond a version's files."""
        return Recipe.of(peft_model_of(self.model).peft_config[self.adapter], self._form.modules)

    def export(self, version: AdapterVersion, directory: Path) -> Weights:
        """Write `version` as a plain PEFT folder with its own alpha, as `PeftModel.from_pretrained` loads it.

        "exact" where its trainer state is kept, else "rounded" to the serving dtype.
        """
        return export_adapter(self.store, version, self.recipe, directory)

    def canary(self, groups: Sequence[Group], *, temperature: float = 1.0) -> CanaryReport:
        """Compare sampler log-probs with the model's own, as it is now; call it before the optimizer steps.

        `groups` must come from the version just pushed, at `temperature`. Raises `DeliveryError` when they do not fit.
        """
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature}: greedy completions carry log-probs at 1; pass temperature=1")
        if self.probe is None:
            raise ConfigError(f"{type(self.engine).__name__} proves nothing; a canary needs a real engine")
        rows = [(group.prompt_token_ids, completion) for group in groups for completion in group.completions]
        stale = {c.version for _, c in rows} - {self.head.number}
        if stale:
            raise ConfigError(f"completions of versions {stale} cannot be checked against {self.head}; pass its own")
        sequences = [[*prompt, *completion.token_ids] for prompt, completion in rows]
        sampler = _sampled((completion.logprobs for _, completion in rows), rows)
        if not any(sampler):
            raise ConfigError("the groups hold no sampled token, so there is nothing to compare; pass completions")
        policy = _sampled(teacher_logprobs(self.model, sequences, temperature=temperature), rows)
        with peft_model_of(self.model).disable_adapter():
            base = _sampled(teacher_logprobs(self.model, sequences, temperature=temperature), rows)
        gap, signal = mean_abs_difference(policy, sampler), mean_abs_difference(policy, base)
        noise = self.noise = self._noise(sequences, [len(prompt) for prompt, _ in rows]) / temperature
        report = CanaryReport(judge(gap, signal, noise), gap, signal, noise, sum(map(len, sampler)))
        if report.verdict == "failed":
            raise DeliveryError(f"{report}: the completions were not made by {self.head}")
        return report

    def _noise(self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> float:
        """Mean |engine - trainer| log-prob of the base on these completions: what they differ by with nothing to tell.

        The last token stays out, since the engine needs room for one more.
        """
        cut = [ids[:-1] for ids in sequences]
        served = self.engine.logprobs(cut, adapter=None)
        with peft_model_of(self.model).disable_adapter():
            own = teacher_logprobs(self.model, cut)
        served, own = ([row[n - 1 :] for row, n in zip(rows, prompt_lengths, strict=True)] for rows in (served, own))
        return mean_abs_difference(served, own) if any(served) else self.noise

    @property
    def head(self) -> AdapterVersion:
        """The version that was pushed last, or rolled back to. Raises `ConfigError` before the first push."""
        head = self.store.head
        if head is None:
            raise ConfigError("nothing was pushed yet; call sync.push(step) first")
        return head

    def _prove_path(self) -> ProbeReport:
        base = self.engine.describe_base()
        check_same_base(base, self._describe_trainer(base.dtype))
        return run_probe(self.model, self._form, self.engine, self.store.root.parent)

    def _describe_trainer(self, dtype: str) -> Any:
        base = peft_model_of(self.model).base_model.model
        names = ((clean_name(name).replace(".base_layer.", "."), p) for name, p in base.named_parameters())
        return describe(base.config, names, getattr(torch, dtype))


def _sampled(logp: Iterable[Sequence[float]], rows: Sequence[tuple[Any, Completion]]) -> list[list[float]]:
    """Of each row's log-probs, those of the completion's tokens that the policy sampled."""
    return [
        [value for value, own in zip(row[len(row) - len(mask) :], mask, strict=True) if own]
        for row, (_, completion) in zip(logp, rows, strict=True)
        for mask in [completion.token_mask or (True,) * len(completion.token_ids)]
    ]
