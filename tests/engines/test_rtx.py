"""Compiling with the builder of TensorRT for RTX: what comes out, and all that can go wrong."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from himix_edge.engines import rtx, rtx_driver
from himix_edge.engines.epcontext import named_engine
from himix_edge.engines.profiles import Profile
from himix_edge.errors import ConfigError, DependencyError, EngineError, OutputError
from tests.engines.cuts import NEEDS_BUILDER

WIDTH = 64
HIGH = 128

pytestmark = NEEDS_BUILDER


def write(path: Path, nodes: Sequence[onnx.NodeProto], external: bool = False) -> Path:
    """A graph x [1, M, 64] -> y in float16 with one weight `w`."""
    shape: list[int | str | None] = [1, "tokens", WIDTH]
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float16)
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("acme", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data")
    return path


def profile(name: str, low: int, best: int, high: int) -> Profile:
    return Profile(name, {"x": ((1, low, WIDTH), (1, best, WIDTH), (1, high, WIDTH))})


PREFILL, DECODE = profile("prefill", 1, 16, HIGH), profile("decode", 1, 1, 1)


@pytest.fixture
def product(tmp_path: Path) -> Path:
    return write(tmp_path / "product.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])])


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "engines").mkdir()
    return tmp_path / "engines" / "product.onnx"


def refused(graph: Path, target: Path, profiles: Sequence[Profile] = (PREFILL,)) -> str:
    """The error of a graph that can't be compiled; nothing of it may be left."""
    with pytest.raises(EngineError) as error:
        rtx.engine_from_onnx(graph, target, "sm89", profiles)
    assert list(target.parent.iterdir()) == []
    return str(error.value)


def test_the_target_is_one_node_and_its_engine_lies_beside_it(product: Path, target: Path) -> None:
    compiled = rtx.engine_from_onnx(product, target, "sm89", [PREFILL])
    engine = target.with_suffix(".engine")
    assert sorted(target.parent.iterdir()) == [engine, target]
    assert engine.stat().st_size == compiled.engine_bytes > WIDTH * WIDTH * 2
    assert 0 < compiled.seconds < 60
    assert 50 << 20 < compiled.peak_bytes < 4 << 30  # the builder's libraries alone are 200 MiB
    model = onnx.load(target, load_external_data=False)
    (node,) = model.graph.node
    attributes = {part.name: helper.get_attribute_value(part) for part in node.attribute}
    assert (node.domain, node.op_type) == ("com.microsoft", "EPContext")
    assert attributes["embed_mode"] == 0
    assert attributes["ep_cache_context"] == b"product.engine"
    assert attributes["source"] == b"NvTensorRTRTXExecutionProvider"  # as a runtime registers it
    assert named_engine(target.read_bytes()) == "product.engine"  # as a runtime checks it
    assert [value.name for value in model.graph.input] == ["x"]
    assert [value.name for value in model.graph.output] == ["y"]


def test_architectures_get_engines_of_their_own_and_replace_what_was_there(
    product: Path, target: Path
) -> None:
    seen = set()
    for sm in rtx.SMS:
        rtx.engine_from_onnx(product, target, sm, [PREFILL])
        seen.add(target.with_suffix(".engine").read_bytes())
    assert len(seen) == len(rtx.SMS)
    assert len(list(target.parent.iterdir())) == 2


def test_several_profiles_go_into_one_engine(product: Path, target: Path) -> None:
    one = rtx.engine_from_onnx(product, target, "sm89", [PREFILL]).engine_bytes
    two = rtx.engine_from_onnx(product, target, "sm89", [PREFILL, DECODE]).engine_bytes
    assert two > one


def test_a_profile_that_the_provider_would_drop_is_an_error(product: Path, target: Path) -> None:
    crooked = profile("decode", 4, 1, 1)
    assert "MIN<=OPT<=MAX" in refused(product, target, [PREFILL, crooked])


@pytest.mark.parametrize("profiles", [[], [Profile("nothing", {})]])
def test_a_graph_of_open_sizes_needs_a_profile(
    product: Path, target: Path, profiles: list[Profile]
) -> None:
    assert "No explicit optimization profile" in refused(product, target, profiles)


def test_an_operator_that_nobody_knows(tmp_path: Path, target: Path) -> None:
    foreign = helper.make_node("Foo", ["x"], ["y"], domain="acme")
    assert "acme:Foo" in refused(write(tmp_path / "foreign.onnx", [foreign]), target)


