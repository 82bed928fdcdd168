"""`lora-grpo report`: one page that needs no network and no script, escapes what it is told, and stays small."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lora_grpo.adapters.store import AdapterStore
from lora_grpo.adapters.upkeep.rollbacks import roll_back_stopped
from lora_grpo.metrics.page import MOST_CHARACTERS, MOST_DOTS, MOST_LANES, Lineage, render_page, tree
from lora_grpo.metrics.reporter import Reporter
from lora_grpo.report import lineage, write_report
from tests.store_files import adapter
from tests.test_cli import lora_grpo
from tests.test_metrics import STEP

HOSTILE = "<script>document.title='owned'</script><img src=http://evil.example/x onerror=alert(1)> {{ 7*7 }} '\"&"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<iframe id=page width=400 height=900 srcdoc="{page}"></iframe><div id=found></div><script>
onload = () => {{ const page = document.getElementById("page").contentDocument, root = page.documentElement;
document.getElementById("found").textContent = JSON.stringify({{ width: root.scrollWidth, title: page.title,
scripts: page.scripts.length, images: page.images.length, paths: page.querySelectorAll("figure path").length,
height: page.querySelector("figure svg").getBoundingClientRect().height, text: page.body.innerText }}) }}</script>"""


@pytest.fixture
def run(tmp_path: Path, shm_dir: Path) -> Path:
    """Five versions, of which the third and fourth were given up, and everything that a run writes of them."""
    run = tmp_path / "run <b>"
    with Reporter(run, 4, view=False) as reporter:
        reporter.start({"model": f"tiny {HOSTILE}", "base_match": "30 of 30 tensors equal", "probe": {"noise": 0.01}})
        for step, reward in enumerate((0.25, 0.5, 0.125), 1):
            reporter.step(step, {**STEP, "reward": reward, "version": step, "sync/prove_s": 0.002})
            row = {"prompt": [{"role": "user", "content": HOSTILE}], "completion": HOSTILE, "reward": reward}
            reporter.samples(step, [{**row, "version": step}] * 20)
        for _ in range(2):
            reporter.message("a hint that every start gives")
        reporter.rollback(1, f"guard: {HOSTILE}")
        reporter.step(2, {**STEP, "reward": 0.75, "version": 5})
        reporter.message(HOSTILE)
        reporter.end({"reward_before": 0.25, "reward_after": 0.75})
    with AdapterStore(shm_dir / "store", archive=run) as store:
        for number in range(1, 5):
            store.promote(store.publish(adapter(number), step=number - 1))
            store.record(number, reward=number / 8)
        roll_back_stopped(store, 2)
        store.promote(store.publish(adapter(5), step=2, parent=2))
        store.record(5, reward=0.75)
    (run / "evaluations").mkdir()
    for number, rewards in ((1, (0.0, 1.0)), (5, (1.0, 1.0))):
        rows = [{"prompt": "1+1=", "completion": f"{HOSTILE} v{number} \ud800", "reward": reward} for reward in rewards]
        (run / "evaluations" / f"{number:06d}.json").write_text(json.dumps({"version": number, "rows": rows}))
    return run


