"""The `build` command with a TensorRT that only pretends: what is made, kept, refused, left."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from himix_edge.contract import Manifest
from himix_edge.engines import memory, rtx
from himix_edge.engines.build import build_engines
from himix_edge.engines.plan import plan_build
from himix_edge.engines.profiles import Profile
from himix_edge.engines.progress import BuildProgress
from himix_edge.engines.store import EngineDevice, find_engines, timing_cache_path
from himix_edge.engines.trt import refit_engine
from himix_edge.engines.trust import keep_timings
from himix_edge.errors import BundleError, EngineError, OutputError
from tests.engines import fake_builder
from tests.engines.conftest import Device
from tests.engines.fake_builder import Script
from tests.engines.test_store import tree


def plan_of(engine: Path) -> dict[str, Any]:
    """What the pretended engine was built of."""
    body: dict[str, Any] = json.loads(engine.read_bytes())
    return body


def test_both_engines(bundle: Path, orin: EngineDevice, himix: Any) -> None:
    done = himix("build", bundle, "--max-prompt", 20)
    assert (done.code, done.err) == (0, "")
    found = find_engines(bundle, Manifest.read(bundle), orin)
    vision, decoder = plan_of(found.vision), plan_of(found.decoder)
    assert vision["graph"] != decoder["graph"]
    for made in (vision, decoder):
        assert made["network"] == 1 << 1  # strongly typed
        assert made["flags"] == []
        assert made["limits"] == {"WORKSPACE": 256 << 20}
    assert [shapes["pixel_values"] for shapes in vision["profiles"]] == [[[1, 3, 28, 28]] * 3]
    assert [shapes["input_ids"] for shapes in decoder["profiles"]] == [
        [[1, 1], [1, 20], [1, 20]],
        [[1, 1], [1, 1], [1, 1]],
    ]
    assert f"{found.folder}: {found.key}\n" in done.out
    assert "vision.onnx: built in 0 s\n" in done.out


def test_json(bundle: Path, orin: EngineDevice, himix: Any) -> None:
    body = json.loads(himix("build", bundle, "--json").out)
    found = find_engines(bundle, Manifest.read(bundle), orin)
    assert body["engines"] == str(found.folder)
    assert body["key"] == dataclasses.asdict(found.key)
    assert list(body["seconds"]) == ["vision.onnx", "decoder.onnx"]


def test_options_of_the_engine(bundle: Path, orin: EngineDevice, himix: Any) -> None:
    himix("build", bundle, "--version-compatible", "--strip-weights")
    found = find_engines(bundle, Manifest.read(bundle), orin)
    flags = ["VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT_IDENTICAL"]
    assert plan_of(found.vision)["flags"] == plan_of(found.decoder)["flags"] == flags
    assert (found.key.version_compatible, found.key.stripped) == (True, True)


def test_progress_of_each_graph(bundle: Path, builder: Script) -> None:
    told: list[tuple[str, float, str]] = []
    build_engines(plan_build(bundle), report=lambda *what: told.append(what))
    for graph in ("vision.onnx", "decoder.onnx"):
        fractions = [done for name, done, _ in told if name == f"{graph}, Building"]
        assert fractions == sorted(fractions)
        assert (fractions[0], fractions[-1]) == (0.0, 1.0)
        assert len(set(fractions)) == 7  # three steps, each half done in between
        assert (graph, 1.0, "") in told
    assert builder.steps == 6


def test_timings_are_kept_for_the_next_build(
    bundle: Path, orin: EngineDevice, builder: Script
) -> None:
    build_engines(plan_build(bundle))
    assert len(builder.timed) == 6
    assert len(json.loads(timing_cache_path(bundle, orin).read_bytes())) == 6
    build_engines(plan_build(bundle, max_prompt=3))
    assert len(builder.timed) == 6
    assert find_engines(bundle, Manifest.read(bundle), orin).key.sizes.max_prompt == 3


@pytest.mark.parametrize("kept", [fake_builder.CORRUPT, fake_builder.FOREIGN])
def test_timings_that_do_not_fit_are_begun_anew(
    bundle: Path, orin: EngineDevice, builder: Script, kept: bytes
) -> None:
    path = timing_cache_path(bundle, orin)
    keep_timings(bundle, path.name, kept)
    build_engines(plan_build(bundle))
    assert len(json.loads(path.read_bytes())) == 6
    builder.builder_error = "the real reason"
    keep_timings(bundle, path.name, kept)
    with pytest.raises(EngineError, match="found the real reason"):
        build_engines(plan_build(bundle))


def test_a_graph_that_the_parser_refuses(bundle: Path, builder: Script, himix: Any) -> None:
    builder.parser_errors = [("Attention", "no softmax_precision"), ("Gelu", "unknown")]
    before = tree(bundle)
    done = himix("build", bundle)
    assert done.code == 1
    assert done.err == (
        f"Error: TensorRT 10.16.1.11 can't read {bundle}/vision.onnx: found Attention (node 12, "
        "layers.0.attention): no softmax_precision (and 1 more)\n"
    )
    assert tree(bundle) == before


def test_a_graph_that_the_builder_refuses(bundle: Path, builder: Script, himix: Any) -> None:
    builder.builder_error = "Could not find any implementation for node MatMul"
    before = tree(bundle)
    done = himix("build", bundle)
    assert done.code == 1
    assert done.err == (
        f"Error: TensorRT 10.16.1.11 can't build {bundle}/vision.onnx: found Could not find any "
        "implementation for node MatMul (and 1 more)\n"
    )
    assert tree(bundle) == before


def test_cuda_that_does_not_work(bundle: Path, builder: Script) -> None:
    builder.driver = False
    with pytest.raises(EngineError, match="can't start: found CUDA initialization failure with"):
        build_engines(plan_build(bundle))


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a Ctrl-C has arrived where the build can see it."""
    heard, cancel = threading.Event(), BuildProgress.cancel

    def noted(self: BuildProgress) -> None:
        cancel(self)
        heard.set()

    monkeypatch.setattr(BuildProgress, "cancel", noted)
    return heard


