"""`--device`: what is opened where, with what there is on the machine."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
from onnx import helper
from PIL import Image

from himix_edge.bundle.files import BundleFiles
from himix_edge.contract import Manifest
from himix_edge.engines.gpu import Gpu
from himix_edge.engines.profiles import Sizes
from himix_edge.engines.store import EngineDevice, engine_key, seal_engines, whole_engines
from himix_edge.errors import BundleError, ConfigError, DependencyError, EngineError
from himix_edge.runtimes import load
from himix_edge.runtimes.devices import Choices, open_engine
from himix_edge.runtimes.ort import OrtEngine
from himix_edge.runtimes.providers import CUDA, TENSORRT, TENSORRT_RTX
from tests.models.reference import random_tensor
from tests.runtimes.conftest import TinyBundle
from tests.tolerances import ENGINE_LOGITS


class GpuOrt(types.ModuleType):
    """onnxruntime as if it had providers for a GPU: they compute on the CPU, and are counted.

    Attributes:
        loads: whether a provider that is listed can be loaded.
        opened: (path, provider, options) of every session.
        moved: how often a value was made in each kind of memory.
        bound: in which memory outputs were asked for.
        entries: of the runs' options.
    """

    def __init__(self, *providers: str) -> None:
        super().__init__("onnxruntime")
        self.providers, self.loads = providers, True
        self.opened: list[tuple[str, str, dict[str, str]]] = []
        self.moved: Counter[str] = Counter()
        self.bound: list[tuple[Any, ...]] = []
        self.entries: list[tuple[str, str]] = []
        self.plugins: list[str] = []
        self.OrtValue = _Values(self)

    def get_available_providers(self) -> list[str]:
        return [*self.providers, "CPUExecutionProvider"]

    def get_ep_devices(self) -> list[types.SimpleNamespace]:
        return [types.SimpleNamespace(ep_name=name) for name in self.plugins]

    def register_execution_provider_library(self, name: str, path: str) -> None:
        assert path == "/plugin.so"
        self.plugins.append(name)

    def SessionOptions(self) -> Any:  # noqa: N802
        return _Options()

    def RunOptions(self) -> Any:  # noqa: N802
        options = types.SimpleNamespace()
        options.add_run_config_entry = lambda *entry: self.entries.append(entry)
        return options

    def InferenceSession(  # noqa: N802
        self, path: str, options: Any, providers: list[Any] | None, enable_fallback: int
    ) -> Any:
        assert enable_fallback == 0
        first = options.devices or (providers or [])[0]
        name, chosen = (first, {}) if isinstance(first, str) else first
        self.opened.append((str(path), name, chosen))
        return _Session(self, path, [name] if self.loads else [])


class _Options:
    devices: tuple[str, dict[str, str]] | None = None
    log_severity_level = intra_op_num_threads = 0

    def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
        self.devices = devices[0].ep_name, options

    def add_session_config_entry(self, key: str, value: str) -> None:
        pass


class _Values:
    def __init__(self, ort: GpuOrt) -> None:
        self._ort = ort

    def ortvalue_from_numpy(self, array: Any, device: str = "cpu", number: int = 0) -> Any:
        self._ort.moved[device] += 1
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def ortvalue_from_shape_and_type(self, shape: Any, kind: int, device: str, number: int) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, kind)


def compiled_graph(named: str, *, mode: int = 0) -> bytes:
    """A graph of one node that names an engine, as a compilation makes it."""
    node = helper.make_node(
        "EPContext",
        ["x"],
        ["y"],
        domain="com.microsoft",
        main_context=1,
        ep_cache_context=named,
        embed_mode=mode,
        source=TENSORRT_RTX.name,
    )
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    made: bytes = helper.make_model(
        helper.make_graph([node], "compiled", values[:1], values[1:])
    ).SerializeToString()
    return made


def _engine_of(path: str) -> str:
    """What a compiled graph names, as the provider finds it; a graph is its own engine."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    if [node.op_type for node in nodes] != ["EPContext"]:
        return path
    named = next(part.s for part in nodes[0].attribute if part.name == "ep_cache_context")
    return str(Path(path).parent / named.decode())


