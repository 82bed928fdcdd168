"""The parts of the suite that need no engine: arithmetic, sizes, settings, reports."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_grpo.bench import fidelity, host, serving, shapes, suite, sync
from lora_grpo.bench.fidelity import Reference
from lora_grpo.bench.gauges import Levels, floor_seconds, level, measure_bandwidth, percentile_95
from lora_grpo.bench.joining import break_even, compare, crossing, slopes
from lora_grpo.bench.plan import STOCK, STRATEGIES, Cell, Settings, Subject, by_strategy, load_strategy, plan_parts
from lora_grpo.bench.report import earliest, findings, sentence, update_readme, write_report
from lora_grpo.bench.runner import Partial
from lora_grpo.bench.schema import (
    TOLERANCE,
    BreakEvenRow,
    DecodeRow,
    Document,
    EnduranceRow,
    MemoryRow,
    SyncRow,
)
from lora_grpo.bench.strategy import Strategy, Trainer
from lora_grpo.bench.suite import rows_of_one
from lora_grpo.errors import ConfigError
from lora_grpo.grpo.forward import mean_abs_difference, teacher_logprobs

GIB = 1 << 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.write_model("tiny", tmp_path_factory.mktemp("shapes") / "tiny")


def subject(model: Path | str = "m", strategy: str = "native", **changes: Any) -> Subject:
    plain: dict[str, Any] = {
        "rank": 4,
        "targets": "all-linear",
        "device": "cpu",
        "tmpfs": "",
        "disk": "",
        "max_model_len": 64,
        "max_num_seqs": 8,
        "graphs": False,
        "gpu_memory_utilization": 0.1,
    }
    return Subject(strategy, str(model), **{**plain, **changes})


def sync_row(strategy: str, seconds: float, native_s: float, **changes: Any) -> SyncRow:
    fields: dict[str, Any] = {
        "shape": "tiny",
        "against": "native",
        "rank": 16,
        "targets": "all-linear",
        "p95_s": seconds,
        "phases_s": {"push": seconds},
        "afterwards_s": 0.0,
        "moved_bytes": 1000,
        "floor_s": 1e-4,
        "times_floor": seconds / 1e-4,
        "syncs": 10,
    }
    return SyncRow(strategy=strategy, median_s=seconds, ratio_to_native=seconds / native_s, **{**fields, **changes})


def decode_row(strategy: str, tpot_s: float, native_tpot_s: float, prefill_s: float = 0.1) -> DecodeRow:
    return DecodeRow(
        strategy=strategy,
        shape="tiny",
        rows=8,
        prompt_tokens=32,
        completion_tokens=65,
        generate_s=prefill_s + 64 * tpot_s,
        prefill_s=prefill_s,
        tpot_s=tpot_s,
        tokens_per_s=8 * 65 / (prefill_s + 64 * tpot_s),
        prefill_tokens_per_s=256 / prefill_s,
        tpot_ratio_to_native=tpot_s / native_tpot_s,
        prefill_ratio_to_native=prefill_s / 0.1,
        generate_ratio_to_native=1.0,
    )


def memory_row(strategy: str, weights_bytes: int | None) -> MemoryRow:
    return MemoryRow(
        strategy=strategy,
        shape="tiny",
        kind="resident",
        trainer_bytes=1,
        engine_bytes=1,
        sync_bytes=1,
        tmpfs_bytes=1,
        peak_bytes=4,
        reserved_peak_bytes=None,
        weights_bytes=weights_bytes,
        copy_bytes=100,
    )


def tenth(number: int, seconds: float, tmpfs: float = 5e6, **changes: Any) -> EnduranceRow:
    """The tenth of that number of 1,000 syncs."""
    fields: dict[str, Any] = {"strategy": "native", "shape": "tiny", "rank": 16, "memory_bytes": 1e9, **changes}
    first = 100 * number
    return EnduranceRow(
        **fields, first=first + 1, last=first + 100, median_s=seconds, cuda_bytes=None, tmpfs_bytes=tmpfs
    )


def document(sync_rows: list[SyncRow], decode_rows: list[DecodeRow]) -> Document:
    return Document(
        command="lora-grpo bench all",
        started_at="2026-01-01",
        complete=True,
        card={"device": "cpu", "processor": "one", "cores": 2, "torch": "2"},
        bandwidth_bytes_per_s={"host_copy": 1e10},
        settings={"sync": Settings(repeat=2)},
        failures=[],
        sync=sync_rows,
        decode=decode_rows,
        break_even=break_even(sync_rows, decode_rows, "cpu"),
    )


# Shapes.


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_shapes_have_the_released_models_parameters(shape: str, parameters: int) -> None:
    assert host.measure_model(shape, None)["parameters"] == parameters


def test_a_model_is_written_once_the_same_and_loads(tiny: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    again = AutoModelForCausalLM.from_pretrained(shapes.write_model("tiny", tmp_path / "again"))
    for (name, left), right in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right), name
        assert left.dtype == torch.bfloat16
    written = (tiny / "config.json").stat().st_mtime_ns
    assert shapes.write_model("tiny", tiny) == tiny
    assert (tiny / "config.json").stat().st_mtime_ns == written
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.decode(tokenizer.encode("2 + 2 = é")) == "2 + 2 = é"


def test_log_probs_of_a_made_model_are_far_from_uniform(tiny: Path) -> None:
    logp = teacher_logprobs(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), subject(tiny).sequences())
    values = torch.tensor(logp)
    assert 0.5 < float(values.std()) < 5


# The reference and the trainer.


def test_an_oracle_of_quiet_logits_is_as_loud_as_can_be_told_from_noise(tmp_path: Path) -> None:
    """No adapter would move them by 0.3 nats."""
    quiet = shapes.write_model("tiny", tmp_path / "quiet")
    model = AutoModelForCausalLM.from_pretrained(quiet)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.02)
    model.save_pretrained(quiet)
    found = fidelity.oracle(subject(quiet))
    assert 2 * TOLERANCE * found["noise_nats"] < found["signal_nats"] < 0.2


def test_reference_agrees_with_peft_and_is_restored(tiny: Path) -> None:
    """Two ways to the same fp32 policy: weights summed here, PEFT's adapter path there."""
    trainer = Trainer(subject(tiny))
    trainer.model.to(torch.float32)
    trainer.randomise(0.3)
    reference, tokens = Reference(str(tiny), "cpu"), subject(tiny).sequences()
    base = reference.logprobs(tokens)
    with reference.policy(trainer):
        policy = reference.logprobs(tokens)
    assert mean_abs_difference(policy, base) > 0.1
    assert mean_abs_difference(policy, teacher_logprobs(trainer.model, tokens)) < 1e-4
    assert reference.logprobs(tokens) == base


