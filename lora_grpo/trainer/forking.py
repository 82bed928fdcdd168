"""`fork`: a new run that starts from any version of another; and `take_over`: a run that goes on from another's."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.peft_form.export import RECIPE_FILE, TOKENIZER, Recipe, Weights, adapter_tensors
from lora_grpo.adapters.peft_form.files import PREFIX
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.rollbacks import ROLLBACKS_FILE, of_trainer
from lora_grpo.adapters.version import PEFT_FILES, AdapterVersion, Target
from lora_grpo.config import RunConfig
from lora_grpo.config_file import RESOLVED_FILE, load_config, save_config, with_settings
from lora_grpo.errors import ConfigError, StoreCorrupt
from lora_grpo.metrics.log import METRICS_FILE, Record, RunLog, history, read_metrics
from lora_grpo.reference import REFERENCE_FILE, keep_reference
from lora_grpo.state import TrainerState, capture_state, named_weights, read_state, restore_state
from lora_grpo.trainer import loop
from lora_grpo.trainer.build import check_same_adapter
from lora_grpo.trainer.rollouts import EVALUATIONS
from lora_grpo.trainer.run import Run


@dataclass(frozen=True, slots=True)
class Fork:
    """`run` was made from `origin`, a version of the run `source`: its first version has the same number and bytes. Its
    trainer starts after `step`, from the source's own weights ("exact"), or those "rounded" to the serving dtype."""

    run: Path
    source: Path
    origin: AdapterVersion
    step: int
    weights: Weights

    def __str__(self) -> str:
        return f"{self.run} starts from {self.origin} of {self.source}, after step {self.step}, weights {self.weights}"


def fork(
    run: str | Path, version: Target, new: str | Path, settings: Sequence[str] = (), *, weights_only: bool = False
) -> Fork:
    """Make the run directory `new` from a version of `run`, which may be live and stays as it is.

    When you resume it, it goes on as `run` did (bit for bit if `run` repeats so): weights, optimizer, schedule,
    random state, seeds, data position and metrics are the same. `settings` such as "grpo.learning_rate=3e-5" apply from
    then on; with another `grpo.seed` or other `data` the prompts start from the beginning. Earlier versions are not
    copied, so the new run cannot roll back beyond its first one.

    `weights_only` starts at step 0 from the version's weights, with a new optimizer, schedule and order of prompts.
    Without it, a version without a kept trainer state is refused; the error names the nearest one that has a state.

    Raises `ConfigError`, `UnknownVersion` or `StoreError`; then nothing is left at `new`.

    >>> print(fork("runs/mine", "best", "runs/other"))
    runs/other starts from v2 of runs/mine, after step 1, weights exact
    """
    source, target = Path(run), Path(new)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already; name a new directory for the fork of {source}")
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{target} is inside the run {source}; name a directory outside it for the fork")
    with AdapterStore(archive=source, readonly=True) as store:
        origin = store.get(version)
        config = _config(source, target, settings)
        if weights_only:
            state, weights = _weights_only(store, origin, source, 0 if config is None else config.grpo.seed)
        else:
            state, weights = _kept_state(store, origin, source, config), "exact"
        made = Fork(target, source, origin, 0 if weights_only else origin.step, weights)
        with disk.reported(f"making {target}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            around = tempfile.TemporaryDirectory(prefix=".fork-", dir=target.parent, ignore_cleanup_errors=True)
            with around as folder:
                staged = Path(folder) / target.name
                _fill(staged, store, made, state, begins=weights_only)
                if config is not None:
                    save_config(config, staged)
                os.rename(staged, target)
    return made


def _config(source: Path, target: Path, settings: Sequence[str]) -> RunConfig | None:
    """The new run's settings; None for a run without any, whose trainer is built in Python."""
    for text in settings:
        if text.partition("=")[0].strip() == "output_dir":
            raise ConfigError(f"{text}: the fork's directory is its argument NEW, here {target}; leave output_dir out")
    if not (source / RESOLVED_FILE).is_file():
        if not settings:
            return None
        fix = f"fork it without settings, and give {' '.join(settings)} to the GRPOTrainer that resumes the fork"
        raise ConfigError(f"{source} has no {RESOLVED_FILE}: {fix}")
    before = load_config(source)
    config = with_settings(before.replace(store_root=None, output_dir=str(target)), settings, str(source))
    check_same_adapter(before.lora, config.lora, source)
    if before.model.name != config.model.name:
        told = f"model.name={config.model.name!r}: the versions of {source} are adapters of {before.model.name!r}"
        raise ConfigError(f"{told}; leave it as it was, or begin another run")
    return config


def _kept_state(store: AdapterStore, origin: AdapterVersion, source: Path, config: RunConfig | None) -> TrainerState:
    files = store.load_state(origin.number)
    if files is None:
        nearest = min(store.states, key=lambda number: abs(number - origin.number), default=None)
        there = "nor of any other version" if nearest is None else f"the nearest version that has one is v{nearest}"
        told = f"{source} kept no trainer state of {origin}, so a fork cannot be exact; {there}"
        raise ConfigError(f"{told}; --weights-only (weights_only=True) begins a new run from the weights of {origin}")
    state = read_state(files)
    if config is not None and of_trainer(state.meta["extra"]):
        before = load_config(source)
        if (before.grpo.seed, before.data) != (config.grpo.seed, config.data):
            state.meta["extra"]["sampler"] = None
    return state


def _weights_only(store: AdapterStore, origin: AdapterVersion, source: Path, seed: int) -> tuple[TrainerState, Weights]:
    """The state of a run that has not stepped yet, and whose adapter is what `origin` is."""
    named, weights = adapter_tensors(store, origin, Recipe.read(source))
    tensors = {"rng/cpu": torch.Generator().manual_seed(seed).get_state()}
    for name, tensor in named.items():
        path, _, kind = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        tensors[f"weights/{path}.{kind}"] = tensor
    extra = {"steps_done": 0, "rollbacks": 0, "without_signal": 0, "sampler": None}
    return TrainerState(tensors, {"param_groups": None, "optimizer": {}, "scheduler": None, "extra": extra}), weights


def _fill(staged: Path, store: AdapterStore, made: Fork, state: TrainerState, *, begins: bool) -> None:
    """With what a resume reads. A run that `begins` has no history, and its own start is the KL's reference."""
    source, origin = made.source, made.origin
    staged.mkdir()
    with store.reading(origin) as folder:
        files = {name: [(folder / name).read_bytes()] for name in PEFT_FILES}
    if disk.digest_buffers(files) != origin.digest:
        raise StoreCorrupt(f"{folder} does not hold what was published as {origin}; see lora-grpo verify")
    # Numbering goes on above what a run directory says was given out.
    (staged / "NUMBERS").write_text(f"{origin.number - 1}\n")
    with AdapterStore(archive=staged) as new:
        version = new.publish(files, step=made.step, parent=None)
        new.archive_state(version, *state.to_files())
        new.promote(version)
        new.record(version, **store.metrics(origin) | taken_from(source, origin))
    _copy(source, staged, RECIPE_FILE, TOKENIZER)
    if begins:
        keep_reference(staged, {name: tensor for name, tensor in state.tensors.items() if name.startswith("weights/")})
    else:
        _copy(source, staged, REFERENCE_FILE, f"{EVALUATIONS}/{disk.folder_name(origin.number)}.json")
        if of_trainer(state.meta["extra"]):
            lines = (disk.read_small(source / ROLLBACKS_FILE) or b"").splitlines(keepends=True)
            (staged / ROLLBACKS_FILE).write_bytes(b"".join(lines[: state.meta["extra"]["rollbacks"]]))
        if (source / METRICS_FILE).is_file():
            records = history(_until(origin, read_metrics(source)))
            _log(staged, [record for record in records if record["event"] in ("step", "evaluation")])
    _log(staged, [{"event": "message", "text": f"forked: {made}"}])


def taken_from(source: Path, origin: AdapterVersion) -> dict[str, str | int]:
    return {"from/run": str(source), "from/version": origin.number, "from/digest": origin.digest}


def _copy(source: Path, staged: Path, *names: str) -> None:
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, staged / name)
        elif (source / name).exists():
            (staged / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, staged / name)


