"""What a build will do, said before it is done."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from himix_edge.contract import Manifest, Quantization
from himix_edge.engines import rtx
from himix_edge.engines.gpu import Gpu, gpu_here
from himix_edge.engines.plan import plan_build
from himix_edge.engines.profiles import Sizes
from himix_edge.engines.store import EngineDevice, engine_key, timing_cache_path
from himix_edge.errors import ConfigError, DependencyError, EngineError
from tests.engines.conftest import Device, make_bundle


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)


def test_on_a_device(bundle: Path, orin: EngineDevice) -> None:
    plan = plan_build(bundle, max_prompt=20)
    assert plan.ready_key() == engine_key(Manifest.read(bundle), orin, Sizes(20, 64))
    assert orin == EngineDevice("tensorrt", "10.16.1.11", "Orin, 8 SMs", "8.7")
    assert [graph.engine for graph in plan.graphs] == ["vision.plan", "decoder.plan"]
    assert [profile.name for graph in plan.graphs for profile in graph.profiles] == [
        "vision",
        "prefill",
        "decode",
    ]


def test_the_gpu(become: Device) -> None:
    become(name=b"RTX 4090\0\0", capability=(8, 9), free=5, unified=False)
    assert gpu_here() == Gpu("RTX 4090, 8 SMs", "8.9", free_bytes=5, unified=False)


@pytest.mark.usefixtures("nothing_installed")
def test_without_tensorrt_the_key_stays_open(bundle: Path) -> None:
    plan = plan_build(bundle)
    assert isinstance(plan.key, DependencyError)
    assert "not known here: cuda-python is missing" in plan.text()
    assert plan.to_dict()["key"] is None
    assert "cuda-python is missing" in plan.to_dict()["obstacle"]
    with pytest.raises(DependencyError, match="cuda-python is missing"):
        plan.ready_key()


@pytest.mark.usefixtures("orin")
def test_the_package_that_brings_tensorrt(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DependencyError, match=r"apt install python3-libnvinfer.* pip install tens"):
        plan_build(bundle).ready_key()


def test_without_a_gpu(bundle: Path, become: Device) -> None:
    with pytest.raises(EngineError, match="no GPU here: found cudaErrorInsufficientDriver"):
        become(error="cudaErrorInsufficientDriver")
    assert "CUDA finds no GPU here" in plan_build(bundle).to_dict()["obstacle"]


@pytest.mark.parametrize(
    ("name", "closest"), [("tr", "trt"), ("rtx-sm90", "rtx-sm8"), ("sm121", "rtx-sm121")]
)
def test_an_unknown_target(bundle: Path, name: str, closest: str) -> None:
    with pytest.raises(ConfigError, match=f"no target is named '{name}'.*did you mean '{closest}"):
        plan_build(bundle, name)


def test_for_a_gpu_that_is_not_here(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "version", lambda: "1.7.1")
    for target, capability in (("rtx-sm86", "8.6"), ("rtx-sm120", "12.0"), ("rtx-sm121", "12.1")):
        plan = plan_build(bundle, target)
        assert plan.ready_key().device == EngineDevice("tensorrt-rtx", "1.7.1", "", capability)
        assert plan.ready_key().device.target == target
        assert [graph.engine for graph in plan.graphs] == ["vision.onnx", "decoder.onnx"]
        assert plan.gpu is None
        assert plan.trtexec() == []
        assert "trtexec" not in plan.text()


def test_for_rtx_a_decode_step_may_have_two_tokens(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pinned to one, its builder keeps the weights twice."""
    monkeypatch.setattr(rtx, "version", lambda: "1.7.1")
    _, decode = plan_build(bundle, "rtx-sm89").graphs[1].profiles
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (1, 2))


@pytest.mark.parametrize(
    ("vision", "decoder", "target", "refused"),
    [
        (None, "fp8", "rtx-sm86", True),
        ("fp8", None, "rtx-sm86", True),
        (None, "fp8", "rtx-sm89", False),
        (None, "int4", "rtx-sm86", False),
    ],
)
def test_fp8_on_a_gpu_without(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    vision: str | None,
    decoder: str | None,
    target: str,
    refused: bool,
) -> None:
    monkeypatch.setattr(rtx, "version", lambda: "1.7.1")
    quantized = Quantization(vision, decoder, None, "rtn", {})
    bundle = make_bundle(tmp_path / "fp8", quantization=quantized)
    if not refused:
        assert plan_build(bundle, target).ready_key().device.target == target
        return
    with pytest.raises(EngineError) as error:
        plan_build(bundle, target)
    assert str(error.value) == (
        "this GPU has no fp8: expected a GPU of compute capability 8.9 or later, found 8.6. Fix: "
        "export the bundle again: himix-edge export --target tensorrt, and quantize it "
        "to int8 or int4"
    )


@pytest.mark.parametrize("option", ["version_compatible", "strip_weights"])
def test_options_that_a_target_lacks(bundle: Path, option: str) -> None:
    with pytest.raises(ConfigError, match="rtx-sm89 has no --version-compatible"):
        plan_build(bundle, "rtx-sm89", **{option: True})