def test_a_step_moves_every_entry_by_the_learning_rate(tiny: Path) -> None:
    trainer = Trainer(subject(tiny))
    before = trainer.snapshot()
    trainer.step(1e-3)
    for tensor, was in zip(trainer.tensors(), before, strict=True):
        torch.testing.assert_close((tensor - was).abs(), torch.full_like(was, 1e-3), rtol=1e-3, atol=1e-6)
    trainer.restore(before)
    assert all(torch.equal(tensor, was) for tensor, was in zip(trainer.tensors(), before, strict=True))


def test_the_base_is_made_what_it_was_whatever_merging_left(tiny: Path) -> None:
    trainer, reference = Trainer(subject(tiny)), Reference(str(tiny), "cpu")
    trainer.randomise(1.0)
    trainer.model.merge_adapter()
    trainer.model.unmerge_adapter()
    module = trainer.modules[0]
    assert not torch.equal(trainer.base_weight(module).float(), reference.weight(module.path))
    strategy: Any = SimpleNamespace(subject=subject(tiny), trainer=trainer)
    fidelity.restored(strategy)
    assert torch.equal(trainer.base_weight(module).float(), reference.weight(module.path))


def test_every_strategy_can_be_named() -> None:
    for name in STRATEGIES:
        assert issubclass(load_strategy(name), Strategy)


# Arithmetic.


