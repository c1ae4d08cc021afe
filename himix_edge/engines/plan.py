"""What a build will do, decided before anything is built; also for people who build by hand."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH, Manifest
from himix_edge.engines import rtx
from himix_edge.engines.gpu import Gpu, gpu_here
from himix_edge.engines.key import (
    EngineDevice,
    EngineKey,
    engine_key,
    engine_name,
    timing_cache_path,
)
from himix_edge.engines.memory import build_memory_bytes, weight_bytes, workspace_bytes
from himix_edge.engines.profiles import (
    Profile,
    Shape,
    Sizes,
    decoder_profiles,
    engine_sizes,
    vision_profile,
)
from himix_edge.engines.trt import engine_device
from himix_edge.engines.trtexec import shown, trtexec_command
from himix_edge.engines.versions import FIRST_TENSORRT, reads, version_of, version_text
from himix_edge.errors import ConfigError, DependencyError, EngineError, HimixError, closest

TENSORRT = "trt"
TARGETS = (TENSORRT, *(f"rtx-{sm}" for sm in rtx.SMS))
HOW_TO_EXPORT = {
    "portable": "himix-edge export --target jetpack-6.2",
    "native": "himix-edge export --target tensorrt",
}


@dataclass(frozen=True)
class GraphPlan:
    """One graph that becomes one engine.

    Attributes:
        engine: the name of the engine's file.
        memory_bytes: what building it takes, host and device together: an estimate.
    """

    graph: str
    engine: str
    weight_bytes: int
    memory_bytes: int
    profiles: tuple[Profile, ...]


@dataclass(frozen=True)
class BuildPlan:
    """A build, decided.

    Attributes:
        key: of the engines; or why this machine can't say what they would be tied to.
        gpu: that builds; None where none takes part.
    """

    bundle: Path
    target: str
    key: EngineKey | HimixError
    gpu: Gpu | None
    sizes: Sizes
    version_compatible: bool
    strip_weights: bool
    graphs: tuple[GraphPlan, ...]

    def ready_key(self) -> EngineKey:
        """The key, where there is one.

        Raises:
            DependencyError: an engine library, or cuda-python, is missing.
            EngineError: no GPU.
        """
        if isinstance(self.key, HimixError):
            raise self.key
        return self.key

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        key = None if isinstance(self.key, HimixError) else dataclasses.asdict(self.key)
        return {
            "bundle": str(self.bundle),
            "target": self.target,
            "key": key,
            "obstacle": str(self.key) if key is None else None,
            "sizes": dataclasses.asdict(self.sizes),
            "version_compatible": self.version_compatible,
            "strip_weights": self.strip_weights,
            "graphs": [dataclasses.asdict(graph) for graph in self.graphs],
            "trtexec": self.trtexec(),
        }

    def trtexec(self) -> list[list[str]]:
        """For each graph the command that builds such an engine on the device; none for RTX."""
        if self.target != TENSORRT:
            return []
        cache = Path("tensorrt.timing")
        if isinstance(self.key, EngineKey):
            cache = timing_cache_path(self.bundle, self.key.device)
        return [
            trtexec_command(
                self.bundle / graph.graph,
                graph.engine,
                graph.profiles,
                cache,
                workspace_bytes(graph.weight_bytes),
                version_compatible=self.version_compatible,
                strip_weights=self.strip_weights,
            )
            for graph in self.graphs
        ]

    def text(self) -> str:
        """For people."""
        unknown = isinstance(self.key, HimixError)
        lines = [
            f"target      {self.target}",
            f"key         {'not known here: ' if unknown else ''}{self.key}",
            f"prompts     up to {self.sizes.max_prompt} tokens in one step",
            f"cache       {self.sizes.max_cache} slots",
            f"flags       {', '.join(self._flags()) or 'none'}",
        ]
        for graph in self.graphs:
            lines.append(
                f"{graph.graph:<11} {graph.weight_bytes / 1e6:,.1f} MB -> {graph.engine}; about "
                f"{graph.memory_bytes / 1e9:.1f} GB of memory to build it (an estimate)"
            )
            lines += [f"  {profile.name:<9} {_profile_text(profile)}" for profile in graph.profiles]
        if commands := self.trtexec():
            lines += [
                "",
                "The same by hand, to measure with; the runtime loads what `build` keeps.",
            ]
            lines += [" \\\n  ".join(map(shlex.quote, command)) for command in commands]
        return "\n".join(lines)

    def _flags(self) -> list[str]:
        flags = ["strongly typed"] if self.target == TENSORRT else []
        flags += ["version compatible"] if self.version_compatible else []
        return flags + (["stripped of weights"] if self.strip_weights else [])


def plan_build(
    bundle: Path,
    target: str = TENSORRT,
    *,
    max_prompt: int | None = None,
    max_cache: int | None = None,
    version_compatible: bool = False,
    strip_weights: bool = False,
) -> BuildPlan:
    """What a build of a bundle would do here; nothing is built.

    Raises:
        ConfigError: an unknown target, a size out of range, an option that the target lacks.
        BundleError: no bundle there, or a corrupt manifest.
        EngineError: a bundle that this target can't read, and what to export instead.
    """
    if target not in TARGETS:
        raise ConfigError(f"no target is named {target!r}", fix=closest(target, TARGETS))
    if target != TENSORRT and (version_compatible or strip_weights):
        raise ConfigError(
            f"{target} has no --version-compatible and no --strip-weights",
            fix="leave them out, or build for --target trt",
        )
    manifest = Manifest.read(bundle)
    if manifest.dialect not in FIRST_TENSORRT:
        raise _unreadable(bundle, manifest, "TensorRT", "native")
    max_decode = 1 if target == TENSORRT else rtx.MAX_DECODE
    sizes = engine_sizes(manifest, max_prompt, max_cache, max_decode)
    gpu, device = _device(target)
    key: EngineKey | HimixError
    if isinstance(device, EngineDevice):
        _check_device(bundle, manifest, device)
        key = engine_key(
            manifest, device, sizes, version_compatible=version_compatible, stripped=strip_weights
        )
    else:
        key = device
    profiles: dict[str, tuple[Profile, ...]] = {
        VISION_GRAPH: (vision_profile(manifest),),
        DECODER_GRAPH: decoder_profiles(manifest, sizes),
    }
    return BuildPlan(
        bundle,
        target,
        key,
        gpu,
        sizes,
        version_compatible,
        strip_weights,
        tuple(_graph_plan(manifest, name, target, mine) for name, mine in profiles.items()),
    )


def _device(target: str) -> tuple[Gpu | None, EngineDevice | HimixError]:
    """The GPU that builds, and what the engine will be tied to, or why that can't be said."""
    try:
        if target == TENSORRT:
            gpu = gpu_here()
            return gpu, engine_device(gpu)
        sm = target.removeprefix("rtx-sm")
        return None, EngineDevice("tensorrt-rtx", rtx.version(), "", f"{sm[:-1]}.{sm[-1]}")
    except (EngineError, DependencyError) as error:
        return None, error


