"""Where a bundle runs: `--device cpu|cuda|tensorrt|tensorrt-rtx|auto`.

cpu            ONNX Runtime
cuda           ONNX Runtime's CUDA provider
tensorrt       TensorRT itself, on engines that `himix-edge build` made; or, where only ONNX
               Runtime has a TensorRT, its provider, which builds its own
tensorrt-rtx   TensorRT for RTX, a provider that comes as a plugin of ONNX Runtime
auto           the first that works of: engines that the bundle has, cuda, cpu
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from himix_edge.bundle.files import BundleFiles
from himix_edge.bundles import cache_folder
from himix_edge.contract import ENGINES, Manifest
from himix_edge.engines import rtx
from himix_edge.engines.gpu import gpu_here
from himix_edge.engines.store import EngineDevice, Engines, find_engines
from himix_edge.errors import (
    BundleError,
    ConfigError,
    DependencyError,
    EngineError,
    OutputError,
    closest,
)
from himix_edge.runtimes.base import Engine
from himix_edge.runtimes.ort import OrtEngine
from himix_edge.runtimes.providers import (
    CPU,
    CUDA,
    TENSORRT,
    TENSORRT_RTX,
    import_onnxruntime,
    require,
)

if TYPE_CHECKING:
    from himix_edge.bundle.signature import Trusted

DEVICES = ("auto", "cpu", "cuda", "tensorrt", "tensorrt-rtx")
Obstacle = DependencyError | EngineError | OutputError
BuildReport = Callable[[str, float, str], None]  # what is built, how much of it is done, and how


@dataclass(frozen=True)
class Choices:
    """How a bundle is to be opened; `load` says what each means."""

    threads: int | None = None
    caches: int | None = None
    auto_build: bool = False
    report: BuildReport = lambda *_: None
    trusted: Trusted | None = None


@dataclass(frozen=True)
class Opened:
    """An engine, and where it runs.

    Attributes:
        device: one of `DEVICES`, but not "auto".
        passed_over: why not on a better one, where the bundle or the machine seems made for it.
    """

    engine: Engine
    device: str
    passed_over: tuple[str, ...] = ()


def open_engine(files: BundleFiles, device: str, choices: Choices) -> Opened:
    """Opens the graphs of a bundle, or engines made of them, on a device.

    Raises:
        ConfigError: an unknown device; it names the closest.
        DependencyError: a package that it needs is missing.
        EngineError: no GPU, or no engine that fits it and that this user built or trusts.
        OutputError: no place for what the device needs to write.
        BundleError: a bundle that it can't run.
    """
    if device == "auto":
        return _best(files, choices)
    if device not in _OPENERS:
        raise ConfigError(f"no device is named {device!r}", fix=closest(device, DEVICES))
    return Opened(_OPENERS[device](files, choices), device)


def _best(files: BundleFiles, choices: Choices) -> Opened:
    obstacles: list[Obstacle] = []
    for device in (*_engine_devices(files.path), *_cuda_if_there(), "cpu"):
        engine = _engine_or_obstacle(device, files, choices)
        if not isinstance(engine, Obstacle):
            return Opened(engine, device, tuple(map(str, obstacles)))
        obstacles.append(engine)
    raise obstacles[0]  # what is nearest to working


def _engine_or_obstacle(device: str, files: BundleFiles, choices: Choices) -> Engine | Obstacle:
    try:
        return _OPENERS[device](files, choices)
    except (DependencyError, EngineError, OutputError) as error:
        return error


def _engine_devices(bundle: Path) -> list[str]:
    """The devices that somebody built engines for, or all of them where nothing else could run."""
    try:
        import_onnxruntime()
    except DependencyError:
        return ["tensorrt"]
    suffixes = {path.suffix for path in (bundle / ENGINES).glob("[!.]*/*")}
    built = {"tensorrt": ".plan", "tensorrt-rtx": rtx.ENGINE_SUFFIX}
    return [device for device, suffix in built.items() if suffix in suffixes]


def _cuda_if_there() -> list[str]:
    try:
        require(CUDA)
    except DependencyError:
        return []
    return ["cuda"]


def _on_cpu(files: BundleFiles, choices: Choices) -> Engine:
    return OrtEngine(files, choices.threads, CPU)


def _on_cuda(files: BundleFiles, choices: Choices) -> Engine:
    return OrtEngine(files, choices.threads, CUDA)


def _on_tensorrt(files: BundleFiles, choices: Choices) -> Engine:
    from himix_edge.runtimes.trt import CACHES, TrtEngine

    bundle, manifest = files.path, files.manifest
    _refuse_ort_dialect(bundle, manifest)
    try:
        return TrtEngine(
            bundle,
            manifest,
            caches=CACHES if choices.caches is None else choices.caches,
            auto_build=choices.auto_build,
            trusted=choices.trusted,
            report=choices.report,
        )
    except DependencyError as missing:
        try:
            require(TENSORRT)
        except DependencyError:
            raise missing from None
    cache = _own_cache(manifest)
    options = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
        "trt_fp16_enable": str(int(manifest.dtype == "float16")),
        "trt_bf16_enable": str(int(manifest.dtype == "bfloat16")),
    }
    provider = dataclasses.replace(TENSORRT, options=options)
    return OrtEngine(files, choices.threads, provider)


def _on_tensorrt_rtx(files: BundleFiles, choices: Choices) -> Engine:
    bundle, manifest = files.path, files.manifest
    _refuse_ort_dialect(bundle, manifest)
    require(TENSORRT_RTX)
    compiled = _rtx_engines(bundle, manifest, choices.trusted)
    return OrtEngine(files, choices.threads, TENSORRT_RTX, compiled)


def _own_cache(manifest: Manifest) -> Path:
    """Where ONNX Runtime's TensorRT provider keeps the engines that it builds of these graphs.

    It loads what it finds there and asks nobody: the folder must be this user's alone.

    Raises:
        OutputError: it can't be made, or others can write into it.
    """
    folder = cache_folder() / "onnxruntime-tensorrt" / manifest.digest()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for own in (folder.parent, folder):
            own.mkdir(mode=0o700, exist_ok=True)
            found = own.lstat()
            if not stat.S_ISDIR(found.st_mode):
                raise NotADirectoryError(0, "a link")
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise PermissionError(0, "a folder that others can write")
    except OSError as error:
        raise OutputError(
            f"{folder} can't hold the engines that ONNX Runtime builds",
            expected="a folder that only you can write",
            found=error.strerror or str(error),
            fix="set HIMIX_EDGE_CACHE to a folder of your own",
        ) from error
    return folder


def _rtx_engines(bundle: Path, manifest: Manifest, trusted: Trusted | None) -> Engines | None:
    """The engines compiled for this GPU; None where none were: the provider then compiles itself.

    Raises:
        EngineError: there are some, for other GPUs, of other graphs, or not this user's.
    """
    if not any((bundle / ENGINES).glob(f"[!.]*/*{rtx.ENGINE_SUFFIX}")):
        return None
    capability = gpu_here().compute_capability
    device = EngineDevice("tensorrt-rtx", rtx.version(), "", capability)
    return find_engines(bundle, manifest, device, trusted=trusted)


def _refuse_ort_dialect(bundle: Path, manifest: Manifest) -> None:
    if manifest.dialect == "ort":
        raise BundleError(
            f"TensorRT can't run {bundle}",
            expected="a bundle in the portable or the native dialect",
            found="one that was quantized for ONNX Runtime",
            fix="run with --device cuda or cpu, or export for the device: himix-edge export "
            "--target tensorrt",
        )


_OPENERS: dict[str, Callable[[BundleFiles, Choices], Engine]] = {
    "cpu": _on_cpu,
    "cuda": _on_cuda,
    "tensorrt": _on_tensorrt,
    "tensorrt-rtx": _on_tensorrt_rtx,
}