def _ctrl_c_at(step: int, builder: Script, heard: threading.Event) -> Callable[[int], None]:
    """Ctrl-C while the decoder is built, and time for it to arrive."""

    def at_step(now: int) -> None:
        if builder.steps == 3 + step == 3 + now:
            os.kill(os.getpid(), signal.SIGINT)
            assert heard.wait(30)

    return at_step


@pytest.mark.parametrize("step", [0, 1])
def test_ctrl_c(
    bundle: Path,
    orin: EngineDevice,
    builder: Script,
    himix: Any,
    heard: threading.Event,
    step: int,
) -> None:
    builder.at_step = _ctrl_c_at(step, builder, heard)
    done = himix("build", bundle)
    assert done.code == 130
    assert builder.steps == 3 + step  # that one, and no further
    # The vision graph's timings are worth keeping; nothing else is left.
    assert sorted(path.name for path in (bundle / "engines").iterdir()) == [
        f"{orin.digest}.timing",
        f"{orin.digest}.timing.mac",
    ]


def test_ctrl_c_keeps_the_engines_that_were(
    bundle: Path, orin: EngineDevice, builder: Script, himix: Any, heard: threading.Event
) -> None:
    build_engines(plan_build(bundle))
    before = tree(bundle)
    builder.steps = 0
    builder.at_step = _ctrl_c_at(1, builder, heard)
    assert himix("build", bundle, "--max-prompt", 3).code == 130
    assert tree(bundle) == before
    assert find_engines(bundle, Manifest.read(bundle), orin).key.sizes.max_prompt == 60