def _check_device(bundle: Path, manifest: Manifest, device: EngineDevice) -> None:
    """Whether this library on this GPU can read such graphs."""
    if device.kind == "tensorrt" and not reads(version_of(device.version), manifest.dialect):
        other = "portable" if manifest.dialect == "native" else None
        raise _unreadable(bundle, manifest, f"TensorRT {device.version}", other)
    export = HOW_TO_EXPORT[manifest.dialect]
    has = version_of(device.compute_capability)
    if manifest.dtype == "bfloat16" and has < (8, 0):
        raise _too_old(device, "bfloat16", "8.0", f"{export} --dtype float16")
    stored = manifest.quantization
    if stored and "fp8" in (stored.vision, stored.decoder) and has < (8, 9):
        raise _too_old(device, "fp8", "8.9", f"{export}, and quantize it to int8 or int4")


def _too_old(device: EngineDevice, kind: str, first: str, how: str) -> EngineError:
    return EngineError(
        f"{device.gpu or 'this GPU'} has no {kind}",
        expected=f"a GPU of compute capability {first} or later",
        found=device.compute_capability,
        fix=f"export the bundle again: {how}",
    )


def _unreadable(bundle: Path, manifest: Manifest, library: str, other: str | None) -> EngineError:
    first = FIRST_TENSORRT.get(manifest.dialect)
    needed = f"TensorRT {version_text(first)} or later" if first else "ONNX Runtime"
    quantized = ", before quantizing" if manifest.quantization else ""
    return EngineError(
        f"{library} can't read {bundle}, a bundle of the {manifest.dialect} dialect",
        expected=needed,
        found=library,
        fix=f"export the checkpoint{quantized} for it: {HOW_TO_EXPORT[other]}"
        if other
        else f"install {needed}",
    )


def _graph_plan(
    manifest: Manifest, graph: str, target: str, profiles: tuple[Profile, ...]
) -> GraphPlan:
    weights = weight_bytes(manifest, graph)
    return GraphPlan(
        graph=graph,
        engine=engine_name(graph, "tensorrt" if target == TENSORRT else "tensorrt-rtx"),
        weight_bytes=weights,
        memory_bytes=build_memory_bytes(weights),
        profiles=profiles,
    )


def _profile_text(profile: Profile) -> str:
    """Every input once, but of the cache's, which are all alike, only the first."""
    alike: dict[tuple[Shape, Shape, Shape], list[str]] = {}
    for name, bounds in profile.shapes.items():
        alike.setdefault(bounds, []).append(name)
    texts = []
    for bounds, names in alike.items():
        sizes = [shown(bound) for bound in bounds]
        which = ", ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more"
        texts.append(f"{which} {' .. '.join(sizes) if len(set(sizes)) > 1 else sizes[0]}")
    return "; ".join(texts)
