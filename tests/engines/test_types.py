"""Every call that we make of TensorRT, against the types of the versions that devices have.

And every class that a test pretends to have from it.
"""

from __future__ import annotations

import enum
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import fake_builder
from tests.engines.drift import differences
from tests.engines.stubs import CACHE, VERSIONS, NoStubsError, alone, stubs

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "himix_edge"
USERS = sorted(
    path for path in PACKAGE.rglob("*.py") if "import tensorrt" in path.read_text(encoding="utf-8")
)
BUILDER = PACKAGE / "engines" / "trt.py"


def mypy(version: str, *files: Path) -> list[str]:
    """mypy's errors in these files, with the project's own settings and TensorRT's types."""
    try:
        folder = stubs(version)
    except NoStubsError as error:
        pytest.skip(f"TensorRT's bindings can't be had: {error}")
    # What follows from an import is checked by the project's own run of mypy.
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--no-error-summary"]
    command += ["--cache-dir", str(CACHE / "mypy")]  # one for all: only TensorRT differs
    with alone():
        done = subprocess.run(
            [*command, *map(str, files)],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "MYPYPATH": str(folder)},
        )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if ": error: " in line]


def test_the_list_of_users_is_whole() -> None:
    assert BUILDER in USERS


@pytest.mark.parametrize("version", VERSIONS)
def test_every_use_of_tensorrt_has_the_right_types(version: str) -> None:
    assert mypy(version, *USERS) == []


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("10.3.0", ["set_memory_pool_limits"]),  # FP16 was there
        ("11.4.0.106", ["FP16", "set_memory_pool_limits"]),
    ],
)
def test_the_check_finds_what_is_wrong(tmp_path: Path, version: str, expected: list[str]) -> None:
    planted = tmp_path / "planted.py"
    text = BUILDER.read_text(encoding="utf-8")
    for right, wrong in (
        ("BuilderFlag.VERSION_COMPATIBLE", "BuilderFlag.FP16"),
        ("config.set_memory_pool_limit(", "config.set_memory_pool_limits("),
    ):
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    planted.write_text(text, encoding="utf-8")
    errors = mypy(version, planted)
    missing = [error.split(' has no attribute "')[1].split('"')[0] for error in errors]
    assert sorted(missing) == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_the_fake_builder_is_like_the_real_one(version: str) -> None:
    assert len(fake_builder.CLASSES) >= 17
    assert drift(fake_builder.CLASSES, version) == []


def test_drift_is_found() -> None:
    class BuilderFlag(enum.Enum):
        FP16 = 1
        STRIP_PLAN = 2

    class Builder:
        max_workspace_size = 0

        def create_network(self, flag: int) -> None: ...

    class ILogger:
        class Severity(enum.Enum):
            ERROR = 1
            MISTAKE = 2

    class IBuilder: ...

    found = ["Builder.max_workspace_size", "Builder.create_network(self, flag)"]
    found += ["ILogger.Severity.MISTAKE", "IBuilder"]
    fakes = (BuilderFlag, Builder, ILogger, IBuilder)
    assert drift(fakes, "11.4.0.106") == ["BuilderFlag.FP16", *found]
    assert drift(fakes, "10.3.0") == found


def drift(fakes: tuple[type, ...], version: str) -> list[str]:
    try:
        return differences(fakes, version)
    except NoStubsError as error:
        pytest.skip(f"TensorRT's bindings can't be had: {error}")
