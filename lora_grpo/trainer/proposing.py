"""`lora-grpo init`: settings for a model and a data set, from what is in them, as a TOML file with its reasons."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_grpo.config import RewardConfig, RunConfig
from lora_grpo.config_file import apply_override
from lora_grpo.data import load_data, prompt_problem
from lora_grpo.data.reading import read_rows, short
from lora_grpo.engines.delivery import probe
from lora_grpo.engines.local.targets import checkpoint_config
from lora_grpo.errors import ConfigError
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.rewards import final_number, load_reward
from lora_grpo.trainer.checking import Finding
from lora_grpo.trainer.preflight import MemberSpec, Preflight, checkpoint_tokenizer

PROMPTS = ("prompt", "question", "problem", "instruction", "query", "input", "messages", "text")  # the likeliest first
ANSWERS = ("answer", "final_answer", "solution", "ground_truth", "target", "label", "expected_answer")
LOOKED_AT = 1000  # rows that a column's kind is judged by
LONGEST_EXACT = 40  # characters of an answer that a model can be expected to give letter by letter
SIZES = {
    "lora.r": (16, "rank"),
    "lora.lora_alpha": (32, "the adapter's update is scaled by lora_alpha / r"),
    "grpo.num_generations": (8, "completions a prompt; rewards are compared within these"),
    "grpo.per_device_train_batch_size": (8, "completions in a micro-batch: lower it if memory is short"),
    "grpo.gradient_accumulation_steps": (8, "micro-batches in a step"),
    "grpo.learning_rate": (2e-5, "adapters take higher ones than whole models"),
    "grpo.log_completions_every": (10, "steps between completions that you can read (lora-grpo report)"),
}
MARKED = "Think step by step. End with #### and the number."
Notes = dict[str, str]


def propose(model: str, data: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, str]:
    """The settings and their TOML text. Raises `ConfigError` where the columns tell no prompt or no reward."""
    values: dict[str, Any] = {"output_dir": f"runs/{Path(data).stem}", "model": {"name": model}, "lora": {}}
    values |= {"data": {"train": data}, "rewards": [{}], "engine": {}, "grpo": {}}
    for override in overrides:
        apply_override(values, override)
    notes: Notes = {}
    columns = _columns(values["data"])
    _choose_prompt(values["data"], columns, notes)
    _choose_reward(values["rewards"][0], columns, values["data"]["train"], notes)
    settings = RunConfig(**values)
    tokenizer = checkpoint_tokenizer(settings.model)
    texts = all(isinstance(prompt, str) for prompt in columns.get(settings.data.prompt_column, [])[:LOOKED_AT])
    if texts and getattr(tokenizer, "chat_template", None) and "system_prompt" not in values["data"]:
        values["data"]["system_prompt"] = MARKED if settings.rewards[0].name == "numeric" else ""
        notes["data.system_prompt"] = "the model has a chat template: prompts become chats"
    _choose_lengths(values, tokenizer, columns, notes)
    _choose_sizes(values, len(next(iter(columns.values()))), notes)
    return RunConfig(**values), as_toml(values, notes)


def _columns(data: Mapping[str, Any]) -> dict[str, list[Any]]:
    rows, label = read_rows(data["train"], data.get("train_split", "train"), data.get("name"))
    if not len(rows):
        raise ConfigError(f"{label} has no rows")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _choose_prompt(data: dict[str, Any], columns: Mapping[str, list[Any]], notes: Notes) -> None:
    if "prompt_column" in data:
        return
    known = [name for name in PROMPTS if name in columns]
    wrong = {name: [prompt_problem(prompt) for prompt in columns[name][:LOOKED_AT]] for name in known}
    fitting = [name for name in known if not any(wrong[name])]
    if not known:
        told = f"none of the columns of {data['train']} is known as a column of prompts ({', '.join(columns)})"
        raise ConfigError(f"{told}: name it with data.prompt_column=NAME")
    if not fitting:
        nearest = min(known, key=lambda name: sum(map(bool, wrong[name])))
        row, problem = next((row, problem) for row, problem in enumerate(wrong[nearest]) if problem)
        told = f"{data['train']}, row {row}, column {nearest!r}: {problem}"
        raise ConfigError(f"{told}; or name another column, as data.prompt_column=NAME")
    data["prompt_column"] = fitting[0]
    notes["data.prompt_column"] = f"the columns are {', '.join(columns)}"


def _choose_reward(reward: dict[str, Any], columns: Mapping[str, list[Any]], source: str, notes: Notes) -> None:
    if "name" in reward:
        return
    for column in (name for name in ANSWERS if name in columns):
        values = columns[column][:LOOKED_AT]
        shown = ["" if value is None else str(value).strip() for value in values]
        if "" in shown and any(shown):
            row = shown.index("")
            told = f"{source}, row {row}, column {column!r}: there is no answer ({short(values[row])})"
            raise ConfigError(f"{told}; remove it, or name a reward needing none: rewards.0.name=my_module:my_function")
        if all(final_number(text) is not None for text in shown):
            reward["name"], why = "numeric", "ends in a number"
        elif all(0 < len(text) <= LONGEST_EXACT for text in shown):
            reward["name"], why = "exact", f"is short, {max(map(len, shown))} characters at most"
        else:
            continue
        if column != "answer":
            reward["options"] = {"column": column}
        notes["rewards.name"] = f"every {column!r} {why}; your own function is named as 'my_module:my_function'"
        return
    told = f"none of the columns of {source} is known as a column of answers ({', '.join(columns)})"
    own, ready = "rewards.0.name=my_module:my_function", "rewards.0.name=numeric 'rewards.0.options={column=\"NAME\"}'"
    raise ConfigError(f"{told}: name a reward, such as {own}, or {ready}")


def _choose_lengths(values: dict[str, Any], tokenizer: Any, columns: Mapping[str, list[Any]], notes: Notes) -> None:
    engine, grpo = values["engine"], values["grpo"]
    settings = RunConfig(**values)
    train, _ = load_data(settings.data)
    free = GRPOConfig(chat_template_kwargs=settings.grpo.chat_template_kwargs)
    spec = MemberSpec(settings.output_dir, load_reward(RewardConfig(name="exact")), free, train, peft_config=None)
    longest = Preflight(settings.model, spec).wanted.prompt_tokens
    config = checkpoint_config(settings.model.name, **settings.model.loading).get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    column = dict(settings.rewards[0].options).get("column", "answer")
    answers = [len(tokenizer.encode(str(value))) for value in columns.get(column, [])[:LOOKED_AT]] if tokenizer else []
    if "max_completion_length" not in grpo:
        # Reasoning takes more room than the answer that ends it; so does a worked solution of another's.
        wanted = 1 << max([6 if settings.rewards[0].name == "exact" else 9, (2 * max(answers, default=0)).bit_length()])
        room = wanted if context is None else max(8, min(wanted, context - longest))
        grpo["max_completion_length"] = min(2048, room)
        told = f"answers in {column!r} have up to {max(answers):,} tokens; " if answers else ""
        notes["grpo.max_completion_length"] = f"tokens; {told}completions cut here are counted (clipped_ratio)"
    if "max_model_len" not in engine:
        needed = -(-max(probe.TOKENS + 1, longest + grpo["max_completion_length"]) // 8) * 8
        engine["max_model_len"] = needed if context is None else min(needed, context)
        notes["engine.max_model_len"] = f"the longest prompt has {longest:,} tokens; the model's context is {context}"
        if longest + grpo["max_completion_length"] > engine["max_model_len"]:
            grpo.setdefault("overlong_prompts", "drop")
            notes["grpo.overlong_prompts"] = "some prompts do not fit the model's context beside a completion"


def _choose_sizes(values: dict[str, Any], rows: int, notes: Notes) -> None:
    for key, (value, why) in SIZES.items():
        section, _, name = key.partition(".")
        if name not in values[section]:
            values[section][name], notes[key] = value, why
    if "total_steps" not in values["grpo"]:
        grpo = GRPOConfig(**values["grpo"])
        prompts = max(1, grpo.rows_per_step(1) // grpo.num_generations)
        once = -(-rows // prompts)
        values["grpo"]["total_steps"] = min(200, max(20, once))
        notes["grpo.total_steps"] = f"of {prompts} prompts each; all {rows:,} once are {once:,} steps"


def memory_lines(findings: Sequence[Finding]) -> list[str]:
    shown = [one for one in findings if one.what.startswith("memory") or not one.ok]
    lines = [f"# {'' if one.ok else 'NOT YET: '}{one.what}: {one.found}" for one in shown]
    return ["# Computed from the model's configuration alone, on this machine:", *lines]


def as_toml(values: Mapping[str, Any], notes: Notes) -> str:
    lines = [f"{name} = {_value(value)}" for name, value in values.items() if not isinstance(value, dict | list)]
    for section, content in values.items():
        if isinstance(content, dict | list):
            for table in content if isinstance(content, list) else [content] if content else []:
                lines += ["", f"[[{section}]]" if isinstance(content, list) else f"[{section}]"]
                for name, value in table.items():
                    note = notes.get(f"{section}.{name}")
                    lines.append(f"{name} = {_value(value)}" + (f"  # {note}" if note else ""))
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """A TOML value: as in JSON, but for tables."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
