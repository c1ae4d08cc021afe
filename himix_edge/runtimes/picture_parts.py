"""What of a file its picture needs: no comments, profiles, thumbnails, texts or later frames.

Decoders read those too, some in a time that grows with the square of their size, or unpack them.
So the decoder gets a file without them: see `spliced.py`. Of what is left out, only how the picture
is turned is taken.

References: the PNG specification, ITU-T T.81, GIF89a.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable
from typing import IO, NamedTuple

from himix_edge.errors import ImageError
from himix_edge.runtimes.jpeg_scans import END, SCAN, START, TEMPORARY, next_marker
from himix_edge.runtimes.spliced import Part, merged
from himix_edge.runtimes.tiff_parts import tiff_parts

MAX_PARTS = 200_000  # chunks of a PNG, blocks of a GIF
MAX_SEGMENTS = 4000  # of a JPEG, ahead of its data
MAX_DATA = 1 << 20  # bytes of EXIF data or XMP that are asked how the picture is turned
PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
PNG_XMP, PNG_EXIF = b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"


class Needed(NamedTuple):
    """The parts of a file, and what it says of how its picture is turned."""

    parts: list[Part]
    exif: bytes = b""
    xmp: bytes = b""


def needed_parts(file: IO[bytes], kind: str, name: str) -> Needed | None:
    """What the picture needs of a file in this format; None of formats that are taken whole.

    Raises:
        ImageError: more parts than any encoder makes.
    """
    reader = READERS.get(kind)
    if reader is None:
        return None
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        return reader(file, size)
    except OverflowError as error:
        raise ImageError(
            f"{name} takes too long to decode",
            expected=f"a {kind} file of a picture",
            found=str(error),
            fix="save it again",
        ) from error


def _png(file: IO[bytes], size: int) -> Needed:
    parts: list[Part] = [(0, 8)]
    exif, xmp, at = b"", b"", 8
    for _ in range(MAX_PARTS):
        file.seek(at)
        head = file.read(8)
        end = at + 12 + int.from_bytes(head[:4], "big")
        kind = head[4:]
        if kind in PNG_KEPT:
            parts.append((at, min(end, size)))
        elif kind == b"eXIf" and not exif:
            exif = file.read(min(end - at - 12, MAX_DATA))
        elif kind in (b"iTXt", b"tEXt", b"zTXt"):
            text = file.read(min(end - at - 12, MAX_DATA))
            if text.startswith(PNG_XMP):
                xmp = xmp or text
            elif text.startswith(PNG_EXIF):
                exif = exif or _raw_profile(text[len(PNG_EXIF) :], packed=kind == b"zTXt")
        at = end
        if len(head) < 8 or kind == b"IEND" or at >= size:
            return Needed(merged(parts), exif, xmp)
    raise OverflowError(f"more than {MAX_PARTS:,} chunks")


def _raw_profile(text: bytes, *, packed: bool) -> bytes:
    """As ImageMagick writes it: a name and a length on lines of their own, then digits."""
    with contextlib.suppress(ValueError, zlib.error):
        if packed:
            text = zlib.decompressobj().decompress(text[1:], 2 * MAX_DATA)
        return bytes.fromhex("".join(text.decode("ascii").split("\n")[3:]))
    return b""


def _jpeg(file: IO[bytes], size: int) -> Needed:
    parts: list[Part] = [(0, 2)]
    exif, xmp = b"", b""
    file.seek(2)
    for _ in range(MAX_SEGMENTS):
        marker = next_marker(file)
        at = file.tell() - 2
        if marker == END:
            return Needed(merged(parts), exif, xmp)
        if marker == SCAN:
            return Needed(merged([*parts, (at, size)]), exif, xmp)
        if marker in (START, TEMPORARY):
            continue
        length = int.from_bytes(file.read(2), "big")
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            data = file.read(max(length - 2, 0)) if marker in (0xE0, 0xE1, 0xEE) else b""
            if data.startswith(EXIF):
                exif = exif or data
            elif data.startswith(XMP):
                xmp = xmp or data
            elif data.startswith((b"JFIF", b"Adobe")):
                parts.append((at, at + 2 + length))
        else:
            parts.append((at, min(at + 2 + length, size)))
        file.seek(at + 2 + max(length, 2))
    raise OverflowError(f"more than {MAX_SEGMENTS:,} segments ahead of the picture")


def _gif(file: IO[bytes], size: int) -> Needed:
    """Up to the first frame: the head, its colours, and the last control block."""
    head = file.read(13)
    at = 13 + (3 << (head[10] & 7) + 1 if len(head) == 13 and head[10] & 0x80 else 0)
    parts: list[Part] = [(0, min(at, size))]
    control: Part = b""
    for _ in range(MAX_PARTS):
        file.seek(at)
        block = file.read(2)
        if block[:1] != b"!":
            return Needed(merged([*parts, control, (at, size)]))
        end = _behind_blocks(file)
        if block == b"!\xf9":
            control = (at, min(end, size))
        at = end
    raise OverflowError(f"more than {MAX_PARTS:,} blocks ahead of the picture")


def _behind_blocks(file: IO[bytes]) -> int:
    for _ in range(2 * MAX_PARTS):
        length = file.read(1)
        if length in (b"", b"\0"):
            return file.tell()
        file.seek(length[0], os.SEEK_CUR)
    raise OverflowError(f"a comment of more than {2 * MAX_PARTS:,} blocks")


def _tiff(file: IO[bytes], size: int) -> Needed:
    return Needed(tiff_parts(file, size))


READERS: dict[str, Callable[[IO[bytes], int], Needed]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "GIF": _gif,
    "TIFF": _tiff,
}
