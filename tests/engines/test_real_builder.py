"""What asks TensorRT for engines, with a real parser and a real builder at the other end.

TensorRT for RTX has TensorRT's Python API and compiles without a GPU. Its libraries come with the
wheel that `engines/rtx.py` uses, its bindings in one of their own.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from himix_edge.engines import rtx
from himix_edge.engines.rtx_driver import driver_stubs
from himix_edge.engines.rtx_worker import PACKAGE
from himix_edge.errors import DependencyError
from tests.engines.real_builder import WIDTH
from tests.engines.stubs import NoStubsError, unpacked

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """That of a process which finds the bindings, the libraries, and a driver without devices."""
    try:
        bindings = unpacked(f"tensorrt_rtx_cu13_bindings=={rtx.version()}.*")
        libraries = Path(str(importlib.import_module(PACKAGE).__file__)).parent
        driver = driver_stubs(path for path in libraries.glob("*.so*") if not path.is_symlink())
    except (NoStubsError, DependencyError) as error:
        pytest.skip(str(error))
    paths = {"PYTHONPATH": [bindings, ROOT], "LD_LIBRARY_PATH": [driver, libraries]}
    return {**os.environ, **{name: os.pathsep.join(map(str, of)) for name, of in paths.items()}}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """y = x W, with W in a file of its own."""
    weights = np.arange(WIDTH * WIDTH, dtype=np.float16).reshape(WIDTH, WIDTH)
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["tokens", WIDTH]) for name in "xy"
    )
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    made = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weights, "w")])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = tmp_path / "graph.onnx"
    onnx.save(model, path, save_as_external_data=True, location="graph.onnx.data", size_threshold=0)
    return path


Built = dict[str, Any]


def build(environment: dict[str, str], graph: Path, *options: str) -> Built:
    target = graph.with_name("graph.plan")
    done = subprocess.run(
        [sys.executable, "-m", "tests.engines.real_builder", str(graph), str(target), *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    body: Built = json.loads(done.stdout.splitlines()[-1])
    return body


def test_an_engine_with_two_profiles(environment: dict[str, str], graph: Path) -> None:
    built = build(environment, graph)
    assert built["error"] is None
    assert graph.with_name("graph.plan").read_bytes()[1:4] == b"trt"
    assert graph.with_name("graph.timing").stat().st_size > 0
    phases = {phase for phase, _, _ in built["told"]}
    assert len(phases) == 1  # whatever it is called, it holds all others
    fractions = [done for _, done, _ in built["told"]]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert len(set(fractions)) > 10


def test_timings_of_another_kind_are_begun_anew(environment: dict[str, str], graph: Path) -> None:
    timings = graph.with_name("graph.timing")
    timings.write_bytes(b"these are none")
    assert build(environment, graph)["error"] is None
    assert timings.read_bytes() != b"these are none"


def test_ctrl_c(environment: dict[str, str], graph: Path) -> None:
    built = build(environment, graph, "interrupt")
    assert built["error"] == "KeyboardInterrupt: "
    assert built["told"][-1][1] < 1.0
    assert built["told"][-1][2] == "stopping"
    assert sorted(path.name for path in graph.parent.iterdir()) == ["graph.onnx", "graph.onnx.data"]


def test_the_parsers_own_error(environment: dict[str, str], graph: Path) -> None:
    model = onnx.load(graph, load_external_data=False)
    model.graph.node[0].op_type = "MatMulOfDreams"
    onnx.save(model, graph)
    error = build(environment, graph)["error"]
    assert error.startswith(
        f"EngineError: TensorRT {rtx.version()} can't read {graph}: found MatMulOfDreams "
    )
    assert "(node 0, product)" in error


def test_a_graph_that_is_none(environment: dict[str, str], graph: Path) -> None:
    graph.write_bytes(b"no graph")
    error = build(environment, graph)["error"]
    assert error.startswith(f"EngineError: TensorRT {rtx.version()} can't read {graph}: found ")
    assert "parse" in error