def _until(origin: AdapterVersion, records: list[Record]) -> list[Record]:
    """The records of a run as it stood when it had published and measured `origin`."""
    before = [record for record in records if record["time"] <= origin.created_at]
    after = [record for record in records if record["time"] > origin.created_at]
    steps = [record for record in after if record["event"] == "step"][:1]
    measured = [record for record in after if record["event"] == "evaluation" and record["version"] == origin.number]
    return [*before, *(record for record in steps if record["step"] == origin.step), *measured]


def _log(staged: Path, records: Sequence[Record]) -> None:
    log = RunLog(staged / METRICS_FILE)
    for record in records:
        log.append(record["event"], **record)
    log.close()


def take_over(loser: Run, winner: Run) -> AdapterVersion:
    """`loser` stands where `winner` stands: its weights, optimizer, schedule and step, as a new version of the loser.

    Its parent is the loser's own last one; the journal holds `from/run`, `from/version` and `from/digest`. Seeds, data
    position and random state stay the loser's. Both are between two steps. One that a kill cut short, after its version
    was there, is only completed. Raises `ConfigError`, before anything has changed, for an adapter of another form."""
    if loser is winner:
        raise ConfigError(f"{loser.run_dir} cannot take over from itself; give two runs")
    taken = winner.version
    if (loser.version.digest, loser.version.step) != (taken.digest, winner.steps_done):
        _publish_as(loser, winner)
    loser.take_up(winner.steps_done, without_signal=winner.without_signal)
    loser.store.record(loser.version, **taken_from(winner.run_dir, taken))
    return loser.version


def _publish_as(loser: Run, winner: Run) -> None:
    trainings = (loser.sync.training, winner.sync.training)
    ours, theirs = ([(name, ab.shape) for name, ab in named_weights(one.modules)] for one in trainings)
    if ours != theirs:
        told = f"{loser.run_dir} cannot take over from {winner.run_dir}: their adapters differ in rank or layers"
        raise ConfigError(f"{told}; give both runs the same lora settings")
    before, state = (capture_state(one, {}) for one in trainings)
    tensors = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("rng/")}
    keep_state = loser.sync.keep_state
    try:
        restore_state(TrainerState(tensors, state.meta), loser.sync.training)
        # A resume has to find it, whatever states retention asks for.
        loser.sync.keep_state = lambda version: True
        loop.publish(loser, winner.steps_done)
    except BaseException:
        restore_state(before, loser.sync.training)
        raise
    finally:
        loser.sync.keep_state = keep_state
