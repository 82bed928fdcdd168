"""What the README and the pages say is there: links, files, commands, settings, errors, and the generated page."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import lora_grpo.errors
from lora_grpo.bench.plan import _CLASSES
from lora_grpo.cli import COMMANDS
from lora_grpo.config_file import describe_settings
from tests.reference_page import PAGE, page

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "examples").rglob("*.md"))]
SETTINGS = {setting.key for setting in describe_settings()}
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(path: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= 10_000


def test_programs_of_the_readme_are_files() -> None:
    """`test_examples` runs those files."""
    blocks = re.findall(r"^```(python|toml)\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    files = {"python": ["gsm8k.py", "own_loop.py"], "toml": ["gsm8k.toml"]}
    texts = {kind: [(ROOT / "examples" / name).read_text() for name in names] for kind, names in files.items()}
    # A file may be cells as well.
    expected = {(kind, re.sub("^# %%.*\\n", "", text, flags=re.M)) for kind, each in texts.items() for text in each}
    assert set(blocks) == expected


def test_the_new_import_of_a_trl_script_is_the_examples() -> None:
    """`test_trl_example` runs that one."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    assert added[0] == "from trl import GRPOConfig"
    assert added[1:] == re.findall(r"^from lora_grpo.integrations.*", (ROOT / "examples/trl_grpo.py").read_text(), re.M)


@each_page
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text().replace("\n", " ")):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{path.name} links to {link}: no such heading"


@each_page
def test_what_is_named_exists(path: Path) -> None:
    text = path.read_text()
    makes = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    sections = "|".join(sorted({key.partition(".")[0] for key in SETTINGS if "." in key}))
    assert set(re.findall(r"\blora-grpo ([a-z][a-z-]*)", text)) <= {*COMMANDS, "installed", "beside"}
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= makes
    assert set(re.findall(rf"`((?:{sections})\.[a-z_]+)\b(?!\()", text)) <= {*SETTINGS, "engine.log"}
    for name in re.findall(r"`((?:lora_grpo|tests|benchmarks|examples)/[\w/]+(?:\.\w+)?)", text):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


@each_page
def test_settings_and_programs_of_a_page_can_be_read(path: Path) -> None:
    for kind, block in re.findall(r"^```(python|toml)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE):
        if kind == "toml":
            sections = {name: value for name, value in tomllib.loads(block).items() if isinstance(value, dict)}
            assert {f"{name}.{key}" for name, values in sections.items() for key in values} <= SETTINGS
        elif path != PAGE:
            compile(block, str(path), "exec")


def test_every_error_is_explained() -> None:
    text = (ROOT / "examples" / "docs" / "troubleshooting.md").read_text()
    names = {name for name, value in vars(lora_grpo.errors).items() if isinstance(value, type)}
    assert {name for name in names if f"`{name}`" in text} == names


def test_every_strategy_is_explained() -> None:
    text = (ROOT / "examples" / "docs" / "benchmark.md").read_text()
    table = text.partition("| strategy |")[2].partition("\n\n")[0]
    assert {name for line in table.splitlines() for name in re.findall(r"`([a-z -]+)`", line.split(" | ")[0])} == {
        *_CLASSES
    }


def test_the_index_has_every_page() -> None:
    folder = ROOT / "examples" / "docs"
    text = (folder / "README.md").read_text()
    assert [
        path.name for path in folder.glob("*.md") if path.name != "README.md" and f"({path.name})" not in text
    ] == []


def test_the_reference_is_of_this_code() -> None:
    assert PAGE.read_text() == page(), "run `make reference`"