def test_percentile_by_hand() -> None:
    assert percentile_95([3.0]) == 3.0
    assert percentile_95(list(map(float, range(1, 22)))) == 20.0
    assert percentile_95([1.0, 2.0]) == pytest.approx(1.95)


def test_floor_adds_the_channels() -> None:
    assert floor_seconds({"to_host": 100, "to_device": 300}, {"to_host": 50.0, "to_device": 100.0}) == 5.0
    assert measure_bandwidth("cpu")["host_copy"] > 1e8


@pytest.mark.parametrize(
    ("gain_s", "loss_s_per_token", "tokens", "beyond"),
    [
        (1.0, 0.01, 101.0, "merge"),
        (1.0, 0.0, None, "native"),
        (1.0, -0.1, None, "native"),
        (-0.5, 0.01, None, "merge"),
        (-0.5, -0.1, 6.0, "native"),
    ],
)
def test_crossing_by_hand(gain_s: float, loss_s_per_token: float, tokens: float | None, beyond: str) -> None:
    assert crossing(gain_s, loss_s_per_token) == (tokens, beyond)


def test_the_merge_that_wins_first_stands_for_the_others() -> None:
    def row(strategy: str, rows: int, tokens: float | None, beyond: Any) -> BreakEvenRow:
        return BreakEvenRow(
            strategy=strategy,
            shape="tiny",
            rows=rows,
            sync_gain_s=1.0,
            decode_loss_s_per_token=1.0,
            prefill_loss_s=0.0,
            completion_tokens=tokens,
            beyond=beyond,
            measured_up_to_tokens=8,
        )

    late, soon = row("late", 8, 90.0, "merge"), row("soon", 8, 30.0, "merge")
    never, native = row("never", 8, None, "native"), row("short", 64, 20.0, "native")
    always = row("always", 64, None, "merge")
    assert earliest([never, late, soon, native]) == [soon, native]
    assert earliest([never, never]) == [never]
    assert earliest([late, always])[1].strategy == "always"
    assert sentence(row("late", 1, 90.0, "merge")).startswith("tiny, 1 row: late wins")


def test_break_even_from_rows() -> None:
    """Native syncs in 0.02 s and decodes at 12 ms a token; the merge takes 1.02 s and 10 ms, its prefill 50 ms less."""
    syncs = [sync_row("native", 0.02, 0.02), sync_row("merge-trl", 1.02, 0.02)]
    decodes = [decode_row("native", 0.012, 0.012), decode_row("merge-trl", 0.010, 0.012, prefill_s=0.05)]
    (row,) = break_even(syncs, decodes, "cpu")
    assert row.sync_gain_s == pytest.approx(1.0)
    assert row.prefill_loss_s == pytest.approx(0.05)
    assert row.completion_tokens == pytest.approx(1 + 0.95 / 0.002)
    assert "merge-trl wins from 476 tokens (extrapolated): its sync is 1,000.00 ms slower" in sentence(row)


def test_a_pair_is_compared_with_its_own_native_rounds() -> None:
    def done(strategy: str, seconds: list[float]) -> dict[str, Any]:
        result = {
            "phases_s": {"write": [0.25 * s for s in seconds], "load": [0.75 * s for s in seconds]},
            "afterwards_s": [0.0] * len(seconds),
            "moved_bytes": {"host_copy": 100},
            "loader": "stock" if strategy == "native" else None,
            "load_calls": None if strategy == "native" else 339,
        }
        return {"strategy": strategy, "result": result}

    cell = {
        "bandwidth": {"host_copy": 100.0},
        "labels": {"shape": "tiny", "rank": 16, "targets": "all-linear"},
        "rounds": [
            done("native", [1.0, 2.0]),
            done("by-hand", [4.0]),
            done("by-hand", [8.0]),
            done("native", [2.0, 3.0]),
        ],
    }
    native, by_hand = sync.sync_rows(cell)
    assert (native.median_s, native.ratio_to_native, native.syncs) == (2.0, 1.0, 4)
    assert (by_hand.median_s, by_hand.ratio_to_native, by_hand.against) == (6.0, 3.0, "native")
    assert by_hand.phases_s == {"write": 1.5, "load": 4.5}
    assert by_hand.times_floor == 6.0
    assert (native.loader, by_hand.loader) == ("stock", None)


