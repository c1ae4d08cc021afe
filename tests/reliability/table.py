"""What was tried against the program, and what happened: the rows of docs/reliability.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., None])
SECTIONS = ("Bundles", "Engines", "Pictures", "Prompts", "Network", "Interruptions", "Errors")


def tried(section: str, what: str, happens: str) -> Callable[[Test], Test]:
    """Marks a test as a row of the table: what is tried, and what the test proves to happen.

    Args:
        section: one of SECTIONS.
        what: the attack or the fault, for people: "a manifest that names ../../.bashrc".
        happens: the outcome that the test asserts: "refused, nothing is written".
    """
    if section not in SECTIONS:
        raise ValueError(f"no section {section!r}: use one of {SECTIONS}")

    def mark(test: Test) -> Test:
        marked: Test = pytest.mark.tried(section, what, happens)(test)
        return marked

    return mark


@dataclass
class Row:
    """What was tried, and how the tests of it ended: "passed", or "skipped" and why."""

    section: str
    what: str
    happens: str
    outcomes: set[tuple[str, str]] = field(default_factory=set)

    @property
    def outcome(self) -> str:
        """In a word or two."""
        if not self.outcomes:
            return "not run"
        worst = sorted(self.outcomes, key=lambda each: (_BADNESS.index(each[0]), each[1]))[0]
        return f"{worst[0]}: {worst[1]}" if worst[1] else worst[0]


_BADNESS = ("failed", "skipped", "passed")
_HEAD = """# What was tried, and what happened

Attacks and faults, each a test in `tests/reliability/`. `make reliability` writes this page, and a
test compares its rows with the tests. [security.md](security.md) says what is promised.
"""


def document(rows: Iterable[Row]) -> str:
    """docs/reliability.md: a table for each section, a row for each thing that was tried."""
    merged: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = row.section, row.what, row.happens
        merged.setdefault(key, Row(*key)).outcomes.update(row.outcomes)
    parts = [_HEAD]
    for section in SECTIONS:
        own = [merged[key] for key in sorted(merged) if key[0] == section]
        if own:
            lines = [line_of(row.what, row.happens, row.outcome) for row in own]
            head = ["| tried | what happens | outcome |", "| --- | --- | --- |"]
            parts.append("\n".join([f"## {section}", "", *head, *lines, ""]))
    return "\n".join(parts)


def line_of(*cells: str) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
