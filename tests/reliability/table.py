"""What was tried against the program, and what happened: the rows of docs/reliability.md."""

from __future__ import annotations

from collections.abc import Callable
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