def test_slopes_by_hand() -> None:
    """A millisecond and 0.5 MB more each tenth are 10 ms and 5 MB per 1,000 syncs; flat is none."""
    growing = [tenth(n, 0.010 + 0.001 * n, 5e6 + 5e5 * n) for n in range(10)]
    (slope,) = slopes(growing)
    assert slope.syncs == 1000
    assert slope.seconds_per_1000 == pytest.approx(0.010)
    assert slope.tmpfs_bytes_per_1000 == pytest.approx(5e6)
    assert (slope.memory_bytes_per_1000, slope.cuda_bytes_per_1000) == (pytest.approx(0), None)
    (flat,) = slopes([tenth(n, 0.010) for n in range(10)])
    assert flat.seconds_per_1000 == pytest.approx(0)


def test_tenths_are_medians_of_their_own_syncs() -> None:
    levels = [{"sync": n, "memory_bytes": 100 + n, "cuda_bytes": None, "tmpfs_bytes": 7} for n in range(0, 40, 2)]
    made = sync.tenths([float(n) for n in range(40)], levels)
    assert [(row["first"], row["last"], row["median_s"]) for row in made[:2]] == [(1, 4, 1.5), (5, 8, 5.5)]
    assert [row["memory_bytes"] for row in made[:2]] == [101, 105]


# Order, resuming, settings, sizes.


def test_base_and_stock_kernels_alternate_with_native_in_one_round() -> None:
    settings = plan_parts("decode", None, {"shape": "tiny"})["decode"]
    cells = serving.decode_cells(settings, subject())
    first = cells[0]
    assert [one.strategy for one in first.subjects] == ["native", "base", "native-stock"]
    assert first.order == (0, 1, 2, 2, 1, 0)
    truths = {cell.subjects[0].strategy for cell in cells if cell.table == "truth"}
    assert truths == {"native-stock", "native-shared"}
    on_gpu = serving.decode_cells(settings.model_copy(update={"device": "cuda:0"}), subject())
    assert all(one.strategy != "native-stock" for cell in on_gpu for one in cell.subjects)


@pytest.mark.parametrize(("least_s", "taken"), [(0.0, 2), (1.0, 4), (0.3, 2)])
def test_short_batches_are_taken_more_often(monkeypatch: pytest.MonkeyPatch, least_s: float, taken: int) -> None:
    monkeypatch.setattr(serving, "generate_seconds", lambda *_: 0.25)
    settings = Settings(rows=(8,), prompt_tokens=32, lengths=(24,), repeat=4, least_s=least_s)
    seconds = serving.measure_decode(Mock(), settings)
    assert seconds == {"8": {"1": [0.25] * taken, "24": [0.25] * taken}}


def test_other_kernels_are_checked_where_they_are_timed() -> None:
    settings = plan_parts("decode", None, {"shape": "tiny", "strategies": ("native", STOCK)})["decode"]
    timed, truth = serving.decode_cells(settings, subject())
    assert [one.strategy for one in timed.subjects] == ["native", STOCK]
    assert (truth.table, [one.strategy for one in truth.subjects]) == ("truth", [STOCK])


def test_each_strategy_starts_once() -> None:
    native, merge, fold = (subject(strategy=name) for name in ("native", "merge-trl", "merge-fold"))
    cells = [
        Cell("memory/native", "memory", Mock(), (native,), fresh=True),
        Cell("sync/trl", "sync", Mock(), (native, merge), order=(0, 1, 1, 0)),
        Cell("sync/fold", "sync", Mock(), (native, fold), order=(0, 1, 1, 0)),
        Cell("decode/trl", "decode", Mock(), (native, merge), order=(0, 1, 1, 0)),
        Cell("truth/trl", "truth", Mock(), (merge,)),
    ]
    assert [cell.key for cell in by_strategy(cells)] == [
        "sync/trl",
        "decode/trl",
        "truth/trl",
        "sync/fold",
        "memory/native",
    ]


