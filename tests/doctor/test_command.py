"""`himix-edge doctor`, and what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from himix_edge.doctor import __main__ as command
from himix_edge.doctor.judge import judge
from himix_edge.doctor.show import as_data, as_text
from tests.doctor import boards

# Nothing that a runtime needs can be imported.
BARE = """
import sys
for name in ("numpy", "PIL", "tokenizers", "jinja2", "onnxruntime", "torch", "onnx"):
    sys.modules[name] = None
"""


@pytest.fixture
def orin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    board = boards.Board(tmp_path, boards.ORIN_FILES, boards.ORIN_ANSWERS)
    monkeypatch.setattr(command, "Machine", lambda: board)


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "Machine", lambda: boards.Board(tmp_path, {}, {}))


@pytest.mark.usefixtures("orin")
def test_the_command(himix: Any) -> None:
    done = himix("doctor")
    assert (done.code, done.err) == (0, "")
    rows = {line[:15].strip(): line[15:] for line in done.out.splitlines()}
    assert rows["JetPack"] == "6.2.1 (Jetson Linux 36.4.4)"
    assert rows["GPU"] == "Orin (nvgpu), compute capability 8.7"
    assert rows["TensorRT"] == "10.3.0; in Python 10.3.0"
    assert rows["memory"] == "8.0 GB, of them 6.4 GB free; swap 4.0 GB"
    assert rows["tensorrt"] == "works"
    assert rows["cuda"] == "lacks onnxruntime-gpu"
    assert "export --target jetpack-6.2   for TensorRT 10.3; also cpu" in done.out
    assert "      sudo nvpmodel -m 2\n" in done.out
    assert done.out.endswith("A bundle can run here.\n")


@pytest.mark.usefixtures("orin")
def test_the_command_as_json(himix: Any) -> None:
    done = himix("doctor", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["can_run"] is True
    assert found["facts"]["jetpack"] == "6.2.1"
    assert found["facts"]["gpus"][0]["compute_capability"] == "8.7"
    assert found["verdict"]["target"] == "jetpack-6.2"
    assert found["verdict"]["advice"][0]["commands"] == ["sudo nvpmodel -m 2", "sudo jetson_clocks"]


@pytest.mark.usefixtures("nothing")
def test_where_nothing_can_run_it_exits_with_1(himix: Any) -> None:
    done = himix("doctor")
    assert (done.code, done.err) == (1, "")
    assert done.out.endswith("No bundle can run here yet.\n")
    assert "pip install 'himix-edge[cpu]'" in done.out
    done = himix("doctor", "--json")
    assert done.code == 1
    assert json.loads(done.out)["can_run"] is False


def bare(start: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"{BARE}\n{start}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )


def test_it_needs_no_package_of_a_runtime() -> None:
    start = "sys.argv[1:] = ['doctor', '--json']; from himix_edge.__main__ import main; main()"
    done = bare(start)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["verdict"]["devices"]["cpu"] == ""


def test_as_a_module_it_needs_the_standard_library_alone() -> None:
    start = "sys.modules.update(typer=None, rich=None)\n"
    start += "import runpy; runpy.run_module('himix_edge.doctor', run_name='__main__')"
    done = bare(start)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("A bundle can run here.\n")


def test_what_a_pc_prints(tmp_path: Path) -> None:
    pc = boards.facts_of(tmp_path, boards.PC_FILES, boards.PC_ANSWERS, problems=("x: broken",))
    shown = as_text(pc, judge(pc))
    assert "GPU            NVIDIA GeForce RTX 4090, compute capability 8.9, 25.8 GB" in shown
    assert "ONNX Runtime   1.32.0 (CPU)" in shown
    assert "Could not be read:\n  x: broken" in shown
    assert "board" not in shown
    assert as_data(pc, judge(pc))["verdict"]["devices"]["cpu"] == ""
    lines = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ")}
    assert lines["qwen2-0.5b"] == "  qwen2-0.5b      with siglip-so400m-384, 2.4 GB; builds here"
    assert "builds here" in lines["vicuna-7b"] or "to build, it takes" in lines["vicuna-7b"]
