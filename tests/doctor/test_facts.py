"""What a look finds on boards of files and answers, good and bad."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from himix_edge.doctor import machine as machine_module
from himix_edge.doctor.facts import JETPACK, MODULES, Gpu, Module, look
from himix_edge.doctor.judge import judge
from himix_edge.doctor.machine import Machine, Output, run_command
from himix_edge.doctor.show import as_data, as_text
from tests.doctor import boards
from tests.doctor.boards import Board, said


def test_an_orin(tmp_path: Path) -> None:
    found = look(Board(tmp_path, boards.ORIN_FILES, boards.ORIN_ANSWERS))
    assert found.jetson
    assert found.board == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit"
    assert (found.l4t, found.jetpack) == ("36.4.4", "6.2.1")
    assert found.gpus == (Gpu("Orin (nvgpu)", "8.7"),)  # nvidia-smi did not know
    assert (found.driver, found.cuda) == ("540.4.0", "12.6.11")
    assert found.packages["libnvinfer10"] == "10.3.0.30-1+cuda12.5"
    assert "libnvinfer8" not in found.packages  # removed, its configuration left
    assert found.modules["tensorrt"] == Module("10.3.0")
    assert found.modules["onnxruntime"] is None
    assert found.memory_bytes == 7802516 * 1024
    assert found.available_bytes == 6 << 30
    assert found.swap_bytes == 3901248 * 1024
    assert (found.power_mode, found.power_modes["MAXN_SUPER"]) == ("15W", 2)
    assert found.desktop
    assert found.problems == ()


def test_a_thor(tmp_path: Path) -> None:
    found = look(Board(tmp_path, boards.THOR_FILES, boards.THOR_ANSWERS))
    assert (found.l4t, found.jetpack, found.cuda) == ("39.2.1", "7.2.1", "13.2")
    assert found.gpus == (Gpu("NVIDIA Thor", "11.0"),)
    assert found.power_modes == {"MAXN": 0, "120W": 1}
    assert not found.desktop


def test_a_pc(tmp_path: Path) -> None:
    found = look(Board(tmp_path, boards.PC_FILES, boards.PC_ANSWERS))
    assert not found.jetson
    assert found.gpus == (Gpu("NVIDIA GeForce RTX 4090", "8.9", 24564 << 20, 23000 << 20),)
    assert (found.board, found.l4t, found.jetpack, found.power_mode) == (None, None, None, None)
    assert found.providers == ("CPUExecutionProvider",)


def test_a_machine_of_nothing(tmp_path: Path) -> None:
    found = look(Board(tmp_path, {}, {}))
    assert (found.gpus, found.memory_bytes, found.cuda) == ((), None, None)
    assert found.problems == ()


@pytest.mark.parametrize(
    ("release", "l4t", "jetpack"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic", "36.4.3", "6.2"),
        ("# R38 (release), REVISION: 2.0, GCID: 0", "38.2.0", "7.0"),
        ("# R36 (release), REVISION: 4, x", "36.4.0", "6.1"),
        ("# R40 (release), REVISION: 1.0", "40.1.0", None),
        ("nonsense", None, None),
    ],
)
def test_releases(tmp_path: Path, release: str, l4t: str | None, jetpack: str | None) -> None:
    found = look(Board(tmp_path, {"/etc/nv_tegra_release": release}, {}))
    assert (found.l4t, found.jetpack) == (l4t, jetpack)


def test_jetson_linux_by_its_package(tmp_path: Path) -> None:
    packages = said("nvidia-l4t-core install ok installed 36.4.3-20250107174145\n")
    assert look(Board(tmp_path, {}, {"dpkg-query": packages})).jetpack == "6.2"


def test_problems_are_kept(tmp_path: Path) -> None:
    answers = {
        "nvidia-smi": said("", 9, "NVIDIA-SMI has failed because it couldn't communicate\n"),
        "dpkg-query": said("", None, "no answer in 10 s"),
        "nvpmodel": said("", 255, ""),
        "tensorrt": said("", -11, ""),
        "onnxruntime": said("", 1, "Traceback\nImportError: libfoo.so: no such file\n"),
        "cuda.bindings.runtime": said("hello\n"),
    }
    files = {"/proc/device-tree/model": "NVIDIA Jetson Orin NX"}
    found = look(Board(tmp_path, files, answers))
    assert found.problems == (
        "dpkg-query: no answer in 10 s",
        "nvidia-smi: NVIDIA-SMI has failed because it couldn't communicate",
        "nvpmodel: exit code 255",
    )
    assert found.gpus == (Gpu("its own", "8.7"),)
    assert found.modules["tensorrt"] == Module(error="exit code -11")
    assert found.modules["onnxruntime"] == Module(error="ImportError: libfoo.so: no such file")
    assert found.modules["cuda.bindings.runtime"] == Module(
        error="its import printed what is no answer"
    )


def test_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "etc" / "nv_tegra_release").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").mkdir(parents=True)
    found = look(Board(tmp_path, {}, {}))
    assert found.problems == (
        "/etc/nv_tegra_release: IsADirectoryError",
        "/proc/meminfo: IsADirectoryError",
    )
    assert found.memory_bytes is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    board = Board(tmp_path, {"/proc/meminfo": "MemTotal: 1 kB\n"}, {})
    (tmp_path / "proc" / "meminfo").chmod(0)
    assert look(board).problems == ("/proc/meminfo: PermissionError",)


GARBAGE = (
    st.text(max_size=60)
    | st.sampled_from(["R36 (release), REVISION: 4.", "Orin,9.9.9,1e9,x,y", "null", "[]", '"x"'])
    | st.sampled_from(['{"version": 3}', '{"cuda": 4}', "9" * 5000, "[" * 5000, "R" + "9" * 5000])
    | st.sampled_from([f"R{'9' * 5000} (release), REVISION: 1", f"MemTotal: {'9' * 5000} kB"])
    | st.sampled_from([f"x, 8.7, {'9' * 5000}, ٣, 5", f"< POWER_MODEL ID={'9' * 5000} NAME=x >"])
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_garbage_never_raises(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    root = tmp_path_factory.mktemp("garbage")
    paths = (*boards.ORIN_FILES, "/proc/device-tree/model")
    files = {path: data.draw(GARBAGE) for path in paths}
    files["/proc/device-tree/model"] = f"Jetson {files['/proc/device-tree/model']}"
    answers = {
        name: Output(data.draw(st.sampled_from([0, 1, None])), data.draw(GARBAGE), "x\x1b[31m")
        for name in (*boards.ORIN_ANSWERS, *MODULES, "nvcc", "/usr/local/cuda/bin/nvcc")
    }
    board = Board(root, {}, answers)
    for path, text in files.items():
        (root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        (root / path.lstrip("/")).write_bytes(text.encode("utf-8", "replace"))
    found = look(board)
    verdict = judge(found)
    json.dumps(as_data(found, verdict))
    assert as_text(found, verdict).endswith(("run here.", "run here yet."))


def test_commands_for_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer = run_command((sys.executable, "-c", "import sys; print(1); sys.exit(3)"))
    assert answer == Output(3, "1\n", "")
    assert run_command(("no-such-command-anywhere",)) is None
    monkeypatch.setattr(machine_module, "PATIENCE", 0.2)
    hanging = run_command((sys.executable, "-c", "import time; time.sleep(60)"))
    assert hanging == Output(None, "", "no answer in 0.2 s")
    barred = tmp_path / "barred"
    barred.write_text("#!/bin/sh\n")
    denied = run_command((str(barred),))
    assert denied is not None
    assert (denied.code, denied.err.split(":")[0]) == (None, "PermissionError")
    noise = "import sys; sys.stdout.buffer.write(bytes(range(256)))"
    loud = run_command((sys.executable, "-c", noise))
    assert loud is not None
    assert loud.code == 0
    assert not {"\0", "\x1b"} & set(loud.out)


def test_modules_are_imported_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A module that is not there, one that fails, one that wants another, one that ends Python."""
    (tmp_path / "tensorrt.py").write_text("import no_such_library")
    (tmp_path / "onnxruntime.py").write_text("import os; os.abort()")
    (tmp_path / "cuda" / "bindings").mkdir(parents=True)
    (tmp_path / "cuda" / "__init__.py").touch()
    (tmp_path / "cuda" / "bindings" / "__init__.py").write_text("__version__ = '13.0'")
    (tmp_path / "cuda" / "bindings" / "runtime.py").touch()
    (tmp_path / "onnxruntime_ep_nv_tensorrt_rtx.py").write_text("raise OSError('no libcuda')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = look(Machine()).modules
    assert found["tensorrt"] == Module(
        error="ModuleNotFoundError: No module named 'no_such_library'"
    )
    assert found["onnxruntime"] is not None
    assert "exit code -6" in (found["onnxruntime"].error or "")
    assert found["cuda.bindings.runtime"] == Module("13.0")
    assert found["onnxruntime_ep_nv_tensorrt_rtx"] == Module(error="OSError: no libcuda")


def test_a_module_that_is_not_there() -> None:
    code = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
    code += (
        "from himix_edge.doctor.facts import _IMPORT\nsys.argv = ['-c', 'cuda.bindings.runtime']"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "\nexec(_IMPORT)"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.stdout, done.returncode) == ("null\n", 0)


def test_every_release_of_the_table_is_in_order() -> None:
    versions = [tuple(map(int, version.split("."))) for version in JETPACK]
    assert versions == sorted(versions)
    majors = {version.split(".")[0]: name.split(".")[0] for version, name in JETPACK.items()}
    assert majors == {"35": "5", "36": "6", "38": "7", "39": "7"}
