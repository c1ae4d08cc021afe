"""Errors are one line each, and their tree is the one that the module's docstring draws."""

from __future__ import annotations

import inspect
import re

import pytest

from himix_edge import errors
from himix_edge.errors import HimixError, closest


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (HimixError("a.png is gone"), "a.png is gone"),
        (HimixError("it broke", expected="3"), "it broke: expected 3"),
        (HimixError("it broke", found="4"), "it broke: found 4"),
        (HimixError("it broke", fix="try again"), "it broke. Fix: try again"),
        (
            HimixError("it broke", expected="3", found="4", fix="try again"),
            "it broke: expected 3, found 4. Fix: try again",
        ),
    ],
)
def test_an_error_is_one_line(error: HimixError, line: str) -> None:
    assert str(error) == line


def test_an_error_keeps_its_parts() -> None:
    error = errors.BundleError("it broke", expected="3", found="4", fix="try again")
    assert (error.failed, error.expected, error.found, error.fix) == (
        "it broke",
        "3",
        "4",
        "try again",
    )


def test_the_docstring_draws_the_tree() -> None:
    drawn = re.findall(r"^([ │├└─]*)(\w+Error) {2,}(.+)$", inspect.getdoc(errors) or "", re.M)
    parents: list[str] = []  # of the line at hand, from the root
    tree = {}
    for indent, name, meaning in drawn:
        del parents[len(indent) // 4 :]
        tree[name] = parents[-1] if parents else "Exception"
        parents.append(name)
        if name != "HimixError":
            doc = inspect.getdoc(getattr(errors, name)) or ""
            assert doc.lower() == f"{meaning.lower()}."

    defined = {
        name: one.__base__.__name__
        for name, one in vars(errors).items()
        if inspect.isclass(one) and one.__module__ == errors.__name__ and one.__base__
    }
    assert tree == defined
    assert len(tree) > 5


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("visoin", "did you mean 'vision'?"),
        ("Decoder", "did you mean 'decoder'?"),
        ("zzz", "use one of: vision, decoder"),
        ("", "use one of: vision, decoder"),
    ],
)
def test_closest(name: str, phrase: str) -> None:
    assert closest(name, ["vision", "decoder"]) == phrase
