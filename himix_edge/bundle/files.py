"""The one reader of a bundle's files. What is checked is what is used: each file is opened once.

A bundle may come from a stranger. So a name is plain and stays in the folder, a file is a regular
one of its own, listed in the manifest with its sha256, and the bytes that are compared with the
record are those that are used, however often the file at the path is exchanged meanwhile.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from himix_edge.contract import MANIFEST, Manifest, corrupt, unreadable
from himix_edge.errors import BundleError
from himix_edge.regular_files import SIZE, open_regular, read_open, state_of

_ATTEMPTS = 4  # at a bundle that is replaced while it is opened
_HASHED_AT_ONCE = 1 << 22  # bytes

Buffer = bytes | mmap.mmap


class BundleFiles:
    """The files of one bundle, open.

    Methods may be called from several threads at a time. Closing invalidates none of the bytes
    that were given out.

    Attributes:
        path: the bundle's folder.
        manifest: what it says of the files.
        verify: whether files are compared with their size and sha256 in the manifest.
    """

    def __init__(self, path: Path, manifest: Manifest, *, verify: bool = True) -> None:
        """Takes a manifest as it is; `open` reads the folder's own.

        Raises:
            BundleError: a file that is missing, no regular file, a link, or of another size.
        """
        self.path, self.manifest, self.verify = path, manifest, verify
        self._opened: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._checked: set[str] = set()
        self._lock = threading.Lock()
        try:
            for name, record in manifest.files.items():
                self._opened[name] = _open(path / name, record.size if verify else None)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str],
        *,
        verify: bool = True,
        read_manifest: Callable[[Path], Manifest] = Manifest.read,
    ) -> BundleFiles:
        """Reads the manifest of a bundle, and opens all files that it lists.

        A bundle that is replaced at that moment is read again: it is the old one or the new one.

        Args:
            read_manifest: how; by default as it is, whoever made it.

        Raises:
            BundleError: no bundle there, a corrupt manifest, one of another schema version, or
                files that are missing, no regular files, links, or of another size.
        """
        path = Path(bundle)
        manifest = read_manifest(path)
        for _ in range(_ATTEMPTS):
            try:
                return cls(path, manifest, verify=verify)
            except BundleError:  # noqa: PERF203 (a few times at most)
                before, manifest = manifest, read_manifest(path)
                if manifest == before:
                    raise
        return cls(path, manifest, verify=verify)

    def __enter__(self) -> BundleFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        while getattr(self, "_opened", None):
            _, (descriptor, _) = self._opened.popitem()
            os.close(descriptor)

    def read(self, name: str) -> bytes:
        """A file's bytes, compared with its record.

        Raises:
            BundleError: a file that the manifest does not list, or that differs.
        """
        descriptor, size = self._file(name)
        data = read_open(descriptor, size)
        self._compare(name, data)
        return data

    def map(self, name: str) -> Buffer:
        """A file's bytes, which the system reads when they are used; `check` compares them.

        Raises:
            BundleError: a file that the manifest does not list.
        """
        descriptor, size = self._file(name)
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) if size else b""

    def check(self, names: Iterable[str] | None = None) -> None:
        """Compares files with their sha256, each once.

        Args:
            names: None takes all files.

        Raises:
            BundleError: a file that differs, or that the manifest does not list.
        """
        for name in self.manifest.files if names is None else names:
            data = self.map(name)
            if name not in self._checked:
                self._compare(name, data)

    def require_unwritten(self) -> None:
        """Checks that nobody wrote to the open files; at their paths may be others by now.

        Raises:
            BundleError: a file that was written to.
        """
        for name, (descriptor, before) in self._opened.items():
            if state_of(os.fstat(descriptor))[:-1] != before[:-1]:  # but for when it was renamed
                path = self.path / name
                raise corrupt(path, "the file that was checked", "that it was written to")

    def require_unchanged(self) -> None:
        """Checks that each path still leads to the file that was opened, and nobody wrote to it.

        For libraries that open files by their path: call it after they did.

        Raises:
            BundleError: a file that was exchanged or written to.
        """
        for name, (_, before) in self._opened.items():
            path = self.path / name
            try:
                now = state_of(path.lstat())
            except OSError as error:
                raise unreadable(path, "the file that was checked", error) from error
            if now != before:
                raise corrupt(path, "the file that was checked", "another one, or a changed one")

    def _file(self, name: str) -> tuple[int, int]:
        """Its descriptor, and its size in bytes."""
        if name not in self._opened:
            raise corrupt(self.path / name, f"a record of it in {MANIFEST}", "none")
        descriptor, state = self._opened[name]
        return descriptor, state[SIZE]

    def _compare(self, name: str, data: Buffer) -> None:
        if not self.verify:
            return
        digest = hashlib.sha256()
        with memoryview(data) as view:
            for start in range(0, len(view), _HASHED_AT_ONCE):
                digest.update(view[start : start + _HASHED_AT_ONCE])
        expected, found = self.manifest.files[name].sha256, digest.hexdigest()
        if found != expected:
            raise corrupt(self.path / name, f"sha256 {expected[:12]}", found[:12])
        with self._lock:
            self._checked.add(name)


def _open(path: Path, size: int | None) -> tuple[int, tuple[int, ...]]:
    """A descriptor of a file, of a certain size if one is given, and its state."""
    try:
        descriptor = open_regular(path)
    except OSError as error:
        expected = "a file that can be read" if size is None else f"{size} bytes"
        raise unreadable(path, expected, error) from error
    found = os.fstat(descriptor)
    if size is not None and found.st_size != size:
        os.close(descriptor)
        raise corrupt(path, f"{size} bytes", f"{found.st_size} bytes")
    return descriptor, state_of(found)
