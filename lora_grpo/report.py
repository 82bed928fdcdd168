"""A run for people: its versions as rows, all of it as one HTML page, and a version with a card on the Hub."""

import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_grpo.adapters.files.disk import replace_file, reported
from lora_grpo.adapters.files.locks import holder, is_leased
from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.rollbacks import RollbackLog
from lora_grpo.adapters.version import AdapterVersion, Target
from lora_grpo.errors import ConfigError, UnknownVersion
from lora_grpo.metrics.log import Record, package_versions, run_history
from lora_grpo.metrics.page import Lineage, render_page, settings_of
from lora_grpo.metrics.render import duration, number

MOST_VERSIONS = 60
MOST_REWARDS = 20  # rows of a card's table
_PRIVATE = ("output_dir", "store_root", "engine.", "keep.")  # settings that say where a run was, not how it was trained


def write_report(run: str | Path, path: Path | None = None, watch: float | None = None) -> Path:
    """Write the page of a run and return its path (default: RUN/report.html). A reader sees the old page or the new.

    `watch`: while the run lives, again every so many seconds; it returns when the run has ended. From the program that
    trains, start it as a thread: `Thread(target=write_report, args=("runs/mine",), kwargs={"watch": 30})`. Raises
    `StoreError` where there is no run, or no page can be written.

    >>> print(write_report("runs/mine"))
    runs/mine/report.html
    """
    run = Path(run)
    path = path or run / "report.html"
    while True:
        live = holder(run) is not None
        page = render_page(run, lineage(run), live=live, refresh_s=watch if live else None)
        with reported(f"writing {path}"):
            # A model may have written half a surrogate pair, which UTF-8 does not hold.
            replace_file(path, page.encode("utf-8", errors="backslashreplace"), sync=False)
        if not (live and watch):
            return path
        time.sleep(watch)


def lineage(run: Path) -> Lineage:
    """What the store of `run` tells: every version ever published, and a table of the newest and the notable."""
    with AdapterStore(archive=run, readonly=True) as store:
        kept, head, best = store.list(), store.head, None
        with suppress(UnknownVersion):
            best = store.get("best").number
        notable = {best, head and head.number, *store.pins}
        chosen = [one for one in reversed(kept) if one in kept[-MOST_VERSIONS:] or one.number in notable]
        rows = described(store, chosen[: 2 * MOST_VERSIONS])
        rollbacks = RollbackLog(run).entries
        known = {version.number for version in kept}.union(store.missing)
        # Those that retention removed are in the tree all the same.
        numbers = range(1, max(known.union(one.left for one in rollbacks), default=0) + 1)
        parents = {number: store.parent_of(number) for number in numbers}
        return Lineage(
            parents={number: of for number, of in parents.items() if of is not None or number in {*known, 1}},
            head=None if head is None else head.number,
            best=best,
            pins=store.pins,
            rollbacks=[(one.left, one.to, one.reason or "") for one in rollbacks],
            rows=[for_people(row) for row in rows],
            left_out=len(kept) - len(rows),
        )


def described(store: AdapterStore, versions: list[AdapterVersion]) -> list[dict[str, Any]]:
    """Versions as JSON; one that a live run prunes meanwhile is left out."""
    rows = []
    for version in versions:
        with suppress(UnknownVersion):
            rows.append(describe(store, version))
    return rows


def describe(store: AdapterStore, version: AdapterVersion) -> dict[str, Any]:
    head = None
    with suppress(UnknownVersion):
        head = store.head
    return {
        "version": version.number,
        "parent": version.parent,
        "step": version.step,
        "head": head is not None and version.number == head.number,
        "pinned": version.number in store.pins,
        "served": is_leased(version.path),
        "created_at": version.created_at,
        "age_s": round(time.time() - version.created_at, 1),
        "size_bytes": store.manifest(version.number).size_bytes,
        "where": sorted(store.where(version.number)),
        "path": str(store.folder(version.number)),
        "digest": version.digest,
        "metrics": store.metrics(version.number),
    }


def for_people(row: dict[str, Any]) -> dict[str, Any]:
    said = [word for word, key in (("HEAD", "head"), ("pinned", "pinned"), ("served", "served")) if row[key]]
    if "from/run" in row["metrics"]:
        said.append(f"fork of {Path(row['metrics']['from/run']).name} v{row['metrics']['from/version']}")
    return {
        "version": f"v{row['version']}",
        "from": "-" if row["parent"] is None else f"v{row['parent']}",
        "step": row["step"],
        "age": duration(row["age_s"]),
        "MiB": row["size_bytes"] / 2**20,
        **{name: row["metrics"].get(name) for name in ("reward", "eval/reward")},
        "where": ", ".join(row["where"]),
        "": ", ".join(said),
    }


# On the Hugging Face Hub.


def push_to_hub(run: str | Path, version: Target, repo: str, *, private: bool = False) -> str:
    """Upload `version` of a run to the hub's `repo` ("you/name"; made where it is not there); returns the commit's URL.

    One commit holds the adapter in fp32 with its own alpha, the tokenizer, and a model card: base, rewards by step,
    settings, package releases. Log in with `hf auth login`, or set HF_TOKEN. Raises `UnknownVersion` or `StoreError`
    for the version, and `ConfigError` with the hub's reason.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi

    from lora_grpo.adapters.peft_form.export import Recipe, export_adapter

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
    from jinja2 import Environment, PackageLoader, StrictUndefined

    records = run_history(run)
    info = {name: value for one in records if one["event"] == "start" for name, value in one["info"].items()}
    base = str(adapter["base_model_name_or_path"])
    # The hub refuses a card whose base is no hub name; a folder's place is nobody's business.
    folder = base.count("/") > 1 or Path(base).is_dir()
    settings = settings_of(run, info.get("config", {}))
    cards = Environment(loader=PackageLoader("lora_grpo", "metrics"), trim_blocks=True, undefined=StrictUndefined)
    cards.filters["number"] = number
    return cards.get_template("card.md").render(
        folder=folder,
        base=Path(base).name if folder else base,
        repo=repo,
        rank=adapter["r"],
        version=version,
        weights=weights,
        rows=_reward_rows(records, recorded),
        settings=[(key, value) for key, value, changed in settings if changed and not key.startswith(_PRIVATE)],
        packages=info.get("packages") or package_versions(),
    )


def _reward_rows(records: Sequence[Record], recorded: list[Record]) -> list[tuple[Any, ...]]:
    """The table's rows: of the log's steps, or else of what was recorded with kept versions."""
    held_out = {record["version"]: record.get("reward") for record in records if record["event"] == "evaluation"}
    rows = [
        (row["step"], row["version"], row.get("reward"), held_out.get(row["version"], row.get("eval/reward")))
        for row in [record for record in records if record["event"] == "step"] or recorded
    ]
    # Of a long run the last step and others at even distances before it.
    return rows[:: -max(1, -(-len(rows) // MOST_REWARDS))][::-1]
