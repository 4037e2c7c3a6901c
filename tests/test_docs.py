"""The documentation is run, not trusted: README code, commands that pages name, a page for every method."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

import danlu
from danlu.context.stacks import METHODS, parse_methods
from danlu.lab import claims

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
METHOD_PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))


def _blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _commands(path: Path) -> list[list[str]]:
    """Words of every ``danlu ...`` command that a page names in a console block or between backticks."""
    text = path.read_text(encoding="utf-8")
    lines = [line.removeprefix("$ ") for block in _blocks(path, "(?:console|sh)") for line in block.splitlines()]
    found = [line for line in [*lines, *re.findall(r"`(danlu [^`\n]+)`", text)] if line.startswith("danlu ")]
    return [line.split("#")[0].split()[1:] for line in found]


def _check(command: Any, words: list[str]) -> None:
    """Follow the words down the command tree; every option must exist."""
    while hasattr(command, "get_command") and words and not words[0].startswith("-"):
        context = typer.Context(command)
        found = command.get_command(context, words[0])
        assert found, f"no command {words[0]!r}, known: {command.list_commands(context)}"
        command, words = found, words[1:]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in options, f"{command.name} has no option {word}, known: {sorted(options)}"


def test_readme_code_runs():
    namespace: dict[str, object] = {}
    blocks = _blocks(ROOT / "README.md", "python")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    prompt, output = namespace["prompt"], namespace["output"]
    assert prompt["input_ids"].shape[1] > namespace["model"].config.max_position_embeddings
    assert output.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_exist(path):
    from danlu.cli import app

    for words in _commands(path):
        _check(typer.main.get_command(app), list(words))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_written_methods_parse(path):
    for words in _commands(path):
        if "--methods" in words:
            for text in words[words.index("--methods") + 1].split(","):
                parse_methods(text)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_blocks_compile_and_use_public_names(path):
    for block in _blocks(path, "python"):
        compile(block, path.name, "exec")
        for name in re.findall(r"\bdanlu\.([A-Za-z]\w*)", block):
            folders = {path.name for path in Path(danlu.__file__).parent.iterdir() if path.is_dir()}
            assert hasattr(danlu, name) or name in folders, name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_make_targets_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = re.findall(r"^\$ make ([a-z-]+)|`make ([a-z-]+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {first or second for first, second in named} <= targets


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_local_links_and_pictures_exist(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} points to {target}, which does not exist"


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_method_has_a_page(method):
    naming = [
        page.name for page in METHOD_PAGES if re.search(rf"\b{method.__name__}\b", page.read_text(encoding="utf-8"))
    ]
    assert naming, f"no page in docs/methods names {method.__name__}"


def test_api_page_lists_exactly_the_public_names():
    listed = re.findall(r"^\.\. auto\w+:: danlu\.(\w+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == danlu.__all__


def test_readme_table_has_every_claim_and_its_verdict():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- lab:begin")[1].split("<!-- lab:end")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert {row[2].strip("`") for row in rows if row[2] != "-"} == set(claims())
    assert [row[0] for row in rows if not row[3]] == [], "no verdict: run make lab, then scripts/publish_lab.py"
