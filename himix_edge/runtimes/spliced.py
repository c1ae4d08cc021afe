"""Some parts of a file, one after the other, as a file of their own; nothing is copied."""

from __future__ import annotations

import bisect
import io
import itertools
from collections.abc import Sequence
from typing import IO, TypeAlias

# (begin, end) within the file, or bytes that stand in for others.
Part: TypeAlias = "tuple[int, int] | bytes"


def spliced(file: IO[bytes], parts: Sequence[Part]) -> io.BufferedReader:
    """The parts as a file, which stays good as long as nobody else moves in `file`."""
    return io.BufferedReader(_Spliced(file, parts), 1 << 16)


class _Spliced(io.RawIOBase):
    def __init__(self, file: IO[bytes], parts: Sequence[Part]) -> None:
        self._file = file
        self._parts = [part for part in parts if _length(part)]
        self._ends = list(itertools.accumulate(map(_length, self._parts)))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        end = self._ends[-1] if self._ends else 0
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: end}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        index = bisect.bisect_right(self._ends, self._position)
        if index == len(self._parts):
            return 0
        part, left = self._parts[index], self._ends[index] - self._position
        size = min(left, len(buffer))
        start = _length(part) - left
        if isinstance(part, bytes):
            data = part[start : start + size]
        else:
            self._file.seek(part[0] + start)
            data = self._file.read(size)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _length(part: Part) -> int:
    return len(part) if isinstance(part, bytes) else max(part[1] - part[0], 0)


def merged(parts: Sequence[Part]) -> list[Part]:
    """The same, with parts that follow each other in the file as one."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else b""
        if isinstance(part, tuple) and isinstance(last, tuple) and last[1] == part[0]:
            found[-1] = (last[0], part[1])
        else:
            found.append(part)
    return found
