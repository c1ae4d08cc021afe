"""What README and docs print works as printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main

from himix_edge.cli import app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
LIBRARY = ROOT / "docs" / "library.md"
PAGES = [README, *sorted((ROOT / "docs").glob("**/*.md"))]
# Why a block is not run: it sets up a machine, downloads, or needs other hardware or much time.
NOT_RUN = ("setup", "hub", "gpu", "llava", "large")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what stands beside that, its text."""

    language: str
    note: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w+) ?(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(*block) for block in found]


def commands(page: Path) -> list[list[str]]:
    """Every `himix-edge` line, in a fenced block or an indented one, as the shell splits it."""
    text = page.read_text()
    shells = [block.text for block in blocks(page) if block.language in ("sh", "bash")]
    indented = re.findall(r"^    (himix-edge (?:.*\\\n)*.*)$", text, re.MULTILINE)
    fenced = re.findall(r"^(himix-edge (?:.*\\\n)*.*)$", "\n".join(shells), re.MULTILINE)
    lines = (line.replace("\\\n", " ") for line in indented + fenced)
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, with `himix-edge` and `python` on the path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("himix-edge", "-m himix_edge"), ("python", "")):
        path = programs / name
        path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HIMIX_EDGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def run(command: list[str], folder: Path, text: str) -> str:
    done = subprocess.run(
        command, cwd=folder, input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_readme_and_the_library_page_run_from_top_to_bottom(folder: Path) -> None:
    printed: list[str] = []
    for block in blocks(README):
        if block.language == "sh" and not block.note:
            printed.append(run(["bash", "-e"], folder, block.text))
        elif block.language == "python":
            printed.append(run(["python", "-W", "error", "-"], folder, block.text))
    whole = "\n".join(printed)
    right = (
        "A large green square, a large orange ring, a small yellow triangle and a large red ring."
    )
    assert whole.count(right) == 3  # on the command line, from the signed bundle, in the app
    assert '"finish_reason": "stop"' in whole
    assert re.search(r"^Four\.?$|^4\.?$", whole, re.MULTILINE)
    assert re.search(r"^One\.$", whole, re.MULTILINE)
    library = "\n".join(block.text for block in blocks(LIBRARY))
    assert run(["python", "-W", "error", "-"], folder, library).count(right) == 2


def test_what_is_not_run_says_why() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "sh":
                assert block.note in ("", *NOT_RUN), f"{page}: {block}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_printed_command_is_one(page: Path) -> None:
    """It parses: the command, its options and their types are there."""
    program = typer.main.get_command(app)
    for arguments in commands(page):
        if arguments[0].startswith("--"):
            continue  # it would be done at once
        with program.make_context(
            "himix-edge", list(arguments), resilient_parsing=False
        ) as context:
            name, command, rest = program.resolve_command(context, list(arguments))  # type: ignore[attr-defined]
            command.make_context(name, rest, parent=context).close()


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page}: {target}"
