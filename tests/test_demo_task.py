"""The demo's task and its base model."""

import io
import itertools
import json
import os
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_grpo import demo

QUICK = demo.BaseRecipe(hidden_size=32, intermediate_size=32, layers=1, heads=1, steps=3, batch_size=4)


@pytest.mark.parametrize(
    ("a", "b", "prompt", "answer", "carry", "sloppy"),
    [
        (17, 58, "17+58=", "075", True, "065"),
        (47, 58, "47+58=", "105", True, "095"),
        (12, 34, "12+34=", "046", False, "046"),
        (90, 90, "90+90=", "180", False, "180"),
        (5, 5, "05+05=", "010", True, "000"),
        (99, 99, "99+99=", "198", True, "188"),
    ],
)
def test_problem(a: int, b: int, prompt: str, answer: str, carry: bool, sloppy: str) -> None:
    row = demo.problem(a, b)
    assert row == {"prompt": prompt, "answer": answer, "carry": carry}
    assert demo.without_carry(row) == sloppy


@pytest.mark.parametrize(("rows", "held_out"), [(demo.held_out_rows, True), (demo.training_rows, False)])
def test_rows_are_distinct_balanced_and_on_their_side(rows, held_out: bool) -> None:  # type: ignore[no-untyped-def]
    chosen = rows()
    prompts = [row["prompt"] for row in chosen]
    assert len(set(prompts)) == len(prompts)
    assert sum(row["carry"] for row in chosen) * 2 == len(chosen)
    assert {demo.is_held_out(prompt) for prompt in prompts} == {held_out}
    assert rows() == chosen
    # Rows come shuffled: a batch of consecutive ones has both halves.
    assert {row["carry"] for row in chosen[:32]} == {False, True}


def test_split_does_not_move() -> None:
    """Guards stored evaluations: in another split, held-out problems would be some that a stored version trained on."""
    held_out = [f"{a:02d}+{b:02d}=" for a in range(100) for b in range(100) if demo.is_held_out(f"{a:02d}+{b:02d}=")]
    assert len(held_out) == 1022
    assert held_out[:3] == ["00+01=", "00+03=", "00+09="]


def test_rows_are_the_callers_own() -> None:
    """A caller that adds to its rows must not change the next caller's."""
    demo.held_out_rows()[0]["answer"] = "spoiled"
    assert all(row["answer"] != "spoiled" for row in demo.held_out_rows())


def test_sloppy_sums_forget_only_carries() -> None:
    pairs = list(itertools.islice(demo.sloppy_sums(0, forgotten=0.7), 4000))
    assert not any(demo.is_held_out(prompt) for prompt, _ in pairs)
    forgotten = carries = 0
    for prompt, answer in pairs:
        row = demo.problem(int(prompt[:2]), int(prompt[3:5]))
        assert answer in (row["answer"], demo.without_carry(row))
        carries += row["carry"]
        forgotten += answer != row["answer"]
    # Five standard deviations of a binomial with 1,800 draws are 0.054.
    assert abs(forgotten / carries - 0.7) < 0.054


def test_task_needs_no_torch() -> None:
    code = "import sys, lora_grpo.demo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tokenizer_gives_one_token_a_character_and_comes_back(tmp_path: Path) -> None:
    demo.digit_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("17+58=").input_ids
    assert ids == [demo.TOKEN_ID[character] for character in "17+58="]
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "17+58="
    assert len(tokenizer) == len(demo.TOKENS)


def test_learning_rate_warms_up_and_decays() -> None:
    recipe = demo.BaseRecipe(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    assert recipe.learning_rate_at(0) == pytest.approx(0.1)
    assert recipe.learning_rate_at(50) == pytest.approx(0.55)
    assert recipe.learning_rate_at(100) == pytest.approx(0.1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lora-grpo"


def test_base_is_made_once_and_loads(cache: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    path = demo.ensure_base(QUICK, progress=lambda *now: seen.append(now))
    assert [(done, steps) for done, steps, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert [entry.name for entry in cache.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o755

    again = demo.ensure_base(QUICK, progress=lambda *now: pytest.fail("trained a second time"))
    assert again == path

    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    assert json.loads((path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(path).eos_token_id


def test_another_recipe_is_another_base() -> None:
    paths = {demo.base_path(replace(QUICK, **change)) for change in ({}, {"seed": 1}, {"forgotten": 0.6})}
    assert len(paths) == 3


def test_cache_follows_xdg(cache: Path) -> None:
    assert demo.base_path(QUICK).parent == cache


def test_pretraining_depends_on_its_seed_alone() -> None:
    """The caller's random state must neither change the base nor be changed by it."""
    torch.manual_seed(1)
    first = demo.pretrain(QUICK).state_dict()
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    second = demo.pretrain(QUICK).state_dict()
    other = demo.pretrain(replace(QUICK, seed=1)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_pretraining_learns_the_answers() -> None:
    losses: list[float] = []
    demo.pretrain(replace(QUICK, steps=40, warmup_steps=5, batch_size=32), lambda _, __, loss: losses.append(loss))
    # The end token is always the same, so its quarter of the loss (ln 14 / 4) goes first.
    assert losses[-1] < losses[0] - 0.5


def test_failed_making_leaves_nothing(cache: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.ensure_base(QUICK, progress=interrupt)
    assert list(cache.iterdir()) == []


def test_the_first_of_two_makers_wins(cache: Path) -> None:
    """A base that appears while ours is being made is used as it is, and ours is thrown away."""
    barrier = threading.Barrier(2)

    def wait_at_the_end(done: int, steps: int, _: float) -> None:
        if done == steps:
            barrier.wait(timeout=60)

    paths: list[Path] = []
    makers = [
        threading.Thread(target=lambda: paths.append(demo.ensure_base(QUICK, progress=wait_at_the_end)))
        for _ in range(2)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(paths) == 2
    assert len(set(paths)) == 1
    assert os.listdir(cache) == [paths[0].name]


def test_the_command_that_recomputes_the_demo_is_one_line_when_piped():
    """It is copied from a log."""
    result = dict.fromkeys(
        f"accuracy_{which}{when}" for which in ("", "hard_", "easy_") for when in ("before", "after")
    )
    result = {**dict.fromkeys(result, 0.5), "groups_with_signal_mean": 0.5, "logprob_gap_mean": 0.1, "sync_median_s": 1}
    told = io.StringIO()
    demo._tell(Console(file=told, width=80), result, "runs/a-longer-name/of-a-demo")
    assert told.getvalue().endswith("recompute with: lora-grpo eval runs/a-longer-name/of-a-demo\n")