def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "partial.json"
    Partial(path, {"repeat": 2}, {"host_copy": 5.0}, time.monotonic()).keep("sync/x", {"rounds": []})
    resumed = Partial(path, {"repeat": 2}, {"host_copy": 9.0}, time.monotonic())
    assert (resumed.cells, resumed.bandwidth) == ({"sync/x": {"rounds": []}}, {"host_copy": 5.0})
    with pytest.raises(ConfigError, match="other settings"):
        Partial(path, {"repeat": 3}, {}, time.monotonic())


def test_a_run_lasts_as_long_as_all_its_starts(tmp_path: Path) -> None:
    path = tmp_path / "partial.json"
    Partial(path, {}, {}, time.monotonic() - 100).keep("sync/x", {"rounds": []})
    Partial(path, {}, {}, time.monotonic() - 10).save()
    assert Partial(path, {}, {}, time.monotonic() - 1).seconds == pytest.approx(111, abs=0.5)


def test_options_win_over_the_scenario(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text('[all]\nshape = "tiny"\nrepeat = 3\n[sync]\nrepeat = 5\n[step]\n')
    parts = plan_parts("all", path, {"rank": 8})
    assert list(parts) == ["sync", "step"]
    assert (parts["sync"].repeat, parts["step"].repeat, parts["sync"].rank) == (5, 3, 8)
    path.write_text("[snyc]\n")
    with pytest.raises(ConfigError, match="did you mean 'sync'"):
        plan_parts("all", path, {})
    path.write_text("[sync]\nrepeats = 3\n")
    with pytest.raises(ConfigError, match="did you mean 'repeat'"):
        plan_parts("all", path, {})


@pytest.mark.parametrize("part", ["decode", "step", "rollback"])
def test_a_part_that_has_nothing_to_compare_is_refused(part: str) -> None:
    """It would be a finished run that measured nothing."""
    with pytest.raises(ConfigError, match=f"{part} measures strategies beside native: .* --strategies merge-trl"):
        plan_parts(part, None, {"shape": "tiny", "strategies": ("native",)})


@pytest.mark.parametrize("path", sorted(Path("benchmarks/scenarios").glob("*.toml")), ids=lambda path: path.name)
def test_committed_scenarios_are_valid(path: Path) -> None:
    parts = plan_parts("all", path, {})
    assert len({settings.device for settings in parts.values()}) == 1


def test_too_big_a_model_is_refused_by_arithmetic() -> None:
    model = host.measure_model("qwen2.5-7b", None)
    settings = plan_parts("sync", None, {"shape": "qwen2.5-7b"})["sync"]
    with pytest.raises(ConfigError, match=r"needs about \d+\.\d GiB on cpu, where 22\.0 are free"):
        host.engine_share("sync", settings, model, {"free": 22 * GIB, "total": 24 * GIB})


def test_memory_levels_follow_an_allocation() -> None:
    before = level("cpu")
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert 60 << 20 < level("cpu") - before < 80 << 20
    del block


def test_another_process_that_ends_does_not_change_the_level() -> None:
    """The libraries that both had mapped are this process's alone then: a proportional set grows."""
    code = "import torch; print(flush=True); input()"
    arguments: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **arguments) as other:
        assert other.stdout is not None
        other.stdout.readline()
        before = level("cpu")
        other.communicate(b"\n")
    assert abs(level("cpu") - before) < 4 << 20


