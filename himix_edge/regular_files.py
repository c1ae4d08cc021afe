"""Files from a folder that a stranger may have filled: regular ones, and opened but once.

A link may lead out of the folder, a pipe never ends, and a path may lead to another file each time
it is opened. So a file is opened here, and everything else is done with what was opened.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

A_LINK = "a link"
SIZE = 2  # where a state has the size
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)  # a pipe that nobody writes to would wait for ever
)


def open_regular(path: Path) -> int:
    """A descriptor of a regular file that has no other name.

    Raises:
        OSError: no such file, or one that can't be read; or a link, be it symbolic (ELOOP) or hard
            (EMLINK); or a folder, a pipe or a device (EINVAL).
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        if path.is_symlink():
            raise OSError(errno.ELOOP, A_LINK) from error
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "a folder, a pipe or a device")
        if found.st_nlink > 1:
            raise OSError(errno.EMLINK, A_LINK)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_open(descriptor: int, most: int) -> bytes:
    """An open file's bytes from its beginning, whoever else reads it; no more than `most`."""
    parts: list[bytes] = []
    at = 0
    while at < most and (part := os.pread(descriptor, min(most - at, 1 << 30), at)):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file, no more than `most`.

    Raises:
        OSError: as `open_regular`.
    """
    descriptor = open_regular(path)
    try:
        return read_open(descriptor, most)
    finally:
        os.close(descriptor)


def state_of(found: os.stat_result) -> tuple[int, ...]:
    """What is the same as long as it is the same file, and nobody wrote to it."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