def test_a_node_that_is_left_over_is_named(tmp_path: Path, target: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node("Cast", ["z"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Det", ["wide"], ["determinant"], name="the_determinant"),
        helper.make_node("Cast", ["determinant"], ["y"], to=TensorProto.FLOAT16),
    ]
    graph = write(tmp_path / "left.onnx", nodes)
    square = Profile("square", {"x": ((1, WIDTH, WIDTH),) * 3})
    found = refused(graph, target, [square])
    assert "Det" in found
    assert "the_determinant" in found


def test_a_truncated_graph(product: Path, target: Path) -> None:
    product.write_bytes(product.read_bytes()[:-4000])
    assert "Protobuf parsing failed" in refused(product, target)


def test_truncated_weights(tmp_path: Path, target: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = write(tmp_path / "external.onnx", [node], external=True)
    os.truncate(tmp_path / "external.onnx.data", 100)
    assert "external.onnx" in refused(graph, target)


def test_no_graph(tmp_path: Path, target: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none.onnx", target)


def test_an_unknown_architecture_is_refused_with_the_closest(product: Path, target: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'sm89'"):
        rtx.engine_from_onnx(product, target, "sm_89", [PREFILL])


def test_a_failure_leaves_the_engine_that_was_there(product: Path, target: Path) -> None:
    rtx.engine_from_onnx(product, target, "sm89", [PREFILL])
    before = {path: path.read_bytes() for path in target.parent.iterdir()}
    product.write_bytes(b"")
    with pytest.raises(EngineError):
        rtx.engine_from_onnx(product, target, "sm89", [PREFILL])
    assert {path: path.read_bytes() for path in target.parent.iterdir()} == before


@pytest.mark.parametrize("room", [0, 4096, 16384])
def test_a_full_disk(product: Path, target: Path, room: int) -> None:
    rtx_driver.driver_stubs(rtx.libraries())  # whose files are larger
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OutputError, match="room on the disk"):
            rtx.engine_from_onnx(product, target, "sm89", [PREFILL])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(target.parent.iterdir()) == []


def test_a_crash_of_the_builder(
    product: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtx, "_switch", lambda _: [1 << 40])  # an address that nobody owns
    assert "SIGSEGV" in refused(product, target)


def test_ctrl_c_stops_the_builder_and_leaves_nothing(product: Path, target: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from himix_edge.engines import rtx;"
        "from himix_edge.engines.profiles import Profile;"
        f"shapes = {PREFILL.shapes!r};"
        "rtx.engine_from_onnx(Path(sys.argv[1]), Path(sys.argv[2]), 'sm89', [Profile('p', shapes)])"
    )
    command = [sys.executable, "-c", program, str(product), str(target)]
    here = Path(rtx.__file__).parents[2]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=here) as process:
        worker = builder_of(process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert not worker.exists()
    assert list(target.parent.iterdir()) == []


def builder_of(process: subprocess.Popen[str]) -> Path:
    """The /proc folder of the compiling process, once it has the builder's libraries."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 30
    while time.monotonic() < until and process.poll() is None:
        for child in children.read_text().split():
            with contextlib.suppress(OSError):  # it has ended
                if "libtensorrt_rtx" in (Path("/proc") / child / "maps").read_text():
                    return Path("/proc") / child
        time.sleep(0.001)
    raise AssertionError("no builder was started")


def test_without_the_wheel(product: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "PACKAGE", "no_such_package")
    for attempt in (
        rtx.version,
        lambda: rtx.engine_from_onnx(product, target, "sm89", [PREFILL]),
    ):
        with pytest.raises(DependencyError, match="pip install onnxruntime-ep-nv-tensorrt-rtx"):
            attempt()


def test_another_version_of_the_wheel(
    product: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtx, "_SWITCH", ("_moved",))
    with pytest.raises(DependencyError, match=rf"{rtx.TESTED}.*without _moved"):
        rtx.engine_from_onnx(product, target, "sm89", [PREFILL])


@pytest.mark.parametrize("missing", ["cc", "nm"])
def test_without_a_tool(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in rtx_driver.TOOLS:
        if tool != missing:
            (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DependencyError, match=rf"`{missing}`.*apt install"):
        rtx_driver.driver_stubs([tmp_path])


def test_a_library_that_nm_cannot_read(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.write_text("not one")
    with pytest.raises(DependencyError, match="`nm` to succeed"):
        rtx_driver.driver_stubs([library])


def test_the_version_is_the_libraries_own() -> None:
    assert [int(part) > -1 for part in rtx.version().split(".")] == [True, True, True]