class _Session:
    def __init__(self, ort: GpuOrt, path: str, providers: list[str]) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        if TENSORRT_RTX.name in providers:
            path = _engine_of(path)
        listed = ["CPUExecutionProvider"]
        self._ort, self._providers = ort, [*providers, *listed]
        self._real = onnxruntime.InferenceSession(path, options, providers=listed)
        self.get_inputs, self.get_outputs = self._real.get_inputs, self._real.get_outputs

    def get_providers(self) -> list[str]:
        return self._providers

    def io_binding(self) -> Any:
        real = self._real.io_binding()
        bind_output = real.bind_output

        def bind(name: str, *memory: Any) -> None:
            self._ort.bound.append((name, *memory))
            bind_output(name)

        real.bind_output = bind
        return real

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self._real.run_with_iobinding(binding)


@pytest.fixture
def gpu_ort(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> GpuOrt:
    monkeypatch.setenv("HIMIX_EDGE_CACHE", str(tmp_path / "cache"))
    ort = GpuOrt(CUDA.name, TENSORRT.name)
    monkeypatch.setitem(sys.modules, "onnxruntime", ort)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    return ort


def logits_of(engine: Any) -> list[Any]:
    cache = engine.open(engine.encode(random_tensor(1, 3, 24, 24).numpy()))
    steps = ([1, 40, 41, 2], [50], [51], [52])
    return [engine.step(np.array([step]), cache) for step in steps]


def opened(source: TinyBundle | Path, device: str) -> Any:
    folder = source if isinstance(source, Path) else source.folder
    return open_engine(BundleFiles.open(folder), device, Choices(threads=1))


@pytest.mark.parametrize("name", ["bundle", "fixed_bundle"])
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_on_a_gpu_the_cache_stays_there(
    name: str, device: str, gpu_ort: GpuOrt, request: pytest.FixtureRequest
) -> None:
    source: TinyBundle = request.getfixturevalue(name)
    engine = opened(source, device).engine
    image = engine.encode(random_tensor(1, 3, 24, 24).numpy())
    cache = engine.open(image)
    engine.step(np.array([[1, 40, 41, 2]]), cache)
    before, gpu_ort.bound[:] = gpu_ort.moved.copy(), []
    engine.step(np.array([[50]]), cache)
    fixed = name == "fixed_bundle"
    # ids, positions, and the place of the logits; a write index
    assert gpu_ort.moved - before == {"cpu": 4 if fixed else 3}
    wanted = {(f"present.{i}.{part}", "cuda", 0) for i in range(2) for part in ("key", "value")}
    assert set(gpu_ort.bound) == (set() if fixed else wanted)
    plain = OrtEngine(BundleFiles.open(source.folder), threads=1)
    for found, expected in zip(logits_of(engine), logits_of(plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=ENGINE_LOGITS)


def test_auto_prefers_cuda_to_the_cpu(bundle: TinyBundle, gpu_ort: GpuOrt) -> None:
    model = load(bundle.folder, threads=1)
    assert (model.device, model.passed_over) == ("cuda", ())
    assert [name for _, name, _ in gpu_ort.opened] == [CUDA.name] * 2


def test_a_provider_that_does_not_load_is_no_silent_cpu(
    bundle: TinyBundle, gpu_ort: GpuOrt
) -> None:
    gpu_ort.loads = False
    with pytest.raises(DependencyError, match=r"could not load its CUDA.*found CPUExecution"):
        opened(bundle, "cuda")
    model = load(bundle.folder, threads=1)
    assert model.device == "cpu"
    assert len(model.passed_over) == 1
    assert "could not load its CUDAExecutionProvider" in model.passed_over[0]


def test_onnxruntimes_tensorrt_is_told_the_shapes(
    bundle: TinyBundle, gpu_ort: GpuOrt, tmp_path: Path
) -> None:
    one = opened(bundle, "tensorrt")
    assert one.device == "tensorrt"
    (vision, name, options), (decoder, _, more) = gpu_ort.opened
    assert (Path(vision).name, Path(decoder).name) == ("vision.onnx", "decoder.onnx")
    assert name == TENSORRT.name
    assert options["trt_profile_min_shapes"] == "pixel_values:1x3x24x24"
    assert more["trt_profile_min_shapes"].startswith("input_ids:1x1,position_ids:1x1,past_key_v")
    assert more["trt_profile_max_shapes"].endswith("past_key_values.1.value:1x2x72x8")
    own = tmp_path / "cache" / "onnxruntime-tensorrt" / Manifest.read(bundle.folder).digest()
    assert more["trt_engine_cache_path"] == more["trt_timing_cache_path"] == str(own)
    assert own.stat().st_mode & 0o777 == 0o700
    assert not (bundle.folder / "engines").exists()
    assert one.engine.open(None).capacity == 64


def test_the_plugin(
    fixed_bundle: TinyBundle, gpu_ort: GpuOrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = types.ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    plugin.__dict__["get_library_path"] = lambda: "/plugin.so"
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    one = opened(fixed_bundle, "tensorrt-rtx")
    assert one.device == "tensorrt-rtx"
    assert gpu_ort.plugins == [TENSORRT_RTX.name]  # registered once for both graphs
    assert [name for _, name, _ in gpu_ort.opened] == [TENSORRT_RTX.name] * 2
    assert gpu_ort.opened[0][2]["nv_profile_opt_shapes"].startswith("pixel_values:1x3x24x24,past")
    logits = logits_of(one.engine)
    plain = OrtEngine(BundleFiles.open(fixed_bundle.folder), threads=1)
    for found, expected in zip(logits, logits_of(plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=ENGINE_LOGITS)
    assert gpu_ort.entries == []  # a graph has one profile


def test_the_plugin_opens_what_was_compiled_for_this_gpu(
    fixed_bundle: TinyBundle, gpu_ort: GpuOrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_ort.plugins.append(TENSORRT_RTX.name)
    plugin = types.ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    monkeypatch.setattr("himix_edge.engines.rtx.version", lambda: "1.7.1")
    gpu = Gpu("RTX 4090, 128 SMs", "8.9", 1 << 34, unified=False)
    monkeypatch.setattr("himix_edge.runtimes.devices.gpu_here", lambda: gpu)
    folder = Path(shutil.copytree(fixed_bundle.folder, tmp_path / "bundle"))
    manifest = Manifest.read(folder)
    device = EngineDevice("tensorrt-rtx", "1.7.1", "", "8.9")
    key = engine_key(manifest, device, Sizes(2, 69))
    with whole_engines(folder, key) as engines:
        for name in ("vision.onnx", "decoder.onnx"):
            engine = (engines / name).with_suffix(".engine")
            onnx.save(onnx.load(folder / name), engine)  # weights included
            (engines / name).write_bytes(compiled_graph(engine.name))
    seal_engines(folder, key)
    one = opened(folder, "auto")
    assert (one.device, one.passed_over) == ("tensorrt-rtx", ())
    paths = [Path(path) for path, _, _ in gpu_ort.opened]
    assert [path.name for path in paths] == ["vision.onnx", "decoder.onnx"]
    for path in paths:  # a copy, gone by now, that nobody else could change
        assert folder not in path.parents
        assert not path.exists()
    logits_of(one.engine)  # an image; 4 tokens in two parts, then one by one
    profiles = ["0", "0", "0", "1", "1", "1"]
    assert gpu_ort.entries == [("nv_profile_index", profile) for profile in profiles]
    gpu = dataclasses.replace(gpu, compute_capability="12.0")
    with pytest.raises(EngineError, match=r"no engine for this device.*sm 12\.0.*rtx-sm120"):
        opened(folder, "tensorrt-rtx")


def test_what_is_missing_and_which_package_brings_it(
    bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", GpuOrt())
    with pytest.raises(DependencyError, match=r"no CUDAExecutionProvider.*onnxruntime-gpu"):
        opened(bundle, "cuda")
    with pytest.raises(DependencyError, match=r"TensorRT is missing|cuda-python is missing"):
        opened(bundle, "tensorrt")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(DependencyError, match=r"NvTensorRTRTX.*onnxruntime-ep-nv-tensorrt-rtx"):
        opened(bundle, "tensorrt-rtx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match="pip install onnxruntime"):
        opened(bundle, "cpu")


def test_a_plugin_that_finds_no_gpu(
    bundle: TinyBundle, gpu_ort: GpuOrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = types.ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    plugin.__dict__["get_library_path"] = lambda: "/plugin.so"
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    monkeypatch.setattr(gpu_ort, "get_ep_devices", list)
    with pytest.raises(DependencyError, match="finds no GPU"):
        opened(bundle, "tensorrt-rtx")

    def fails(*_: object) -> None:
        raise RuntimeError("libcuda.so.1: cannot open\nmore")

    monkeypatch.setattr(gpu_ort, "register_execution_provider_library", fails)
    with pytest.raises(DependencyError, match=r"found libcuda.so.1: cannot open\. Fix: "):
        opened(bundle, "tensorrt-rtx")


def test_unknown_devices_name_the_closest(bundle: TinyBundle) -> None:
    for wrong, right in (("tensorrt_rtx", "tensorrt-rtx"), ("CUDA", "cuda"), ("gpu", "cpu")):
        with pytest.raises(ConfigError, match=f"no device is named '{wrong}'.*{right}"):
            load(bundle.folder, device=wrong)


@pytest.mark.usefixtures("gpu_ort")
def test_a_bundle_for_onnxruntime_alone(bundle: TinyBundle) -> None:
    manifest = dataclasses.replace(Manifest.read(bundle.folder), dialect="ort")
    for device in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(BundleError, match=r"TensorRT can't run .*--target tensorrt"):
            open_engine(BundleFiles(bundle.folder, manifest), device, Choices())
    with pytest.raises(BundleError, match=r"not the contract's.*write_indices"):  # opened
        open_engine(BundleFiles(bundle.folder, manifest), "cuda", Choices())


@pytest.mark.usefixtures("gpu_ort")
def test_bfloat16_is_refused_on_the_cpu_alone(bundle: TinyBundle, fixed_bundle: TinyBundle) -> None:
    manifest = dataclasses.replace(Manifest.read(bundle.folder), dtype="bfloat16")
    with pytest.raises(BundleError, match="on a CPU can't run"):
        open_engine(BundleFiles(bundle.folder, manifest), "cpu", Choices())
    with pytest.raises(BundleError, match="not the contract's"):  # opened, and found to be float32
        open_engine(BundleFiles(bundle.folder, manifest), "cuda", Choices())
    manifest = dataclasses.replace(Manifest.read(fixed_bundle.folder), dtype="bfloat16")
    with pytest.raises(BundleError, match=r"a cache that is written in place in bfloat16.*float16"):
        open_engine(BundleFiles(fixed_bundle.folder, manifest), "cuda", Choices())


@pytest.mark.usefixtures("gpu_ort")
def test_the_answer_says_where_it_was_found(himix: Any, bundle: TinyBundle, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (40, 30), "teal").save(picture)
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    arguments = ["run", picture, "what", "--bundle", folder, "--max-tokens", 3]
    for device, expected in (("auto", "cuda"), ("tensorrt", "tensorrt")):
        done = himix(*arguments, "--device", device, "--json")
        assert done.code == 0
        assert json.loads(done.out)["device"] == expected
        assert done.err == f"Model: tiny, on {expected}. It knows nothing.\n"
    done = himix(*arguments, "--device", "cpuu")
    assert done.code == 1
    assert "did you mean 'cpu'" in done.err
