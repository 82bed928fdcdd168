"""A version on the Hugging Face Hub: the adapter as PEFT saves it, the tokenizer, and a card of how it was trained."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lora_grpo.adapters.peft_form.export import Recipe, export_adapter
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.version import AdapterVersion, Target
from lora_grpo.errors import ConfigError
from lora_grpo.metrics.log import Record, package_versions, run_history
from lora_grpo.metrics.page import settings_of
from lora_grpo.metrics.render import number

MOST_ROWS = 20  # of the card's table of rewards
_PRIVATE = ("output_dir", "store_root", "engine.", "keep.")  # settings that say where a run was, not how it was trained


def push_to_hub(run: str | Path, version: Target, repo: str, *, private: bool = False) -> str:
    """Upload `version` of a run to the hub's `repo` ("you/name"; made where it is not there); returns the commit's URL.

    One commit holds the adapter in fp32 with its own alpha, the tokenizer, and a model card: base, rewards by step,
    settings, package releases. Log in with `hf auth login`, or set HF_TOKEN. Raises `UnknownVersion` or `StoreError`
    for the version, and `ConfigError` with the hub's reason.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi

    run, hub = Path(run), HfApi()
    with AdapterStore(archive=run, readonly=True) as store, tempfile.TemporaryDirectory() as place:
        found, files = store.get(version), Path(place) / "adapter"
        recipe = Recipe.read(run)
        weights = export_adapter(store, found, recipe, files)
        rewards = [{"step": one.step, "version": one.number, **store.metrics(one)} for one in store.list()]
        card = _card(run, found, recipe.config, weights, repo, rewards)
        (files / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        added = [CommitOperationAdd(path.name, path) for path in sorted(files.iterdir())]
        try:
            hub.create_repo(repo, private=private, exist_ok=True)
            return str(hub.create_commit(repo, added, commit_message=f"{found} (step {found.step})").commit_url)
        except (OSError, ValueError, httpx.HTTPError) as error:
            fix = "log in with `hf auth login` or set HF_TOKEN, and name a repository that you may write to: you/name"
            raise ConfigError(f"{repo!r} on {hub.endpoint} did not accept the upload: {error}; {fix}") from error


def _card(run: Path, version: AdapterVersion, adapter: Any, weights: str, repo: str, recorded: list[Record]) -> str:
    records = run_history(run)
    info = {name: value for one in records if one["event"] == "start" for name, value in one["info"].items()}
    base = str(adapter["base_model_name_or_path"])
    # The hub refuses a card whose base is no hub name; a folder's place is nobody's business.
    folder = base.count("/") > 1 or Path(base).is_dir()
    settings = settings_of(run, info.get("config", {}))
    cards = Environment(loader=PackageLoader("lora_grpo", "trainer"), trim_blocks=True, undefined=StrictUndefined)
    cards.filters["number"] = number
    return cards.get_template("card.md").render(
        folder=folder,
        base=Path(base).name if folder else base,
        repo=repo,
        rank=adapter["r"],
        version=version,
        weights=weights,
        rows=_rows(records, recorded),
        settings=[(key, value) for key, value, changed in settings if changed and not key.startswith(_PRIVATE)],
        packages=info.get("packages") or package_versions(),
    )


def _rows(records: Sequence[Record], recorded: list[Record]) -> list[tuple[Any, ...]]:
    """The table's rows: of the log's steps, or else of what was recorded with kept versions."""
    held_out = {record["version"]: record.get("reward") for record in records if record["event"] == "evaluation"}
    steps: list[Mapping[str, Any]] = [record for record in records if record["event"] == "step"]
    rows = [
        (row["step"], row["version"], row.get("reward"), held_out.get(row["version"], row.get("eval/reward")))
        for row in steps or recorded
    ]
    # Of a long run the last step and others at even distances before it.
    return rows[:: -max(1, -(-len(rows) // MOST_ROWS))][::-1]
