"""One table of TensorRT's versions: `doctor` and `build` say the same of every one of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from himix_edge.contract import Dialect
from himix_edge.doctor.facts import JETPACK, Facts, Module
from himix_edge.doctor.judge import judge
from himix_edge.engines.plan import plan_build
from himix_edge.engines.store import EngineDevice
from himix_edge.engines.versions import (
    FIRST_TENSORRT,
    reads,
    tensorrt_of_jetpack,
    version_of,
    version_text,
)
from himix_edge.errors import EngineError
from himix_edge.targets import TARGETS
from tests.doctor import boards
from tests.engines.stubs import VERSIONS

DOCUMENTS = Path(__file__).parents[2] / "docs"
# Of every version: whether it reads portable graphs, and native ones.
TABLE = {
    "8.6.2": (False, False),
    "9.3.0": (False, False),
    "10.0.1": (False, False),
    "10.1.0": (False, False),
    "10.3.0": (True, False),
    "10.3.0.30-1+cuda12.5": (True, False),
    "10.9": (True, False),
    "10.14.1.48": (True, False),
    "10.15.1.29": (True, True),
    "10.16.1.11": (True, True),
    "11.0.0": (True, True),
    "11.4.0.106": (True, True),
    "12": (True, True),
    "100.0": (True, True),
    "": (False, False),
    "unknown": (False, False),
    "v10.16": (False, False),
    "10": (False, False),
    "10.x": (False, False),
    "10.3rc1": (True, False),
}


@pytest.mark.parametrize(("version", "expected"), TABLE.items())
def test_the_table(version: str, expected: tuple[bool, bool]) -> None:
    found = version_of(version)
    assert (reads(found, "portable"), reads(found, "native")) == expected
    assert not reads(found, "ort")


@pytest.mark.parametrize(("version", "expected"), TABLE.items())
@pytest.mark.parametrize("dialect", ["portable", "native"])
def test_build_and_doctor_agree(
    bundle: Path,
    portable_bundle: Path,
    become: Callable[..., EngineDevice],
    tmp_path: Path,
    version: str,
    expected: tuple[bool, bool],
    dialect: Dialect,
) -> None:
    right = expected[dialect == "native"]
    become(version)
    chosen = portable_bundle if dialect == "portable" else bundle
    if right:
        assert plan_build(chosen).ready_key().device.version == version
    else:
        needed = version_text(FIRST_TENSORRT[dialect])
        with pytest.raises(EngineError, match=f"expected TensorRT {needed} or later"):
            plan_build(chosen)
    orin = boards.facts_of(tmp_path / "orin", boards.ORIN_FILES, boards.ORIN_ANSWERS)
    card = boards.facts_of(tmp_path / "pc", boards.PC_FILES, boards.PC_ANSWERS)
    board, pc = judge(with_tensorrt(orin, version)), judge(with_tensorrt(card, version))
    assert ("jetpack-7.2" in board.targets, "tensorrt" in pc.targets) == (expected[1],) * 2
    assert ("jetpack-6.2" in board.targets) == expected[0]
    assert ("tensorrt" not in board.devices["tensorrt"]) == expected[0]


def with_tensorrt(facts: Facts, version: str) -> Facts:
    """The same device where TensorRT is of that version, and apt knows of none."""
    modules = {**facts.modules, "tensorrt": Module(version)}
    return dataclasses.replace(facts, modules=modules, packages={}, l4t=None)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("10.3.0.30-1+cuda12.5", (10, 3, 0, 30)),
        ("10.16", (10, 16)),
        ("8.7", (8, 7)),
        ("10.", (10,)),
        ("", ()),
        (None, ()),
        ("unknown", ()),
        ("\u0661\u0660.3", ()),  # digits of another script
        ("9" * 5000, ()),
    ],
)
def test_versions(text: str | None, version: tuple[int, ...]) -> None:
    assert version_of(text) == version


def test_versions_compare_as_numbers() -> None:
    ordered = ["", "8.6.2", "10", "10.3.0", "10.9", "10.15.1", "10.16.1.11", "10.16.2", "11.0"]
    numbers = [version_of(text) for text in ordered]
    assert all(one < other for one, other in itertools.pairwise(numbers))


def test_what_the_types_are_checked_against_is_read() -> None:
    assert all(reads(version_of(version), "portable") for version in VERSIONS)
    assert version_of(VERSIONS[0])[:2] == FIRST_TENSORRT["portable"]


@pytest.mark.parametrize("name", ["jetpack-6.2", "jetpack-7.2"])
def test_a_jetpack_has_the_tensorrt_of_its_target(name: str) -> None:
    release = name.removeprefix("jetpack-")
    [l4t] = [linux for linux, jetpack in JETPACK.items() if jetpack == release]
    tensorrt = tensorrt_of_jetpack(l4t)
    assert TARGETS[name].engine == f"TensorRT {version_text(tensorrt)}"
    assert reads(tensorrt, TARGETS[name].dialect)


@pytest.mark.parametrize(("l4t", "jetpack"), JETPACK.items())
def test_every_jetpack(l4t: str, jetpack: str) -> None:
    expected = {
        "5": (),
        "6.0": (8, 6),
        "6": (10, 3),
        "7.0": (10, 13),
        "7.1": (10, 13),
        "7": (10, 16),
    }
    named = next(name for name in (jetpack[:3], jetpack[0]) if name in expected)
    assert tensorrt_of_jetpack(l4t) == expected[named]


def test_the_documents_say_the_same() -> None:
    native = version_text(FIRST_TENSORRT["native"])
    assert TARGETS["tensorrt"].engine == f"TensorRT {native} or later"
    for name in ("jetpack-6.2", "jetpack-7.2", "tensorrt"):
        target = TARGETS[name]
        row = f"| `{name}` | {target.dialect} | {target.dtype} | {target.engine}"
        assert row in (DOCUMENTS / "tensorrt.md").read_text(encoding="utf-8")
    said = (DOCUMENTS / "jetson.md").read_text(encoding="utf-8")
    assert "| TensorRT | 10.3 | 10.16 |" in said
    assert "have TensorRT 10.13" in said
