"""Files that are whole or not there: everything the project writes passes through here."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from himix_edge.errors import OutputError

PARTIAL = ".partial"  # the ending of a file or folder that is still being written


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an error.

    Raises:
        OutputError: the folder can't be written, or the disk is full.
    """
    with _output_errors(path), _beside(path) as temporary:
        yield temporary
        temporary.replace(path)


@contextlib.contextmanager
def whole_folder(path: Path, keep: str | None = None) -> Iterator[Path]:
    """An empty temporary folder beside `path`, renamed to it when the block ends without an error.

    A folder that already stands at `path` stays as it is until the new one is whole, and is then
    replaced. Whatever ends the block early, Ctrl-C too, leaves no debris.

    Args:
        keep: a folder within that outlives the replacement, unless the new one has its own.

    Raises:
        OutputError: the parent folder can't be written, or the disk is full.
    """
    with _output_errors(path), _beside(path) as temporary:
        temporary.mkdir()
        yield temporary
        if not path.exists():
            temporary.replace(path)
            return
        with _beside(path) as old:
            try:
                path.replace(old)
                temporary.replace(path)
            except BaseException:  # Ctrl-C too: the old one must not go with its holder
                if not path.exists():
                    old.replace(path)
                raise
            if keep and (old / keep).is_dir() and not (path / keep).exists():
                (old / keep).replace(path / keep)


def refuse_foreign_folder(path: Path, kind: str, is_ours: Callable[[Path], bool]) -> None:
    """Lets a folder be written only where nothing of someone else's would be lost.

    Args:
        path: where a folder is to be written.
        kind: what it will be, for the error: "bundle".
        is_ours: whether a folder is of that kind, and may be replaced.

    Raises:
        OutputError: a file stands at `path`, or a folder that is neither empty nor of that kind.
    """
    with _output_errors(path):
        free = not (path.exists() or path.is_symlink())
        empty = path.is_dir() and not any(path.iterdir())
        if free or empty or (path.is_dir() and is_ours(path)):
            return
    raise OutputError(
        f"will not replace {path}",
        expected=f"a {kind} there, or nothing yet",
        found="another folder" if path.is_dir() else "a file",
        fix="choose another place, or move it away",
    )


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A fresh name next to `path`; whatever still bears it afterwards is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=PARTIAL, dir=path.parent))
    try:
        yield holder / path.name
    finally:
        shutil.rmtree(holder, ignore_errors=True)


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OutputError(
            f"cannot write {path}",
            expected="a folder that can be written, with room on the disk",
            found=reason,
            fix="choose another place, or free some space",
        ) from error
