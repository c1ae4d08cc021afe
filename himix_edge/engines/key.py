"""What an engine is tied to: all that must be the same for it to be the right one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from himix_edge.contract import DECODER_GRAPH, ENGINES, VISION_GRAPH, Dtype, Manifest
from himix_edge.engines.profiles import Sizes, all_profiles, digest

Library = Literal["tensorrt", "tensorrt-rtx"]
LIBRARY_NAMES: dict[Library, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
# Of the file to open: TensorRT's own plan, or a graph of one node that names the engine beside it.
SUFFIXES: dict[Library, str] = {"tensorrt": ".plan", "tensorrt-rtx": ".onnx"}


@dataclass(frozen=True)
class EngineDevice:
    """What an engine is tied to, whatever the model.

    Attributes:
        kind: whose engines it runs.
        version: the library's, in full: "10.16.1.11".
        gpu: its name; "" where an engine fits all of a compute capability.
        compute_capability: "8.7".
    """

    kind: Library
    version: str
    gpu: str
    compute_capability: str

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits: the name of its folder."""
        body = json.dumps(dataclasses.astuple(self))
        return hashlib.sha256(body.encode()).hexdigest()[:12]

    @property
    def target(self) -> str:
        """What `himix-edge build --target` calls it."""
        if self.kind == "tensorrt":
            return "trt"
        return f"rtx-sm{self.compute_capability.replace('.', '')}"

    def __str__(self) -> str:
        where = f"{self.gpu} (sm {self.compute_capability})" if self.gpu else None
        library = f"{LIBRARY_NAMES[self.kind]} {self.version}"
        return f"{library} on {where or f'any GPU of sm {self.compute_capability}'}"


@dataclass(frozen=True)
class EngineKey:
    """All that must be the same for an engine to be the right one.

    Attributes:
        vision, decoder: sha256 of each graph, weights included.
        precision: of the weights and the cache.
        sizes: what it was built for.
        profiles: a digest of the shapes that follow from them.
        version_compatible: later versions of TensorRT can load it too.
        stripped: it has no weights; they come from the graph when it is loaded.
    """

    device: EngineDevice
    vision: str
    decoder: str
    precision: Dtype
    sizes: Sizes
    profiles: str
    version_compatible: bool = False
    stripped: bool = False

    def __str__(self) -> str:
        flags = [
            *(["version compatible"] if self.version_compatible else []),
            *(["stripped of its weights"] if self.stripped else []),
        ]
        return ", ".join(
            [
                str(self.device),
                self.precision,
                f"vision {self.vision[:12]}",
                f"decoder {self.decoder[:12]}",
                f"prompts to {self.sizes.max_prompt}",
                f"{self.sizes.max_cache} slots",
                f"profiles {self.profiles}",
                *flags,
            ]
        )


def engine_key(
    manifest: Manifest,
    device: EngineDevice,
    sizes: Sizes,
    *,
    version_compatible: bool = False,
    stripped: bool = False,
) -> EngineKey:
    """The key that an engine of this bundle has on that device."""
    return EngineKey(
        device=device,
        vision=graph_sha256(manifest, VISION_GRAPH),
        decoder=graph_sha256(manifest, DECODER_GRAPH),
        precision=manifest.dtype,
        sizes=sizes,
        profiles=digest(all_profiles(manifest, sizes)),
        version_compatible=version_compatible,
        stripped=stripped,
    )


def graph_sha256(manifest: Manifest, graph: str) -> str:
    """Of a graph's file and those of its weights, by their records in the manifest."""
    parts = sorted(
        (name, record.sha256)
        for name, record in manifest.files.items()
        if name == graph or name.startswith(f"{graph}.")
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def engine_name(graph: str, library: Library) -> str:
    """The name of the file that a runtime opens in the place of a graph."""
    return Path(graph).stem + SUFFIXES[library]


def engines_folder(bundle: Path, device: EngineDevice) -> Path:
    """Where the engines for a device are kept."""
    return bundle / ENGINES / device.digest


def timing_cache_path(bundle: Path, device: EngineDevice) -> Path:
    """Where what a build measured is kept for the next."""
    return bundle / ENGINES / timing_cache_name(device)


def timing_cache_name(device: EngineDevice) -> str:
    """The name of the file in which a build's measurements are kept for the next."""
    return f"{device.digest}.timing"


def build_command(bundle: Path, device: EngineDevice) -> str:
    """The command that builds the engines of a bundle for a device."""
    return f"himix-edge build {bundle} --target {device.target}"
