"""A user's text file, line by line, each with its number; or one error that says which is bad."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from himix_edge.errors import ConfigError

MAX_LINE = 1 << 16  # bytes; no model's context holds such a prompt
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, without blanks around them, and their numbers from 1 on.

    Lines end with LF, CRLF or CR; the text may begin with a byte order mark.

    Raises:
        ConfigError: what is no file or can't be read; a line that is no UTF-8, is too long, or has
            a NUL character in it.
    """
    number = 0
    for raw in _raw_lines(path):
        for part in raw.rstrip(b"\r\n").split(b"\r"):
            number += 1
            if line := _decoded(path, number, part).strip():
                yield number, line


def is_there(path: Path) -> bool:
    """Whether there is anything at all by that name: what is no text is not passed over."""
    return os.path.lexists(path)


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path} can't be read", expected="a text file", found="none")
        with path.open("rb") as file:
            if file.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
                file.seek(0)
            for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
                if len(raw) > MAX_LINE:
                    raise ConfigError(
                        f"{path}, line {number} is too long", expected=f"at most {MAX_LINE:,} bytes"
                    )
                yield raw
    except OSError as error:
        raise ConfigError(f"{path} can't be read", found=error.strerror or str(error)) from error


def _decoded(path: Path, number: int, raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}, line {number} is no text",
            expected="UTF-8",
            found=f"byte 0x{raw[error.start]:02x} after {raw[: error.start].decode()!r}",
            fix="save the file as UTF-8",
        ) from error
    if "\0" in text:
        raise ConfigError(
            f"{path}, line {number} is no text",
            expected="UTF-8",
            found="a NUL character",
            fix="save the file as UTF-8",
        )
    return text