def test_measuring_memory_imports_nothing_more() -> None:
    """A worker meets the measurement when its levels are taken: what that imported would count as the syncs'."""
    measuring = suite.CELLS["memory"](Settings(repeat=1, strategies=("native",)), subject())[0].work.__module__
    code = f"""import importlib, sys, lora_grpo.bench.runner, lora_grpo.bench.strategies
before = set(sys.modules)
importlib.import_module({measuring!r})
print(sorted(set(sys.modules) - before))"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.strip() == "[]"


def test_what_grew_is_known_by_part() -> None:
    levels = Levels("cpu")
    first = torch.ones(64 << 20, dtype=torch.uint8)
    levels.seen("engine")
    second = torch.ones(32 << 20, dtype=torch.uint8)
    levels.seen("trainer")
    third = torch.ones(32 << 20, dtype=torch.uint8)
    levels.seen("engine")
    assert 28 << 20 < levels.grown["trainer"] < 40 << 20
    assert 88 << 20 < levels.grown["engine"] < 110 << 20
    assert levels.last - levels.start == sum(levels.grown.values())
    del first, second, third


# Comparison and report.


def test_compare_fails_in_both_directions() -> None:
    then = document([sync_row("native", 0.02, 0.02), sync_row("merge-trl", 1.0, 0.02)], [])
    same = document([sync_row("native", 0.04, 0.04), sync_row("merge-trl", 2.2, 0.04)], [])
    slower = document([sync_row("native", 0.04, 0.04), sync_row("merge-trl", 1.0, 0.04)], [])
    other = document([sync_row("native", 0.02, 0.02), sync_row("merge-trl", 2.0, 0.02)], [])
    assert [one[""] for one in compare(same, then, 0.2)] == [""]
    assert [one[""] for one in compare(slower, then, 0.2)] == ["outside"]
    assert [one[""] for one in compare(other, then, 0.2)] == ["outside"]


def test_compare_looks_at_proofs_and_copies_too() -> None:
    then, now = document([], []), document([], [])
    then.memory, now.memory = [memory_row("native-shared", 105)], [memory_row("native-shared", 210)]
    (copies,) = [one for one in compare(now, then, 0.3) if "copies of the base" in one["ratio to native"]]
    assert (copies["baseline"], copies["now"], copies[""]) == (1.05, 2.1, "outside")


def test_report_says_where_merging_wins(tmp_path: Path) -> None:
    made = document(
        [sync_row("native", 0.02, 0.02), sync_row("merge-fold", 0.01, 0.02), sync_row("merge-trl", 2.0, 0.02)],
        [
            decode_row("native", 0.010, 0.010),
            decode_row("merge-fold", 0.013, 0.010),
            decode_row("merge-trl", 0.008, 0.010),
        ],
    )
    text = write_report(made, tmp_path).read_text()
    assert "all-linear: native 20 ms, merge-fold 10 ms (0.5), merge-trl 2,000 ms (100)." in text
    assert "merge-trl wins from 991 tokens (extrapolated)" in text
    assert "merge-fold wins up to 4 tokens: its sync is 10.00 ms faster" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"sync-times.png", "sync-phases.png", "break-even.png"}


def test_a_wrong_policy_fails_and_bf16_noise_does_not() -> None:
    def verdict(error: float, same_bits: bool | None = None) -> str | None:
        found = {"error_nats": error, "noise_nats": 0.02, "signal_nats": 0.5, "same_bits": same_bits}
        cell = {"table": "truth", "labels": {"shape": "tiny"}, "rounds": [{"strategy": "x", "result": [found]}]}
        return fidelity.verdict(rows_of_one(cell)[0])

    assert verdict(0.05) is None
    assert verdict(float("nan")) is not None
    assert "x serves another policy" in str(verdict(0.2))
    assert verdict(0.05, True) is None
    assert "x gives the trainer another base than the checkpoint's" in str(verdict(0.05, False))


def test_readme_figures_are_replaced(tmp_path: Path) -> None:
    made = document([sync_row("native", 0.02, 0.02), sync_row("merge-trl", 1.0, 0.02)], [])
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    update_readme(made, readme)
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "native 20 ms, merge-trl 1,000 ms (50)." in text
    assert findings(made)[0] in text
    update_readme(made, readme)
    assert readme.read_text() == text
    readme.write_text(f"{text}<!-- gpu:begin -->\nnone yet\n<!-- gpu:end -->\n")
    made.card["device"] = "cuda:0"
    made.sync = [sync_row("native", 0.02, 0.02), sync_row("merge-trl", 0.6, 0.02)]
    update_readme(made, readme)
    assert readme.read_text().startswith(text)
    assert "none yet" not in readme.read_text()
    assert "native 20 ms, merge-trl 600 ms (30)." in readme.read_text()
    made.card["device"] = "cpu"
    readme.write_text("no block")
    with pytest.raises(ConfigError, match="bench:begin"):
        update_readme(made, readme)
