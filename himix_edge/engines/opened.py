"""Engines that were found in a bundle: their record, and the bytes that fit it.

What is checked is what is used. A file is opened once; the bytes that are hashed are those that are
handed on, to TensorRT itself or, for a library that opens files by their paths, in a copy that
nobody else can change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from himix_edge.claims import scratch_folder
from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH, FileRecord
from himix_edge.engines.epcontext import named_engine
from himix_edge.engines.folders import UnusualFileError, open_file, open_folder
from himix_edge.engines.key import EngineKey, build_command, engine_name
from himix_edge.errors import EngineError, OutputError

_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Engines:
    """The engines of a bundle for one device.

    Attributes:
        folder: BUNDLE/engines/DIGEST.
        files: what their record says of each; `read` and `copied` give bytes that fit it.
    """

    folder: Path
    key: EngineKey
    files: Mapping[str, FileRecord] = field(default_factory=dict, compare=False, repr=False)

    @property
    def vision(self) -> Path:
        """The vision engine's file."""
        return self.folder / engine_name(VISION_GRAPH, self.key.device.kind)

    @property
    def decoder(self) -> Path:
        """The decoder engine's file."""
        return self.folder / engine_name(DECODER_GRAPH, self.key.device.kind)

    def check(self) -> None:
        """Compares every file with its record.

        Raises:
            EngineError: one is missing, a link, truncated or changed.
        """
        for name in self.files:
            for _ in self._parts(name, _CHUNK):
                pass

    def read(self, path: Path) -> bytes:
        """The bytes of one of the files, when they have been found to be those of its record.

        Raises:
            EngineError: the file is missing, a link, truncated or changed.
        """
        return b"".join(self._parts(path.name, self.files[path.name].size))

    @contextlib.contextmanager
    def copied(self) -> Iterator[Engines]:
        """The same engines in a temporary folder that is this user's alone.

        Raises:
            EngineError: as `check`; or a graph names a file that its record does not.
            OutputError: there is no room for the copy.
        """
        with contextlib.ExitStack() as stack:
            try:
                place = stack.enter_context(scratch_folder())
                copies = dataclasses.replace(self, folder=place)
                for name in self.files:
                    with (copies.folder / name).open("wb") as file:
                        file.writelines(self._parts(name, _CHUNK))
            except OSError as error:
                raise OutputError(
                    f"cannot copy the engines in {self.folder} to a temporary folder",
                    expected=f"{sum(file.size for file in self.files.values()) / 1e6:,.0f} MB free",
                    found=error.strerror or str(error),
                    fix="free some space there, or set TMPDIR to a folder that has it",
                ) from error
            if self.key.device.kind == "tensorrt-rtx":
                for path in (copies.vision, copies.decoder):
                    self._check_named_engine(path)
            yield copies

    def _parts(self, name: str, most: int) -> Iterator[bytes]:
        """The bytes of a file, part by part; at the end an error if they are not the right ones."""
        path, expected, digest = self.folder / name, self.files[name], hashlib.sha256()
        bundle, engines = self.folder.parents[1], self.folder.parent.name
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(open_folder(bundle, engines, self.folder.name))
                file = stack.enter_context(open_file(folder, name))
            except UnusualFileError as error:
                raise self._corrupt(path, "a regular file", str(error)) from error
            except OSError as error:
                found = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
                raise self._corrupt(path, f"{expected.size} bytes", str(found)) from error
            size = os.fstat(file.fileno()).st_size
            if size != expected.size:
                raise self._corrupt(path, f"{expected.size} bytes", f"{size} bytes")
            left = expected.size
            while left and (part := file.read(min(most, left))):
                left -= len(part)
                digest.update(part)
                yield part
        if (sha256 := digest.hexdigest()) != expected.sha256:
            raise self._corrupt(path, f"sha256 {expected.sha256[:12]}", sha256[:12])

    def _check_named_engine(self, copy: Path) -> None:
        path = self.folder / copy.name
        try:
            named = named_engine(copy.read_bytes())
        except ValueError as error:
            raise self._corrupt(path, "one node that names its engine", str(error)) from error
        if named not in self.files:
            raise self._corrupt(path, "the name of a recorded file", repr(named))

    def _corrupt(self, path: Path, expected: str, found: str) -> EngineError:
        fix = build_command(self.folder.parents[1], self.key.device)
        return EngineError(f"{path} is corrupt", expected=expected, found=found, fix=fix)