@pytest.mark.parametrize("full", ["vision.plan", "decoder.plan"])
def test_a_full_disk(
    bundle: Path, builder: Script, himix: Any, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    build_engines(plan_build(bundle))
    before = tree(bundle)
    write = Path.write_bytes

    def write_some(self: Path, data: Any) -> int:
        if self.name.endswith(full):
            write(self, bytes(data)[:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", write_some)
    done = himix("build", bundle, "--max-prompt", 3)
    assert done.code == 1
    assert "Error: cannot write " in done.err
    assert "No space left on device" in done.err
    assert tree(bundle) == before
    assert builder.steps >= 6


@pytest.mark.usefixtures("builder")
def test_a_full_disk_at_the_timings(
    bundle: Path, himix: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_engines(plan_build(bundle))
    before = tree(bundle)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    done = himix("build", bundle, "--max-prompt", 3)
    assert done.code == 1
    assert "Error: cannot write " in done.err
    assert ".timing: expected a folder that can be written" in done.err
    assert "No space left on device" in done.err
    assert tree(bundle) == before


def test_too_little_memory(
    bundle: Path, builder: Script, himix: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 700_000_000)
    before = tree(bundle)
    done = himix("build", bundle)
    assert done.code == 1
    assert "expected about 0.8 GB free, found 0.7 GB" in done.err
    assert "--force" in done.err
    assert tree(bundle) == before
    assert builder.steps == 0
    assert himix("build", bundle, "--force").code == 0


def test_a_graph_that_is_not_as_exported(bundle: Path, builder: Script) -> None:
    (bundle / "decoder.onnx.data").write_text("other weights")
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data is corrupt"):
        build_engines(plan_build(bundle))
    assert builder.steps == 0


def test_jetpack_6_builds_the_portable_dialect(
    portable_bundle: Path, become: Device, himix: Any
) -> None:
    device = become("10.3.0")
    himix("build", portable_bundle, "--max-cache", 100)
    found = find_engines(portable_bundle, Manifest.read(portable_bundle), device)
    prefill, decode = plan_of(found.decoder)["profiles"]
    assert prefill["past_key_values.0.key"] == [[1, 2, 1, 16], [1, 2, 4, 16], [1, 2, 99, 16]]
    assert decode["input_ids"] == [[1, 1]] * 3


def test_for_a_gpu_that_is_not_here(
    bundle: Path, himix: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def compile_engine(graph: Path, target: Path, sm: str, profiles: tuple[Profile, ...]) -> None:
        asked.append((graph, sm, [profile.name for profile in profiles]))
        target.write_text(graph.name)
        target.with_suffix(".engine").write_text("the engine")

    monkeypatch.setattr(rtx, "version", lambda: "1.7.1")
    monkeypatch.setattr(rtx, "engine_from_onnx", compile_engine)
    assert himix("build", bundle, "--target", "rtx-sm120").code == 0
    assert asked == [
        (bundle / "vision.onnx", "sm120", ["vision"]),
        (bundle / "decoder.onnx", "sm120", ["prefill", "decode"]),
    ]
    device = EngineDevice("tensorrt-rtx", "1.7.1", "", "12.0")
    found = find_engines(bundle, Manifest.read(bundle), device)
    assert found.vision.read_text() == "vision.onnx"


def test_a_stripped_engine_gets_its_weights(bundle: Path, builder: Script) -> None:
    engine: Any = fake_builder.ICudaEngine()
    refit_engine(engine, bundle / "decoder.onnx")
    assert engine._refitted
    assert engine._graph == str(bundle / "decoder.onnx")
    builder.parser_errors = [("MatMul", "weights of another shape")]
    with pytest.raises(EngineError, match=r"from .*decoder\.onnx: found MatMul .*another shape"):
        refit_engine(fake_builder.ICudaEngine(), bundle / "decoder.onnx")


def test_the_error_of_an_unwritable_bundle(bundle: Path, builder: Script) -> None:
    (bundle / "engines").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write .*engines"):
        build_engines(plan_build(bundle))
    assert builder.steps == 0
    assert (bundle / "engines").read_text() == "a file"
