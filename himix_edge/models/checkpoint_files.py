"""Files of a checkpoint's folder, which may be a stranger's: regular ones, of a bounded size.

Links are followed: a snapshot in the hub's cache is made of links to its blobs. Names that stand in
a file of the folder are plain names, so that nothing there says which other file is read.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from himix_edge.errors import CheckpointError

MAX_TEXT_BYTES = 64 << 20  # the largest tokenizers have 35 MB


def read_bytes(path: Path, most: int = MAX_TEXT_BYTES) -> bytes:
    """What a small file holds.

    Raises:
        CheckpointError: a pipe, a device or a folder; a file of more than `most` bytes.
        OSError: it can't be read.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"cannot read {path}", found="a pipe or a device, no file")
        data = file.read(most + 1)
    if len(data) > most:
        raise CheckpointError(
            f"cannot read {path}", expected=f"{most >> 20} MB at most", found="more"
        )
    return data


def _open_at_once(path: str, flags: int) -> int:
    """Opens a pipe that nobody writes into without waiting."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def plain_name(path: Path, name: object) -> str:
    """A name that stands in a file, of another one in the same folder.

    Args:
        path: the file in which it stands.

    Raises:
        CheckpointError: a path to elsewhere, or no name.
    """
    if isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0"):
        return name
    raise CheckpointError(
        f"cannot use {path}",
        expected="names of files in the same folder",
        found=repr(name)[:100],
        fix="use the folder as its author published it",
    )
