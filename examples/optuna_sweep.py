"""Optuna proposes learning rate and KL, a population trains at most eight members at once, weak ones end early.

pip install optuna; then python examples/optuna_sweep.py. Each trial is a run of its own in runs/optuna.
"""

import optuna
from peft import LoraConfig

from lora_grpo import GRPOConfig, MemberSpec, Population
from lora_grpo.data import load_prompts
from lora_grpo.rewards import exact

TRIALS, AT_ONCE, STEPS = 24, 8, 100
rows = load_prompts("prompts.jsonl")
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_warmup_steps=10))
trials = {}


def ask() -> MemberSpec:
    """The next settings that Optuna wants to try, as a member."""
    trial = study.ask()
    config = GRPOConfig(
        total_steps=STEPS,
        learning_rate=trial.suggest_float("learning_rate", 1e-6, 1e-4, log=True),
        beta=trial.suggest_float("beta", 0.0, 0.1),
    )
    spec = MemberSpec(f"runs/optuna/{trial.number:03d}", exact("answer"), config, rows, peft_config=lora)
    trials[spec.name] = trial
    return spec


def tell(member) -> None:
    """Report the result of a member to Optuna; then another one can take its place."""
    trial = trials.pop(member.name)
    if member.state == "finished":
        study.tell(trial, sum(metrics["reward"] for metrics in member.history[-5:]) / 5)
    else:
        pruned = member.state == "stopped"
        study.tell(trial, state=optuna.trial.TrialState.PRUNED if pruned else optuna.trial.TrialState.FAIL)


with Population("Qwen/Qwen2.5-0.5B-Instruct", [ask() for _ in range(AT_ONCE)]) as population:
    for _ in population.rounds():
        for member in population.running:
            step, trial = len(member.history), trials[member.name]
            trial.report(member.history[-1]["reward"], step)
            if trial.should_prune():
                population.stop(member, f"pruned at step {step}")
        for member in [member for member in population.members if member.name in trials]:
            if member.state in ("finished", "stopped", "failed"):
                tell(member)
                if len(study.trials) < TRIALS:
                    population.add(ask())

print(study.best_params, study.best_value)
