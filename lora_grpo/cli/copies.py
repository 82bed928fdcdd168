"""`lora-grpo export RUN VERSION [DIR]` and `lora-grpo fork RUN VERSION NEW`: a version taken out of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lora_grpo.cli.live import Json, Overrides, Run, Version
from lora_grpo.cli.output import say, tell
from lora_grpo.errors import ConfigError


def export(
    run: Run,
    version: Version,
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A new or empty directory; not needed with --push-to-hub.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="REPO", help="Upload it to the Hugging Face Hub: you/name.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make REPO a private one, if it is made now.")] = False,
    as_json: Json = False,
) -> None:
    """Write a version as a plain PEFT folder, for PeftModel.from_pretrained, vLLM, or further training.

    It has the adapter's own rank, alpha and targets, so that training on keeps the effective learning rate. The weights
    are the trainer's own in fp32 where the version's trainer state is kept, else rounded to the engine's dtype.
    REPO gets the same, the tokenizer and a model card, in one commit; log in with `hf auth login`, or set HF_TOKEN.
    """
    if directory is None and push_to_hub is None:
        raise ConfigError("name the directory to write to, or --push-to-hub REPO")
    from lora_grpo.adapters.peft_form.export import Recipe, export_adapter
    from lora_grpo.adapters.store import AdapterStore

    said: dict[str, Any] = {}
    with AdapterStore(archive=run, readonly=True) as store:
        found = store.get(version)
        if directory is not None:
            weights = export_adapter(store, found, Recipe.read(run), directory)
            said = {"directory": str(directory), "weights": weights}
    if push_to_hub is not None:
        from lora_grpo.trainer import hub

        said["commit"] = hub.push_to_hub(run, found, push_to_hub, private=private)
    lines = [f"{found} is in {directory}, weights {said['weights']}"] if directory is not None else []
    lines += [f"{found} is at {said['commit']}"] if push_to_hub is not None else []
    tell({"version": found.number, **said}, as_json, "\n".join(lines))


def fork(
    run: Run,
    version: Version,
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The new run's directory.")],
    overrides: Overrides = None,
    weights_only: Annotated[
        bool,
        typer.Option("--weights-only", help="Begin at step 0 from the version's weights, with a new optimizer."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a new run that starts from any version of another: `lora-grpo train NEW --resume` goes on from there.

    It goes on exactly as the run did from that version, or with other settings: optimizer, schedule, random state and
    data position are the version's. RUN may be live, and stays as it is.
    """
    from lora_grpo.trainer.forking import fork as make

    made = make(run, version, new, overrides or (), weights_only=weights_only)
    document = {"run": str(made.run), "version": made.origin.number, "digest": made.origin.digest, "step": made.step}
    tell(document | {"from": str(made.source), "weights": made.weights}, as_json, str(made))
    if not as_json:
        say(f"go on with: lora-grpo train {new} --resume")
