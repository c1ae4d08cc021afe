"""Files in the folders of a bundle, opened in such a way that no link leads elsewhere.

Every name is opened relative to the folder before it, which is held open. What is read is then of
one file, whatever is renamed meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from typing import BinaryIO

from himix_edge.claims import PARTIAL


class UnusualFileError(OSError):
    """A file that is not one regular file with one name."""


@contextlib.contextmanager
def open_folder(root: str | os.PathLike[str], *names: str) -> Iterator[int]:
    """A descriptor of ROOT/NAME/NAME...; the root may be a link, the names may not.

    Raises:
        OSError: one of them is missing, a link, or no folder.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in names:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(folder: int, name: str) -> BinaryIO:
    """A file of an open folder, to be read.

    Raises:
        UnusualFileError: a link, a device, a pipe, or a file that has a second name.
        OSError: it is missing, or can't be read.
    """
    try:  # without O_NONBLOCK, a pipe would wait for its writer
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        if is_link(folder, name):
            raise UnusualFileError("a link") from error
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(descriptor)
        regular = stat.S_ISREG(found.st_mode)
        raise UnusualFileError("a file with a second name" if regular else "no regular file")
    return os.fdopen(descriptor, "rb")


def is_link(folder: int, name: str) -> bool:
    """Whether a name in an open folder is a symbolic link."""
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def read_small(folder: int, name: str, most: int) -> bytes:
    """The bytes of a file of an open folder.

    Raises:
        UnusualFileError: as `open_file`; or it has more than `most` bytes.
        OSError: it is missing, or can't be read.
    """
    with open_file(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UnusualFileError(f"a file of more than {most} bytes")
        return file.read(size)


def write_small(folder: int, name: str, data: bytes, mode: int = 0o644) -> None:
    """Writes a file of an open folder, whole or not at all; a link there is replaced.

    Raises:
        OSError: it can't be written.
    """
    temporary = f".himix-edge-{secrets.token_hex(8)}{PARTIAL}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(temporary, flags, mode, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