def test_a_page_tells_of_every_part_and_escapes_all_of_it(run: Path) -> None:
    done = lora_grpo("report", str(run), cwd=run.parent)
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "report.html")), done.stderr
    page = (run / "report.html").read_text(encoding="utf-8")
    for tag in ("<script", "<img", "<b>"):
        assert tag not in page
    for loads in ("src=", "href=", "url(", "@import"):
        assert loads not in page.replace("src=http://evil", "")
    assert page.count("&lt;script&gt;document.title") > 10
    assert "{{ 7*7 }}" in page
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    for words in (
        "30 of 30 tensors equal",
        "1 proven, 2 ms each",
        "v4 back to v2",
        "v5 HEAD, best",
        "given up2 steps that a",
    ):
        assert words in text, words
    for words in (
        "0.25 before, 0.75 after",
        "1 got another reward from v5 than from\nv1",
        "8 more, in samples.jsonl",
    ):
        assert words in text, words
    assert "given up 0.125" in text
    assert text.count("a hint that every start gives") == 1
    assert re.search(r"\b1 (\w+s|more are|\w+ ones are)\b", text) is None


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to render the page")
def test_a_browser_shows_it_at_400_pixels_and_runs_nothing(run: Path) -> None:
    write_report(run, run / "report.html")
    frame = run.parent / "frame.html"
    page = (run / "report.html").read_text(encoding="utf-8")
    frame.write_text(MEASURE.format(page=html.escape(page)), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={run.parent / 'profile'}", "--dump-dom"]
    shown = subprocess.run([str(CHROMIUM), *flags, frame.as_uri()], capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(shown.stdout.split('<div id="found">')[1].split("</div>")[0]))
    assert found["width"] <= 400
    assert (found["scripts"], found["images"]) == (0, 0)
    assert found["title"] == "run <b> · lora_grpo"
    assert found["paths"] >= 6
    assert found["height"] > 100
    assert "<script>document.title='owned'</script>" in found["text"]


def test_a_watched_page_follows_a_run_to_its_end(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere.html"
    program = [sys.executable, "-m", "lora_grpo", "report", str(run), "--out", str(out), "--watch", "1"]
    with (
        AdapterStore(archive=run) as store,
        subprocess.Popen(program, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watching,
    ):
        beside = threading.Thread(target=write_report, args=(run,), kwargs={"watch": 1.0})
        beside.start()
        while not (out.exists() and (run / "report.html").exists()) and watching.poll() is None:
            time.sleep(0.05)
        for path in (out, run / "report.html"):
            page = path.read_text(encoding="utf-8")
            assert 'http-equiv="refresh" content="1.0"' in page
            assert "going on" in page
        store.promote(store.publish(adapter(6), step=3))
        store.close()
        assert watching.wait(60) == 0
        beside.join(60)
    for path in (out, run / "report.html"):
        page = path.read_text(encoding="utf-8")
        assert "v6 HEAD" in page
        assert "going on" not in page
        assert "refresh" not in page


def test_a_long_run_makes_a_small_page_that_says_what_it_lacks(tmp_path: Path) -> None:
    with Reporter(tmp_path / "run", 3000, view=False) as reporter:
        for step in range(1, 3001):
            reporter.step(step, STEP)
        for step in range(1, 101):
            reporter.samples(step, [{"prompt": "p", "completion": "long " * 5000, "reward": 1.0}] * 50)
    versions: dict[int, int | None] = {number: number - 1 or None for number in range(1, 30_001)}
    versions |= dict.fromkeys(range(100, 10_000, 100), 1)
    page = render_page(tmp_path / "run", Lineage(versions, head=30_000))
    assert len(page) < 600_000
    for words in (
        "mean of some neighbours",
        "last 12 of 100 logged steps",
        "38 more, in samples",
        "characters more",
    ):
        assert words in page
    assert "More branches are left out: 75" in page
    assert f"({25_000 - MOST_CHARACTERS:,} characters more)" in page


def test_a_rollback_to_before_the_first_step_is_marked_at_the_left_edge(tmp_path: Path) -> None:
    with Reporter(tmp_path / "run", 2, view=False) as reporter:
        for step in (1, 2):
            reporter.step(step, STEP)
        reporter.rollback(0, "back to the start")
        for step in (1, 2):
            reporter.step(step, STEP)
    page = render_page(tmp_path / "run", Lineage({1: None}))
    assert '<line class="mark" x1="0.0" y1="0" x2="0.0" y2="160"><title>back to the start</title>' in page


def test_a_branch_that_was_given_up_has_a_lane_below_and_a_way_back() -> None:
    parents: dict[int, int | None] = {1: None, 2: 1, 3: 2, 4: 3, 5: 2, 6: 5, 7: 6, 8: 5}
    drawn = tree(Lineage(parents, head=8, best=4, rollbacks=[(4, 2, "why"), (7, 5, "")]))
    assert [kind for _, kind in drawn["paths"]] == ["main", "lost", "lost"]
    # Versions 6 and 7 leave the line behind version 5, where the lane of 3 and 4 is free again.
    assert drawn["lanes"] == 1
    assert [words for _, words in drawn["back"]] == ["v4 back to v2 why", "v7 back to v5"]
    labels = {label for *_, label in drawn["dots"]}
    assert {"v8 HEAD", "v4 best", "v1"} <= labels
    many: dict[int, Any] = {1: None, **dict.fromkeys(range(2, 200), 1)}
    wide = tree(Lineage(many, head=1, rollbacks=[(n, 1, "") for n in range(2, 200)]))
    assert (wide["lanes"], wide["hidden"]) == (MOST_LANES, 198 - MOST_LANES)
    assert len(wide["dots"]) <= MOST_DOTS + 2


def test_a_run_without_a_step_or_a_log_has_a_page_too(tmp_path: Path, shm_dir: Path) -> None:
    """As one that has just begun, or a loop of the user's own."""
    AdapterStore(shm_dir / "store", archive=tmp_path / "run").close()
    assert "No step is done yet" in render_page(tmp_path / "run", lineage(tmp_path / "run"))
