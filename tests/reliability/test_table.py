"""docs/reliability.md lists what the marks say, and nothing else."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest

from tests.reliability.table import Row, document, line_of, tried

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"


def marks() -> list[Row]:
    """Of every test in this folder, run or not."""
    found: list[Row] = []
    for path in sorted(HERE.rglob("test_*.py")):
        module = imported(path)
        for _, thing in inspect.getmembers(module):
            own = getattr(thing, "__module__", None) == module.__name__
            own_marks = getattr(thing, "pytestmark", []) if own else []
            found += [Row(*mark.args) for mark in own_marks if mark.name == "tried"]
    return found


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_marks_of_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_a_row_for_each_mark_and_no_other() -> None:
    if not PAGE.is_file():
        pytest.skip("docs/reliability.md is not made yet: make reliability")
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    listed = {tuple(line.split(" | ")[:-1]) for line in lines if not line.startswith("| ---")}
    listed.discard(("| tried", "what happens"))
    expected = {tuple(line_of(row.what, row.happens, "").split(" | ")[:-1]) for row in marks()}
    assert listed == expected, "make reliability"


def test_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.reliability.table._HEAD", "# A\n")
    rows = [
        Row("Errors", "b|c", "d", {("passed", "")}),
        Row("Bundles", "e", "f", {("passed", ""), ("skipped", "no g")}),
        Row("Bundles", "e", "f", {("passed", "")}),
        Row("Bundles", "a", "f"),
    ]
    head = "| tried | what happens | outcome |\n| --- | --- | --- |\n"
    assert document(rows) == (
        f"# A\n\n## Bundles\n\n{head}| a | f | not run |\n| e | f | skipped: no g |\n"
        f"\n## Errors\n\n{head}| b\\|c | d | passed |\n"
    )


def test_a_mark_names_a_section() -> None:
    with pytest.raises(ValueError, match="no section 'Bundle'"):
        tried("Bundle", "a", "b")
