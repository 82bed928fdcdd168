"""A version on the Hugging Face Hub: the adapter as PEFT saves it, the tokenizer, and a card of how it was trained."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_grpo.adapters.asking.target import Target
from lora_grpo.adapters.peft_form.export import Recipe, export_adapter
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.errors import ConfigError
from lora_grpo.metrics.log import Record, package_versions, run_history
from lora_grpo.metrics.page import changed_settings
from lora_grpo.metrics.render import number

MOST_ROWS = 20
"""Of the card's table of rewards."""
_PRIVATE = ("output_dir", "store_root", "engine.", "keep.")
"""Settings that say where a run was, not how it was trained."""

_CARD = """---
{of_base}library_name: peft
pipeline_tag: text-generation
tags: [lora, grpo]
---

# {name}

A LoRA adapter of rank {rank} for {base}, trained with GRPO by lora_grpo: version {number}, after step
{step}. It was never merged into its base; while training, vLLM sampled from it as it was. The weights are fp32,
{weights} ("exact": the trainer's own; "rounded": to the dtype that vLLM served).

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{repo}")
```

## Rewards

Mean over the completions that each version made while training; held out: greedy answers to prompts that were not
trained on, where they were measured.

| step | version | reward | held out |
|---|---|---|---|
{rows}

## How it was trained

Settings that are not lora_grpo's defaults:

{settings}

{packages}
"""


def push_to_hub(run: str | Path, version: Target, repo: str, *, private: bool = False) -> str:
    """Upload `version` of a run to the hub's `repo` ("you/name"; made where it is not there); returns the commit's URL.

    One commit holds the adapter in fp32 with its own alpha, the tokenizer, and a model card: base, rewards by step,
    settings, package releases. Log in with `hf auth login`, or set HF_TOKEN. Raises `UnknownVersion` or `StoreError`
    for the version, and `ConfigError` with the hub's reason.
    """
    run = Path(run)
    with AdapterStore(archive=run, readonly=True) as store, tempfile.TemporaryDirectory() as place:
        found, files = store.get(version), Path(place) / "adapter"
        recipe = Recipe.read(run)
        weights = export_adapter(store, found, recipe, files)
        rewards = [{"step": one.step, "version": one.number, **store.metrics(one)} for one in store.list()]
        card = _card(run, found, recipe.config, weights, repo, rewards)
        (files / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        return _upload(files, repo, private, f"{found} (step {found.step})")


def _upload(files: Path, repo: str, private: bool, message: str) -> str:
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = HfApi()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        added = [CommitOperationAdd(path.name, path) for path in sorted(files.iterdir())]
        return str(hub.create_commit(repo, added, commit_message=message).commit_url)
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise ConfigError(
            f"{repo!r} on {hub.endpoint} took no upload: {error}; log in with `hf auth login` or set HF_TOKEN, and "
            "name a repository that you may write to, as you/name"
        ) from error


def _card(
    run: Path,
    version: AdapterVersion,
    adapter: Mapping[str, Any],
    weights: str,
    repo: str,
    recorded: Sequence[Mapping[str, Any]],
) -> str:
    records = run_history(run)
    info: dict[str, Any] = {}
    for record in records:
        info |= record["info"] if record["event"] == "start" else {}
    base = str(adapter["base_model_name_or_path"])
    # The hub refuses a card whose base is no hub name; a folder's place is nobody's business.
    folder = base.count("/") > 1 or Path(base).is_dir()
    packages = info.get("packages") or package_versions()
    settings = [
        f"- `{key}`: {value}"
        for key, value in changed_settings(run, info.get("config", {}))
        if not key.startswith(_PRIVATE)
    ]
    return _CARD.format(
        of_base="" if folder else f"base_model: {base}\n",
        base=Path(base).name if folder else base,
        name=repo.rpartition("/")[2],
        repo=repo,
        rank=adapter["r"],
        number=version.number,
        step=version.step,
        weights=weights,
        rows="\n".join(_rows(records, recorded)),
        settings="\n".join(settings) or "- none",
        packages=", ".join(f"{name} {release}" for name, release in packages.items()),
    )


def _rows(records: Sequence[Record], recorded: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table's lines: of the log's steps, or else of what was recorded with kept versions."""
    held_out = {record["version"]: record.get("reward") for record in records if record["event"] == "evaluation"}
    steps: list[Mapping[str, Any]] = [record for record in records if record["event"] == "step"]
    rows = [
        (row["step"], row["version"], row.get("reward"), held_out.get(row["version"], row.get("eval/reward")))
        for row in steps or recorded
    ]
    # Of a long run the last step and others at even distances before it.
    for row in rows[:: -max(1, -(-len(rows) // MOST_ROWS))][::-1]:
        yield f"| {' | '.join(map(number, row))} |"