def test_a_quantized_bundle_for_onnx_runtime(tmp_path: Path) -> None:
    quantized = Quantization(None, "int4", 32, "rtn", {})
    bundle = make_bundle(tmp_path / "q", dialect="ort", quantization=quantized, cache_slots=None)
    with pytest.raises(EngineError) as error:
        plan_build(bundle)
    assert str(error.value) == (
        f"TensorRT can't read {bundle}, a bundle of the ort dialect: expected ONNX Runtime, found "
        "TensorRT. Fix: export the checkpoint, before quantizing for it: himix-edge export "
        "--target tensorrt"
    )


def test_a_native_bundle_on_jetpack_6(bundle: Path, become: Device) -> None:
    become("10.3.0")
    with pytest.raises(EngineError) as error:
        plan_build(bundle)
    assert "a bundle of the native dialect: expected TensorRT 10.15 or later" in str(error.value)
    assert str(error.value).endswith("himix-edge export --target jetpack-6.2")


@pytest.mark.parametrize("version", ["10.3.0", "10.15.1.29", "11.4.0.106"])
def test_the_portable_dialect_runs_everywhere(
    portable_bundle: Path, become: Device, version: str
) -> None:
    device = become(version)
    assert plan_build(portable_bundle).ready_key().device == device


@pytest.mark.parametrize("version", ["10.15.0", "10.16.1.11", "11.4.0.106"])
def test_the_native_dialect_needs_a_late_version(
    bundle: Path, become: Device, version: str
) -> None:
    device = become(version)
    assert plan_build(bundle).ready_key().device == device


def test_a_tensorrt_that_is_too_old(portable_bundle: Path, become: Device) -> None:
    become("8.6.2")
    with pytest.raises(EngineError, match=r"TensorRT 10\.3 or later, found TensorRT 8\.6\.2"):
        plan_build(portable_bundle)


def test_bfloat16_on_a_gpu_without(tmp_path: Path, become: Device) -> None:
    bundle = make_bundle(tmp_path / "b", dtype="bfloat16")
    become(capability=(7, 2), name=b"Xavier")
    with pytest.raises(EngineError, match=r"Xavier, 8 SMs has no bfloat16: expected .* 8\.0 or"):
        plan_build(bundle)
    become()
    assert plan_build(bundle).ready_key().precision == "bfloat16"


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="is not a bundle"):
        plan_build(tmp_path)


def test_the_same_by_hand(bundle: Path, orin: EngineDevice) -> None:
    plan = plan_build(bundle, version_compatible=True, strip_weights=True)
    vision, decoder = plan.trtexec()
    assert vision[:8] == [
        "trtexec",
        f"--onnx={bundle}/vision.onnx",
        "--saveEngine=vision.plan",
        "--stronglyTyped",
        "--memPoolSize=workspace:256",
        f"--timingCacheFile={timing_cache_path(bundle, orin)}",
        "--versionCompatible",
        "--stripWeights",
    ]
    cache = "past_key_values.{}.{}:1x2x64x16"
    caches = ",".join(cache.format(i, part) for i in range(2) for part in ("key", "value"))
    assert vision[8:] == [
        *(f"--{bound}Shapes=pixel_values:1x3x28x28,{caches}" for bound in ("min", "opt", "max")),
        "--skipInference",
    ]
    tokens = "--{}Shapes=input_ids:1x{},position_ids:1x{},write_indices:1,{}"
    assert decoder[8:] == [
        "--profile=0",
        *(
            tokens.format(bound, size, size, caches)
            for bound, size in (("min", 1), ("opt", 60), ("max", 60))
        ),
        "--profile=1",
        *(tokens.format(bound, 1, 1, caches) for bound in ("min", "opt", "max")),
        "--skipInference",
    ]
    plain = plan_build(bundle).trtexec()[0]
    assert not {"--versionCompatible", "--stripWeights"} & set(plain)
    assert len(plain) == len(vision) - 2


@pytest.mark.usefixtures("orin")
def test_text_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "with a space")
    plan = plan_build(bundle)
    text = plan.text()
    for command in plan.trtexec():
        pasted = text[text.index("trtexec \\\n") :]
        assert command in [shlex.split(part) for part in pasted.replace("\\\n", "").splitlines()]


@pytest.mark.usefixtures("orin")
def test_text(bundle: Path) -> None:
    text = plan_build(bundle, max_prompt=9, strip_weights=True).text()
    assert "target      trt\n" in text
    assert "key         TensorRT 10.16.1.11 on Orin, 8 SMs (sm 8.7), float16, vision " in text
    assert "prompts     up to 9 tokens in one step\n" in text
    assert "cache       64 slots\n" in text
    assert "flags       strongly typed, stripped of weights\n" in text
    assert "about 0.8 GB of memory to build it (an estimate)" in text
    assert "  prefill   input_ids, position_ids 1x1 .. 1x9 .. 1x9; write_indices 1; " in text
    assert "past_key_values.0.key and 3 more 1x2x64x16\n" in text


@pytest.mark.usefixtures("orin")
def test_json(bundle: Path, himix: Any) -> None:
    done = himix("build", bundle, "--dry-run", "--json", "--max-prompt", 9)
    body = json.loads(done.out)
    assert done.code == 0
    assert body["key"] == dataclasses.asdict(plan_build(bundle, max_prompt=9).ready_key())
    assert body["sizes"] == {"max_prompt": 9, "max_cache": 64, "max_decode": 1}
    assert body["graphs"][1]["profiles"][0]["shapes"]["input_ids"] == [[1, 1], [1, 9], [1, 9]]
    assert body["trtexec"] == plan_build(bundle, max_prompt=9).trtexec()
    assert not (bundle / "engines").exists()
