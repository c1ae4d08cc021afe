"""ONNX Runtime's execution providers: which there are, which package brings each, how it is opened.

ONNX Runtime itself goes on without a provider that it can't load, on the CPU, in silence. Here that
is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from himix_edge.bundle.files import BundleFiles
from himix_edge.bundle.graphs import read_graph
from himix_edge.contract import Manifest
from himix_edge.engines.profiles import Profile, Sizes, engine_sizes
from himix_edge.errors import BundleError, DependencyError
from himix_edge.telemetry import turn_off_session_events

CPU_NAME = "CPUExecutionProvider"


@dataclass(frozen=True)
class Provider:
    """Where ONNX Runtime computes, and where it keeps the cache from one step to the next.

    Attributes:
        name: ONNX Runtime's.
        memory: the arguments by which `OrtValue` knows it: device, and its number.
        fix: how to get it.
        plugin: the package that it comes in, where ONNX Runtime's own has not got it.
        options: of the provider's own; names and values as it documents them.
        shape_options: of providers that build engines of the graphs they are given: the names of
            the options that say for which shapes.
        profile_entry: by which a run says which of an engine's profiles it takes.
    """

    name: str
    memory: tuple[str, int]
    fix: str
    plugin: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    shape_options: str | None = None
    profile_entry: str | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether it is the processor, and shares its memory with numpy."""
        return self.name == CPU_NAME

    def sizes(self, manifest: Manifest) -> Sizes | None:
        """How much its engines take in at a time; None where it builds none."""
        return engine_sizes(manifest) if self.shape_options else None

    def shaped(self, profile: Profile) -> Provider:
        """The provider that builds for these shapes."""
        options = dict(self.options)
        for place, bound in enumerate(("min", "opt", "max")):
            options[str(self.shape_options).format(bound)] = ",".join(
                f"{name}:{'x'.join(map(str, bounds[place]))}"
                for name, bounds in profile.shapes.items()
            )
        return replace(self, options=options)


CPU = Provider(CPU_NAME, ("cpu", 0), "pip install onnxruntime")
CUDA = Provider("CUDAExecutionProvider", ("cuda", 0), "pip install 'onnxruntime-gpu[cuda,cudnn]'")
TENSORRT = Provider(
    "TensorrtExecutionProvider",
    ("cuda", 0),
    "pip install onnxruntime-gpu tensorrt",
    shape_options="trt_profile_{}_shapes",
)
TENSORRT_RTX = Provider(
    "NvTensorRTRTXExecutionProvider",
    ("cuda", 0),
    "pip install onnxruntime onnxruntime-ep-nv-tensorrt-rtx",
    plugin="onnxruntime_ep_nv_tensorrt_rtx",
    shape_options="nv_profile_{}_shapes",
    profile_entry="nv_profile_index",
)


def import_onnxruntime() -> Any:
    """The `onnxruntime` module, which nothing else in the package imports.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as error:
        raise DependencyError("ONNX Runtime is missing", fix=CPU.fix) from error
    turn_off_session_events(onnxruntime)
    return onnxruntime


def require(provider: Provider) -> None:
    """Checks that ONNX Runtime has a provider, and gets it ready.

    Raises:
        DependencyError: it hasn't, or the libraries or the GPU that it needs are not there.
    """
    ort = import_onnxruntime()
    if provider.plugin is not None:
        _plugin_devices(provider)
        return
    available = ort.get_available_providers()
    if provider.name not in available:
        raise DependencyError(
            f"this ONNX Runtime has no {provider.name}",
            found=", ".join(available),
            fix=f"pip uninstall onnxruntime, then: {provider.fix}",
        )
    if not provider.on_cpu and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA's libraries from the packages that pip installed


def open_graph(provider: Provider, files: BundleFiles, name: str, options: Any) -> Any:
    """A graph of a bundle, ready to run on a provider.

    Args:
        name: the graph's.
        options: a SessionOptions.

    Raises:
        BundleError: a graph that is corrupt, that himix-edge does not write, or that can't be
            opened.
        DependencyError: the provider can't be loaded.
    """
    model, weights = read_graph(files, name)
    add_weights = getattr(options, "add_external_initializers_from_files_in_memory", None)
    if add_weights is None or not provider.on_cpu:  # other providers read the weights themselves
        session = open_session(provider, files.path / name, options)
        files.require_unchanged()
        return session
    if weights:
        sizes = [len(buffer) for buffer in weights.values()]
        add_weights(list(weights), list(weights.values()), sizes)
    return open_session(provider, files.path / name, options, model)


def open_session(provider: Provider, path: Path, options: Any, model: bytes | None = None) -> Any:
    """A graph, or what was compiled from it, ready to run on a provider.

    Args:
        path: where it is.
        options: a SessionOptions.
        model: the graph's bytes, where they were read already.

    Raises:
        BundleError: a graph that can't be opened.
        DependencyError: the provider can't be loaded.
    """
    require(provider)
    ort = import_onnxruntime()
    listed: list[Any] | None = [(provider.name, dict(provider.options)), CPU_NAME]
    if provider.on_cpu:
        listed = [CPU_NAME]
    if provider.plugin is not None:
        options.add_provider_for_devices(_plugin_devices(provider), dict(provider.options))
        listed = None
    try:
        # Its "fallback" would open the graph on the CPU where the provider fails.
        session = ort.InferenceSession(
            model or str(path), options, providers=listed, enable_fallback=0
        )
    except Exception as error:  # its own exceptions share no other base
        fix = "copy the bundle again, or export it again with: himix-edge export"
        if "opset" in str(error).lower():  # the graph is of a later ONNX than it knows
            fix = "pip install --upgrade onnxruntime, or export it again with: --dialect portable"
        raise BundleError(
            f"ONNX Runtime cannot open {path}",
            found=next(iter(str(error).splitlines()), type(error).__name__),
            fix=fix,
        ) from error
    if provider.name not in (running := session.get_providers()):
        raise DependencyError(
            f"ONNX Runtime could not load its {provider.name}, whose libraries or GPU are missing",
            expected=f"{provider.name} for {path}",
            found=", ".join(running),
            fix=f"{provider.fix}; himix-edge doctor says what this device has",
        )
    return session


def _plugin_devices(provider: Provider) -> list[Any]:
    """The devices of a provider that comes as a library of its own, which is loaded once."""
    import importlib

    ort = import_onnxruntime()
    try:
        plugin = importlib.import_module(str(provider.plugin))
    except ImportError as error:
        raise DependencyError(f"{provider.name} is missing", fix=provider.fix) from error
    try:
        devices = [device for device in ort.get_ep_devices() if device.ep_name == provider.name]
        if not devices:
            ort.register_execution_provider_library(provider.name, plugin.get_library_path())
            devices = [device for device in ort.get_ep_devices() if device.ep_name == provider.name]
    except Exception as error:  # its own exceptions share no other base
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DependencyError(
            f"ONNX Runtime could not load its {provider.name}",
            found=reason,
            fix=f"install NVIDIA's driver; {provider.fix}",
        ) from error
    if not devices:
        raise DependencyError(
            f"{provider.name} finds no GPU that it can use",
            expected="an NVIDIA GPU of compute capability 7.5 or later",
            fix="run with --device cpu",
        )
    return devices
