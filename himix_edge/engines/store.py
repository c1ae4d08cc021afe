"""Engines in their bundle, under the key of what they fit: the right one is found, or none.

    BUNDLE/engines/3f0c9a1b2d4e/engine.json      the key, the files, each with size and sha256
                               /vision.plan, decoder.plan
    BUNDLE/engines/3f0c9a1b2d4e.timing           what TensorRT measured there, for the next build

The folder is named after the device and its engine library, so that a new build takes the place of
the old one; what else the key holds says whether the engine is still that of the bundle's graphs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from himix_edge.contract import (
    DECODER_GRAPH,
    ENGINES,
    VISION_GRAPH,
    Dtype,
    FileRecord,
    Manifest,
)
from himix_edge.engines.profiles import Sizes, all_profiles, digest
from himix_edge.engines.versions import version_of
from himix_edge.errors import ConfigError, EngineError
from himix_edge.files import sha256_of, sole_writer, whole_folder
from himix_edge.plain import dataclass_from_dict

RECORD = "engine.json"

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


@dataclass(frozen=True)
class Engines:
    """The engines of a bundle for one device, as they were found."""

    folder: Path
    key: EngineKey

    @property
    def vision(self) -> Path:
        """The vision engine's file."""
        return self.folder / engine_name(VISION_GRAPH, self.key.device.kind)

    @property
    def decoder(self) -> Path:
        """The decoder engine's file."""
        return self.folder / engine_name(DECODER_GRAPH, self.key.device.kind)


@dataclass(frozen=True)
class _Record:
    """`engine.json`."""

    key: EngineKey
    files: dict[str, FileRecord]


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
    return bundle / ENGINES / f"{device.digest}.timing"


@contextlib.contextmanager
def whole_engines(bundle: Path, key: EngineKey) -> Iterator[Path]:
    """An empty temporary folder that takes its place in the bundle, with its record, when whole.

    The engines that stand there stay until then; whatever ends the block early, Ctrl-C too, leaves
    them and nothing else.

    Raises:
        OutputError: the bundle can't be written, or the disk is full.
    """
    try:
        with (
            sole_writer(bundle),  # or a new bundle takes the place of this one meanwhile
            whole_folder(engines_folder(bundle, key.device), last=RECORD) as folder,
        ):
            yield folder
            files = {path.name: FileRecord.of(path) for path in sorted(folder.iterdir())}
            record = dataclasses.asdict(_Record(key, files))
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    finally:
        with contextlib.suppress(OSError):  # not empty: as it should be, or as it was
            (bundle / ENGINES).rmdir()


def find_engines(
    bundle: Path, manifest: Manifest, device: EngineDevice, *, verify: bool = True
) -> Engines:
    """The engines of a bundle that fit this device and its library, if they are good.

    An engine of another build of TensorRT is one for this too if it was built version compatible.

    Args:
        verify: compare every file with its sha256; its size is compared in any case.

    Raises:
        EngineError: none was built, or only for other devices; or what was built is of other
            graphs, of another version of himix-edge, truncated or changed.
    """
    fix = f"himix-edge build {bundle} --target {device.target}"
    folder = engines_folder(bundle, device)
    if not folder.is_dir():
        others = _other_folders(bundle)
        near = [path for path, key in others.items() if _loadable_too(key, device)]
        if not near:
            raise EngineError(
                f"{bundle} has no engine for this device",
                expected=f"one for {device}",
                found="; ".join(f"one for {key}" for key in others.values()) or "none",
                fix=fix,
            )
        folder = near[0]
    record = _read_record(folder, fix)
    here = dataclasses.replace(
        engine_key(manifest, record.key.device, record.key.sizes),
        version_compatible=record.key.version_compatible,
        stripped=record.key.stripped,
    )
    if record.key != here or record.key.device.digest != folder.name:
        raise EngineError(
            f"the engine in {folder} is not this bundle's",
            expected=str(dataclasses.replace(here, device=device)),
            found=str(record.key),
            fix=fix,
        )
    found = Engines(folder, record.key)
    _check_files(found, record, fix, verify=verify)
    return found


def _loadable_too(key: EngineKey, device: EngineDevice) -> bool:
    """Whether an engine of an earlier TensorRT runs in this one, on the same GPU."""
    there = key.device
    return (
        key.version_compatible
        and dataclasses.replace(there, version=device.version) == device
        and version_of(there.version) <= version_of(device.version)
    )


def _other_folders(bundle: Path) -> dict[Path, EngineKey]:
    """Engines for any device, the newest version first; those that can't be read are left out."""
    found = {}
    for record in sorted((bundle / ENGINES).glob(f"[!.]*/{RECORD}")):
        with contextlib.suppress(EngineError):
            found[record.parent] = _read_record(record.parent, fix="").key
    newest = sorted(
        found.items(), key=lambda item: version_of(item[1].device.version), reverse=True
    )
    return dict(newest)


def _read_record(folder: Path, fix: str) -> _Record:
    path = folder / RECORD
    try:
        body: Any = json.loads(path.read_bytes())
        return dataclass_from_dict(_Record, body)
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        raise EngineError(
            f"the engine in {folder} is corrupt",
            expected=f"a {RECORD} of this version of himix-edge",
            found=f"{type(error).__name__}: {error}",
            fix=fix,
        ) from error


def _check_files(engines: Engines, record: _Record, fix: str, *, verify: bool) -> None:
    def corrupt(path: Path, expected: str, found: str) -> EngineError:
        return EngineError(f"{path} is corrupt", expected=expected, found=found, fix=fix)

    for path in (engines.vision, engines.decoder):
        if path.name not in record.files:
            raise corrupt(path, f"a record of it in {RECORD}", "none")
    for name, expected in record.files.items():
        path = engines.folder / name
        if not path.is_file():
            raise corrupt(path, f"{expected.size} bytes", "no such file")
        if (size := path.stat().st_size) != expected.size:
            raise corrupt(path, f"{expected.size} bytes", f"{size} bytes")
        if verify and (sha256 := sha256_of(path)) != expected.sha256:
            raise corrupt(path, f"sha256 {expected.sha256[:12]}", sha256[:12])
