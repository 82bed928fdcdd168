"""`Sweep`: the trials of a plan as a population, selection after each round, and what came of it."""

import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from lora_grpo.adapters.files import disk
from lora_grpo.adapters.peft_form.export import Recipe, export_adapter
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.config import RunConfig
from lora_grpo.config_file import save_config, setting, with_settings
from lora_grpo.engines.base import Engine
from lora_grpo.errors import ConfigError
from lora_grpo.metrics.curves import plot_curves
from lora_grpo.metrics.log import Record, RunLog, read_metrics, run_history
from lora_grpo.trainer.build import member_spec
from lora_grpo.trainer.forking import take_over
from lora_grpo.trainer.population.member import Member
from lora_grpo.trainer.population.population import Population
from lora_grpo.trainer.preflight import MemberSpec
from lora_grpo.trainer.sweeping.plan import SWEEP_FILE, SweepPlan, Trial, halving_losers, perturbed, score, takeovers

LOG_FILE, SUMMARY_FILE, CURVES_FILE, BEST = "sweep.jsonl", "summary.json", "curves.png", "best-adapter"
LOSE_OR_WIN = 0.25  # the share of the members that lose at a take-over, and of those that win


class Sweep:
    """Runs what a plan says, in its directory, and goes on where it was stopped, as `SWEEP/sweep.jsonl` tells: where
    each round began, what was decided (rung, take-over) and how each member ended."""

    def __init__(self, plan: SweepPlan, *, engine: Engine | None = None, resume: bool = False) -> None:
        """Raises `ConfigError` for a directory that holds something else. An `engine` that is given stays open."""
        self.plan, self._engine, self._resumed = plan, engine, resume
        if not resume:
            plan.write()
        records = read_metrics(plan.directory / LOG_FILE) if (plan.directory / LOG_FILE).is_file() else []
        self._log = RunLog(plan.directory / LOG_FILE)
        self._ended: dict[str, dict[str, Any]] = {}
        self._judged, self._taken, self._evolved = set[tuple[str, int]](), set[str](), set[int]()
        self._cut_short: dict[str, list[int]] | None = None
        for record in records:
            self._go_over(record)
        self._members: dict[str, Member] = {}
        self._past: dict[str, tuple[Sequence[Record], Sequence[Record]]] = {}

    def run(self, show: Callable[[list[dict[str, Any]]], None] = lambda rows: None) -> dict[str, Any]:
        """To the end; `show` is given the members' rows, now and after each round. Returns the summary.

        Ctrl-C leaves every member's run as it stands, to be gone on with. Raises what a population raises; refused
        before any member began, it leaves the directory as it was."""
        evolves, ended = self.plan.evolve_every is not None, self._ended
        # What failed may be brought back by a take-over.
        waiting = [one for one in self.plan.trials if one.name not in ended or (evolves and self._failed(one.name))]
        try:
            show(self.rows())
            if any(trial.name not in self._ended for trial in waiting):
                self._run_population([self._spec(trial) for trial in waiting], show)
            return self._finish()
        except ConfigError:
            directory = self.plan.directory
            # The corrected command may have the directory, unless a member has begun.
            if not self._resumed and not any((directory / trial.name).exists() for trial in self.plan.trials):
                for name in (SWEEP_FILE, LOG_FILE):
                    (directory / name).unlink(missing_ok=True)
                with suppress(OSError):
                    directory.rmdir()
            raise
        finally:
            self._log.close()

    def _spec(self, trial: Trial) -> MemberSpec:
        try:
            return member_spec(self.plan.config(trial), resume=True)
        except ConfigError as error:
            raise ConfigError(f"member {trial.name}: {error}") from error

    def _note(self, event: str, **fields: Any) -> None:
        self._log.append(event, **fields)
        self._go_over({"event": event, **fields})

    def _go_over(self, record: dict[str, Any]) -> None:
        match record["event"]:
            case "ended":
                self._ended[record["name"]] = record
            case "rung" if record["goes_on"]:
                self._judged.add((record["name"], record["rung"]))
            case "take-over":
                self._taken.add(record["name"])
            case "round":
                self._cut_short = record["began"]
            case "evolved":
                self._evolved.add(record["step"])
                self._ended = {name: ended for name, ended in self._ended.items() if name not in self._taken}
                self._taken.clear()

    def _failed(self, name: str) -> bool:
        return self._ended.get(name, {}).get("state") == "failed"

    def rows(self) -> list[dict[str, Any]]:
        return [self._row(trial) for trial in self.plan.trials]

    def _run_population(self, specs: Sequence[MemberSpec], show: Callable[[list[dict[str, Any]]], None]) -> None:
        plan = self.plan
        settings: dict[str, Any] = {"engine": self._engine, "engine_config": plan.settings.engine}
        settings["at_once"] = plan.at_once or (len(specs) if plan.evolve_every else "fitting")
        with Population(plan.settings.model, specs, **settings) as population:
            population.resume()
            self._members = {member.name: member for member in population.members}
            for name in self._members.keys() & self._ended.keys():
                population.stop(self._members[name], "it failed before; a take-over may bring it back")
            for _ in population.rounds(self._begin_round):
                self._halve(population)
                self._note_ends()
                self._evolve(population)
                show(self.rows())
            self._note_ends()

    def _begin_round(self, running: list[Member]) -> list[Member]:
        """Which members make a step: all, but where a kill came within a round, those alone that had not made it."""
        # A take-over moves a member to the end of the population.
        by_name = sorted(running, key=lambda member: member.name)
        stand = {member.name: [member.runs.steps_done, member.runs.rollbacks] for member in by_name}
        began, self._cut_short = self._cut_short, None
        if began is not None:
            return [member for member in running if began.get(member.name) == stand[member.name]]
        self._log.append("round", began=stand)
        return running

    def _note_ends(self) -> None:
        for name, member in self._members.items():
            if member.state in ("finished", "stopped", "failed") and name not in self._ended:
                self._note("ended", name=name, state=member.state, why=member.why)

    def _halve(self, population: Population) -> None:
        for rung in self.plan.rungs:
            arrived = [m for m in population.running if _step(m) >= rung and (m.name, rung) not in self._judged]
            if not arrived:
                continue
            found = {trial.name: score(self._known(trial.name)[0], rung) for trial in self.plan.trials}
            scores = {name: value for name, value in found.items() if value is not None}
            losers = halving_losers(scores, self.plan.keep)
            for member in arrived:
                goes_on, value = member.name not in losers, scores[member.name]
                self._note("rung", name=member.name, rung=rung, score=value, goes_on=goes_on, of=len(scores))
                if not goes_on:
                    kept = f"the best {len(scores) - len(losers)} of {len(scores)}"
                    population.stop(member, f"rung at step {rung}: reward {value:.3f} is not among {kept}")

    def _evolve(self, population: Population) -> None:
        """`evolved` is written last: without it all is decided again, to the same end, and what was done is kept."""
        running = {member.name: member for member in population.running}
        step = min(map(_step, running.values()), default=0)
        if self.plan.evolve_every is None or not step or step % self.plan.evolve_every or step in self._evolved:
            return
        found = {name: score(self._known(name)[0], step) for name in running}
        found |= {name: -math.inf for name in self._ended if self._failed(name)}
        scores = {one.name: value for one in self.plan.trials if (value := found.get(one.name)) is not None}
        draw = random.Random(f"{self.plan.seed} {step}")
        for loser, winner in takeovers(scores, LOSE_OR_WIN, draw):
            self._take_over(population, loser, running[winner], draw)
        self._note("evolved", step=step)

    def _take_over(self, population: Population, name: str, winner: Member, draw: random.Random) -> None:
        before, followed = self._settings(name), self._settings(winner.name)
        changed = [f"{key}={perturbed(setting(followed, key), draw)}" for key in self.plan.perturb]
        config = with_settings(before, changed, f"member {name}")
        if self._failed(name):
            self._begin_again(population, name, before)
        loser, taken = self._members[name], winner.runs.version
        if loser.state != "running":
            return
        with loser.turn():
            version = take_over(loser.runs, winner.runs)
        save_config(config, loser.run_dir)
        population.stop(loser, f"takes over {taken} of {winner.name}, {' '.join(changed) or 'settings as they were'}")
        self._begin_again(population, name, config)
        if name not in self._taken:
            origin = {"run": winner.name, "version": taken.number, "digest": taken.digest}
            found = {"version": version.number, "settings": changed, "from": origin}
            self._note("take-over", name=name, step=version.step, **found)

    def _begin_again(self, population: Population, name: str, config: RunConfig) -> None:
        population.members.remove(self._members[name])
        self._members[name] = population.add(member_spec(config, resume=True))
        population.start_waiting()

    def _settings(self, name: str) -> RunConfig:
        member = self._members.get(name)
        trial = next(trial for trial in self.plan.trials if trial.name == name)
        return self.plan.config(trial) if member is None or member.spec.settings is None else member.spec.settings

    def _known(self, name: str) -> tuple[Sequence[Record], Sequence[Record]]:
        """A member's steps and evaluations, those of earlier sessions included."""
        member, comparable = self._members.get(name), self.plan.comparable
        if member is not None and member.history:
            self._past.pop(name, None)
            return comparable(member.history), comparable([result.metrics for result in member.evaluations])
        if name not in self._past:
            records = run_history(self.plan.directory / name)
            steps, evaluations = ([one for one in records if one["event"] == kind] for kind in ("step", "evaluation"))
            self._past[name] = comparable(steps), comparable(evaluations)
        return self._past[name]

    def _row(self, trial: Trial) -> dict[str, Any]:
        member, settings = self._members.get(trial.name), self._settings(trial.name)
        steps, held_out = self._known(trial.name)
        ended = self._ended.get(trial.name, {})
        swept = [text.partition("=")[0] for text in trial.settings]
        return {
            "member": trial.name,
            "state": ended.get("state") or (member.state if member else "waiting"),
            "step": steps[-1]["step"] if steps else 0,
            "reward": score(steps, steps[-1]["step"]) if steps else None,
            "held_out": held_out[-1]["reward"] if held_out else None,
            "why": ended.get("why"),
            **{key: setting(settings, key) for key in dict.fromkeys([*swept, *self.plan.perturb])},
        }

    def _finish(self) -> dict[str, Any]:
        rows, directory = self.rows(), self.plan.directory
        curves = {row["member"]: steps for row in rows if (steps := self._known(row["member"])[0])}
        stepped = [row for row in rows if row["reward"] is not None]
        finished = [row for row in stepped if row["state"] == "finished"] or stepped
        # By held-out reward; where not all have one, by that of the last steps.
        by = "held_out" if all(row["held_out"] is not None for row in finished) else "reward"
        best = max(finished, key=lambda row: row[by] if math.isfinite(row[by]) else -math.inf, default={})
        summary = {"best": best.get("member"), "reward": best.get("reward"), "held_out": best.get("held_out")}
        summary |= {"steps": sum(map(len, curves.values())), "members": rows, "adapter": None}
        if best:
            plot_curves(curves, directory / CURVES_FILE, best["member"])
            # The rewards of one run's versions cannot be compared where its weights were changed on the way.
            which = "head" if any(key.startswith("rewards.") for key in self.plan.perturb) else "best"
            run, adapter = directory / best["member"], directory / BEST
            shutil.rmtree(adapter, ignore_errors=True)  # what an earlier session wrote there
            with AdapterStore(archive=run, readonly=True) as store:
                version = store.get(which)
                summary["weights"] = export_adapter(store, version, Recipe.read(run), adapter)
            summary |= {"adapter": str(adapter), "version": version.number, "digest": version.digest}
        disk.replace_file(directory / SUMMARY_FILE, json.dumps(summary, indent=1).encode(), sync=True)
        return summary


def _step(member: Member) -> int:
    return int(member.history[-1]["step"]) if member.history else 0
