"""Engines in their bundle, under the key of what they fit: the right one is found, or none.

    BUNDLE/engines/3f0c9a1b2d4e/engine.json      the key, the files, each with size and sha256
                               /engine.mac       that this user trusts them; see `trust.py`
                               /vision.plan, decoder.plan
    BUNDLE/engines/3f0c9a1b2d4e.timing           what TensorRT measured there, for the next build
    BUNDLE/engines/3f0c9a1b2d4e.timing.mac       that this user's build measured it

The folder is named after the device and its engine library, so that a new build takes the place of
the old one; what else the key holds says whether the engine is still that of the bundle's graphs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from himix_edge.contract import ENGINES, FileRecord, Manifest
from himix_edge.engines.folders import open_folder, read_small, write_small
from himix_edge.engines.key import (
    EngineDevice,
    EngineKey,
    build_command,
    engine_key,
    engine_name,
    engines_folder,
    timing_cache_path,
)
from himix_edge.engines.opened import Engines
from himix_edge.engines.trust import ENGINE_SIGNATURE, MAC, is_signed, is_trusted, trust_record
from himix_edge.engines.versions import version_of
from himix_edge.errors import ConfigError, EngineError, OutputError
from himix_edge.files import sole_writer, whole_folder
from himix_edge.plain import dataclass_from_dict

if TYPE_CHECKING:
    from himix_edge.bundle.signature import Trusted

__all__ = [  # what is asked of engines, keys included
    "EngineDevice",
    "EngineKey",
    "Engines",
    "StoredEngines",
    "engine_key",
    "engine_name",
    "engines_folder",
    "find_engines",
    "refuse_linked_folders",
    "seal_engines",
    "timing_cache_path",
    "whole_engines",
]

RECORD = "engine.json"
MOST_RECORD = 1 << 20  # bytes; ours have about two thousand


@dataclass(frozen=True)
class _Record:
    """`engine.json`."""

    key: EngineKey
    files: dict[str, FileRecord]


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


def seal_engines(bundle: Path, key: EngineKey) -> Engines:
    """Makes the proof that this user built the engines that stand in a bundle since just now.

    Raises:
        EngineError: other engines have taken their place; or this user's key can't be relied on.
        OutputError: the proof can't be written.
    """
    stored = StoredEngines.read(bundle, key.device.digest)
    if stored.engines.key != key:
        raise EngineError(
            f"another build has replaced the engines in {stored.engines.folder}",
            expected=str(key),
            found=str(stored.engines.key),
            fix="build once more, one build at a time",
        )
    stored.trust()
    return stored.engines


def find_engines(
    bundle: Path,
    manifest: Manifest,
    device: EngineDevice,
    *,
    trusted: Trusted | None = None,
) -> Engines:
    """The engines of a bundle that fit this device and its library, and may be run.

    An engine of another build of TensorRT is one for this too if it was built version compatible.
    Only their record is read here: their files are compared with it as they are read.

    Args:
        trusted: whose signature makes an engine as good as one that was built here.

    Raises:
        EngineError: none was built, or only for other devices; or what was built is of other
            graphs, of another version of himix-edge, incomplete, or not by this user.
    """
    name = _folder_for(bundle, device)
    fix = build_command(bundle, device)
    stored = StoredEngines.read(bundle, name, fix)
    found = stored.engines
    here = _key_here(manifest, found.key)
    if found.key != here or found.key.device.digest != name:
        raise EngineError(
            f"the engine in {found.folder} is not this bundle's",
            expected=str(dataclasses.replace(here, device=device)),
            found=str(found.key),
            fix=fix,
        )
    if not ((trusted and stored.is_signed(trusted)) or stored.is_trusted()):
        signed = " or one that the given key has signed" if trusted else ""
        raise EngineError(
            f"the engine in {found.folder}, which is code, is not run",
            expected=f"an engine that this user built or trusts{signed}",
            found="an engine that this user did not build",
            fix=f"{fix}; or, if you trust where it comes from: himix-edge trust {bundle}",
        )
    return found


@dataclass(frozen=True)
class StoredEngines:
    """Engines as they stand in a bundle, whoever put them there.

    Attributes:
        record: the bytes of `engine.json`.
    """

    bundle: Path
    engines: Engines
    record: bytes

    @classmethod
    def names(cls, bundle: Path) -> list[str]:
        """The folders of engines in a bundle.

        Raises:
            EngineError: `engines` is a link.
        """
        if not (bundle / ENGINES).is_dir():
            return []
        with _opened(bundle) as folder:
            return sorted(
                entry.name
                for entry in os.scandir(folder)
                if not entry.name.startswith(".") and not entry.is_file(follow_symlinks=False)
            )

    @classmethod
    def read(cls, bundle: Path, name: str, fix: str = "") -> StoredEngines:
        """Reads a record.

        Args:
            fix: for the errors; by default to remove the folder.

        Raises:
            EngineError: a link, or a record that is missing, damaged or of another version.
        """
        path = bundle / ENGINES / name
        fix = fix or f"remove {path}, or build the engines again"
        with _opened(bundle, name) as folder:
            try:
                data = read_small(folder, RECORD, MOST_RECORD)
                body: Any = json.loads(data)
                record = dataclass_from_dict(_Record, body)
            except (OSError, ValueError, RecursionError, ConfigError) as error:
                raise EngineError(
                    f"the engine in {path} is corrupt",
                    expected=f"a {RECORD} of this version of himix-edge",
                    found=f"{type(error).__name__}: {error}",
                    fix=fix,
                ) from error
        engines = Engines(path, record.key, record.files)
        for file in record.files:
            if not _is_plain(file):
                raise EngineError(
                    f"the engine in {path} is corrupt",
                    expected="names of files in its own folder",
                    found=repr(file),
                    fix=fix,
                )
        for needed in (engines.vision, engines.decoder):
            if needed.name not in record.files:
                raise EngineError(
                    f"{needed} is corrupt",
                    expected=f"a record of it in {RECORD}",
                    found="none",
                    fix=fix,
                )
        return cls(bundle, engines, data)

    def is_of(self, manifest: Manifest) -> bool:
        """Whether they were built of the graphs that a bundle has."""
        key = self.engines.key
        return key == _key_here(manifest, key) and key.device.digest == self.engines.folder.name

    def is_trusted(self) -> bool:
        """Whether this user has built or trusts them.

        Raises:
            EngineError: this user's key can't be relied on.
        """
        with _opened(self.bundle, self.engines.folder.name) as folder:
            return is_trusted(folder, self.record)

    def is_signed(self, trusted: Trusted) -> bool:
        """Whether a key has signed them."""
        with _opened(self.bundle, self.engines.folder.name) as folder:
            return is_signed(folder, self.record, trusted)

    def trust(self) -> None:
        """Makes the proof that this user trusts them.

        Raises:
            EngineError: this user's key can't be relied on.
            OutputError: it can't be written.
        """
        with _opened(self.bundle, self.engines.folder.name) as folder:
            try:
                trust_record(folder, self.record)
            except OSError as error:
                raise _unwritable(self.engines.folder / MAC, error) from error

    def put_signature(self, signature: bytes) -> None:
        """Keeps a signature of the record beside it.

        Raises:
            OutputError: it can't be written.
        """
        with _opened(self.bundle, self.engines.folder.name) as folder:
            try:
                write_small(folder, ENGINE_SIGNATURE, signature)
            except OSError as error:
                raise _unwritable(self.engines.folder / ENGINE_SIGNATURE, error) from error


def refuse_linked_folders(bundle: Path, device: EngineDevice) -> None:
    """Before a build: the folders that it writes into must be the bundle's own.

    Raises:
        EngineError: one is a link.
    """
    for path in (bundle / ENGINES, engines_folder(bundle, device)):
        if path.is_symlink():
            raise _linked(path)


def _key_here(manifest: Manifest, key: EngineKey) -> EngineKey:
    """The key that an engine of these graphs would have, built in the same way as another."""
    return engine_key(
        manifest,
        key.device,
        key.sizes,
        version_compatible=key.version_compatible,
        stripped=key.stripped,
    )


def _folder_for(bundle: Path, device: EngineDevice) -> str:
    """The name of the folder for a device, or of one whose engines it can load too."""
    names = StoredEngines.names(bundle)
    if device.digest in names:
        return device.digest
    others: dict[str, EngineKey] = {}
    for name in names:
        with contextlib.suppress(EngineError):
            others[name] = StoredEngines.read(bundle, name).engines.key
    near = [name for name, key in others.items() if _loadable_too(key, device)]
    if near:
        return max(near, key=lambda name: version_of(others[name].device.version))
    raise EngineError(
        f"{bundle} has no engine for this device",
        expected=f"one for {device}",
        found="; ".join(f"one for {key}" for key in others.values()) or "none",
        fix=build_command(bundle, device),
    )


def _loadable_too(key: EngineKey, device: EngineDevice) -> bool:
    """Whether an engine of an earlier TensorRT runs in this one, on the same GPU."""
    there = key.device
    return (
        key.version_compatible
        and dataclasses.replace(there, version=device.version) == device
        and version_of(there.version) <= version_of(device.version)
    )


@contextlib.contextmanager
def _opened(bundle: Path, *names: str) -> Iterator[int]:
    """A folder of the engines in a bundle, held open."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(open_folder(bundle, ENGINES, *names))
        except OSError as error:
            path = bundle.joinpath(ENGINES, *names)
            for linked in (bundle / ENGINES, path):
                if linked.is_symlink():
                    raise _linked(linked) from error
            raise EngineError(
                f"{path} can't be read",
                expected="a folder of engines",
                found=error.strerror or str(error),
                fix=f"remove {path}, or build the engines again",
            ) from error
        yield folder


def _linked(path: Path) -> EngineError:
    return EngineError(
        f"{path} is not used",
        expected="a folder of the bundle's own",
        found="a link",
        fix=f"remove the link {path}, and build the engines again",
    )


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write {path}",
        expected="a folder that can be written, with room on the disk",
        found=error.strerror or str(error),
        fix="free some space, or copy the bundle to another place",
    )


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in its own folder."""
    return (
        bool(name) and name.isprintable() and not (name.startswith(".") or set(name) & set("/\\"))
    )
