"""No library that is imported here reports anything home, unless the user wants it to."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import himix_edge
from himix_edge.telemetry import ONNX_RUNTIME, VARIABLES, turn_off_session_events

PACKAGE = Path(himix_edge.__file__).parent
ROOT = PACKAGE.parent


def imported_by(path: Path) -> Iterator[str]:
    """The top packages that a file imports, by a statement or by import_module or __import__."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func).rpartition(".")[2]
            names = [str(node.args[0].value)] if function in ("import_module", "__import__") else []
        yield from (name.partition(".")[0] for name in names)


def test_the_package_imports_onnxruntime_in_one_place() -> None:
    found = [path for path in PACKAGE.rglob("*.py") if "onnxruntime" in imported_by(path)]
    assert [path.relative_to(PACKAGE).as_posix() for path in found] == ["runtimes/providers.py"]


def test_benchmarks_that_import_onnxruntime_inherit_the_variable() -> None:
    """They run in environments of the peers, without himix_edge, started by what imports it."""
    folder = ROOT / "benchmarks"
    reporting = {"onnxruntime", "onnxruntime_genai"}
    found = [path for path in folder.rglob("*.py") if reporting & set(imported_by(path))]
    strangers = {path.name for path in found if "himix_edge" not in imported_by(path)}
    assert strangers == {"on_onnxruntime.py", "on_genai.py", "make_encoders.py"}
    for starter in ("crew.py", "make.py"):
        assert "himix_edge" in imported_by(folder / "peers" / starter)


@pytest.mark.parametrize(
    ("value", "becomes"), [(None, "1"), ("", "1"), ("1", "1"), ("0", "0"), ("true", "true")]
)
def test_importing_any_part_turns_it_off(value: str | None, becomes: str) -> None:
    kept = {name: text for name, text in os.environ.items() if name not in VARIABLES}
    given = {} if value is None else dict.fromkeys(VARIABLES, value)
    code = f"import os, himix_edge.errors; print([os.environ[name] for name in {VARIABLES}])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str([becomes] * len(VARIABLES))


@pytest.mark.parametrize(("value", "calls"), [("1", 1), ("0", 0)])
def test_onnxruntime_that_was_imported_before_is_told(
    value: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    monkeypatch.setenv(ONNX_RUNTIME, value)
    turn_off_session_events(SimpleNamespace(disable_telemetry_events=lambda: called.append(1)))
    turn_off_session_events(SimpleNamespace())  # older ones have no such function
    assert len(called) == calls
