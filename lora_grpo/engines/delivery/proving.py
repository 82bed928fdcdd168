"""What is proven before the first version is published: the engine's base is the trainer's, and an adapter arrives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from lora_grpo.adapters.files.room import require_room
from lora_grpo.adapters.peft_form.serving import ServingForm
from lora_grpo.adapters.version import AdapterVersion
from lora_grpo.engines.base import Engine, is_remote
from lora_grpo.engines.delivery.base_match import BaseMatch, match_base
from lora_grpo.engines.delivery.probe import ProbeReport, run_probe
from lora_grpo.grpo.processes import Processes

Proofs: TypeAlias = dict[tuple[tuple[str, int], ...], tuple[BaseMatch, ProbeReport]]
"""What was proven of one engine and one base, by the adapter's form: its modules' paths and ranks."""


def prove(
    proofs: Proofs,
    model: nn.Module,
    form: ServingForm,
    engine: Engine,
    processes: Processes,
    scratch: Path,
    publish: Callable[[Mapping[str, Any]], AdapterVersion],
) -> tuple[BaseMatch, ProbeReport]:
    """The proofs for this form of adapter, made and added to `proofs` where they are missing; called by all processes.

    The probe is written under `scratch`, or goes through `publish` where servers pull. Raises `UnsupportedAdapter` for
    another base, `DeliveryError` when the probe does not arrive, `NoRoom` when it does not fit.
    """
    key = tuple((module.path, module.a_RI.shape[0]) for module in form.modules)
    if key not in proofs:
        matched = next(iter(proofs.values()))[0] if proofs else match_base(engine, model, processes)
        pulls = is_remote(engine) and engine.pulls
        if not pulls:
            # Each process writes its own, and one that cannot must not leave the others waiting.
            copies = {"probe": form.nbytes * processes.count}
            processes.each(lambda: require_room(scratch, copies, "the probe of the engine"))
        proofs[key] = matched, run_probe(model, form, engine, scratch, publish=publish if pulls else None)
    return proofs[key]
