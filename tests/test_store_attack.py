"""A few of the attacks of `benchmarks.attack`: see tests/crash/attack.py for how each is judged."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lora_grpo.adapters.peft_form.export import difference
from lora_grpo.adapters.peft_form.files import open_adapter
from lora_grpo.adapters.peft_form.serving import load_tensors
from lora_grpo.adapters.version import WEIGHTS_FILE, AdapterVersion
from lora_grpo.errors import DeliveryError, StoreCorrupt
from tests.crash.attack import SCENARIOS, attack, fuzz
from tests.crash.damage import KINDS, files, trained
from tests.crash.damage import attack as spoil_all
from tests.fuzzed_adapters import fuzzed, sound, weights


def test_kills_and_failing_disks_at_exact_calls(shm_dir: Path) -> None:
    result = attack(shm_dir, seed=7, kills=3 * len(SCENARIOS), errors=3 * len(SCENARIOS))
    assert not result["wrong"]
    assert result["table"]["kill: killed"] == 3 * len(SCENARIOS)
    assert result["table"]["error: our error"] > len(SCENARIOS)


def test_broken_adapters_are_refused_by_name(shm_dir: Path) -> None:
    result = fuzz(shm_dir, seed=3, adapters=400)
    assert not result["wrong"]
    assert result["table"]["refused: DeliveryError"] > 300
    assert result["table"]["opened: still in serving form"] > 5


def test_a_spoiled_file_is_told_of_or_does_no_harm(shm_dir: Path) -> None:
    """A few files and damages of each kind, by chance; and what is another version than it should be is seen."""
    with trained(shm_dir) as run:
        tries = [(name, kind) for name in files(run) for kind in KINDS]
        result = spoil_all(run, 5, random.Random(5).sample(tries, 20))
        assert not result["wrong"]
        assert all(result["table"][f"{name} 0"] for name in ("versions", "show", "export", "rollback", "train"))
        assert result["table"]["verify 1"] > 3
        run.exports, run.served = {number: [] for number in run.exports}, dict.fromkeys(run.served, b"")
        seen = spoil_all(run, 5, [("plot.png", "flip"), ("plot.png", "empty")])["wrong"]
        assert [fault["command"] for fault in seen] == ["export", "rollback", "export", "train"]


@pytest.fixture
def version(tmp_path: Path) -> AdapterVersion:
    return AdapterVersion(1, None, tmp_path, "", 0, 0.0)


def test_broken_tensors_are_refused_wherever_they_are_read(version: AdapterVersion) -> None:
    refused = 0
    for seed in range(300):
        (version.path / WEIGHTS_FILE).write_bytes(fuzzed(seed)[0])
        for read in (lambda: load_tensors(version.path / WEIGHTS_FILE), lambda: difference(version.path, version.path)):
            try:
                read()
            except StoreCorrupt:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [None, "text", 10**400, float("inf"), float("nan"), True, [[]], [1], {"a": []}, 3])
def test_no_value_of_a_config_is_a_traceback(version: AdapterVersion, field: str, value: object) -> None:
    import json

    header, payload, config = sound()
    (version.path / WEIGHTS_FILE).write_bytes(weights(header, payload))
    (version.path / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    if field.endswith("pattern") and (value is None or value == {"a": []}):
        assert open_adapter(version).paths
    else:
        with pytest.raises(DeliveryError, match=r"v1 at .* cannot be served: "):
            open_adapter(version)


def test_the_sound_adapter_of_the_fuzzer_is_sound(version: AdapterVersion) -> None:
    header, payload, _ = sound()
    (version.path / WEIGHTS_FILE).write_bytes(weights(header, payload))
    assert load_tensors(version.path / WEIGHTS_FILE).keys() == header.keys()
