"""Headers that make decoding slow or large out of proportion to the picture, before it is decoded.

References: ITU-T T.800 (JPEG 2000), annex A; netpbm's formats; Microsoft's BITMAPINFOHEADER.
"""

from __future__ import annotations

import re
from typing import IO

from himix_edge.errors import ImageError

SLOW_PIXELS = 2_000_000  # of what Pillow decodes in Python, a microsecond each
HEADER = 1 << 16  # bytes, in which the numbers of a PPM or the codestream of a JPEG 2000 begin
BLANK = rb"(?:\s|#[^\r\n]*[\r\n])+"
PPM = re.compile(rb"P([1-6])%b\d+%b\d+(?:%b(\d+))?\s" % (BLANK, BLANK, BLANK))
SOT, SOD, COD, COC, POC = b"\xff\x90", b"\xff\x93", b"\xff\x52", b"\xff\x53", b"\xff\x5f"
MAX_TILE_PARTS, MAX_SEGMENTS = 65_536, 1000
CODESTREAM = b"\xff\x4f\xff\x51"
MAX_TILES = 4096  # of a JPEG 2000, each of which takes some ten kilobytes, and a picture has one
LEAST_BLOCK = 10  # log2 of a code block's pixels: 32 x 32; usual are 64 x 64
LEAST_PRECINCT = 7  # log2 of its edge at full size; most files have none
MAX_LAYERS = 256
LARGE_BMP = 40  # bytes of the header from which on a BMP says how it is compressed
RUN_LENGTHS = (1, 2)


def is_slow(file: IO[bytes], kind: str, name: str) -> bool:
    """Whether Pillow decodes this file in Python.

    Raises:
        ImageError: a header that goes on and on, or a JPEG 2000 in very small parts.
    """
    file.seek(0)
    head = file.read(HEADER)
    if kind == "BMP":
        size = int.from_bytes(head[14:18], "little")
        return size >= LARGE_BMP and int.from_bytes(head[30:34], "little") in RUN_LENGTHS
    if kind == "PPM" and head[1:2] in b"123456":
        numbers = PPM.match(head)
        if numbers is None:
            raise _refused(name, kind, "no width and height at its beginning")
        levels = numbers[2] if head[1:2] in b"2356" else None
        return head[1:2] in b"123" or (levels is not None and int(levels[:9]) not in (255, 65535))
    if kind == "JPEG2000":
        _check_codestream(file, head, name)
    return False


def _check_codestream(file: IO[bytes], head: bytes, name: str) -> None:
    """Its own header, and those of its tiles, which may say otherwise."""
    start = head.find(CODESTREAM)
    if start < 0:
        raise ValueError("a JPEG 2000 file without a picture")
    # SIZ: length 2, capabilities 2, then 4 each: X, Y, XO, YO, XT, YT
    width, height, _, _, across, down = (
        int.from_bytes(head[at : at + 4], "big") for at in range(start + 8, start + 32, 4)
    )
    if not across or not down or -(-width // across) * -(-height // down) > MAX_TILES:
        raise _refused(name, "JPEG2000", f"more than {MAX_TILES:,} tiles")
    file.seek(start + 2)
    tile = _check_segments(file, name)
    for _ in range(MAX_TILE_PARTS):
        if tile is None:
            return
        file.seek(tile + 6)
        size = int.from_bytes(file.read(4), "big")
        file.seek(tile)
        _check_segments(file, name, first=SOT)
        tile = tile + size if size else None
        file.seek(tile or 0)
        tile = tile if file.read(2) == SOT else None
    raise _refused(name, "JPEG2000", f"more than {MAX_TILE_PARTS:,} parts of tiles")


def _check_segments(file: IO[bytes], name: str, first: bytes = b"") -> int | None:
    """Up to the data or the first tile, whose place is returned."""
    for _ in range(MAX_SEGMENTS):
        at = file.tell()
        marker = file.read(2)
        if marker == SOT and not first:
            return at
        if marker[:1] != b"\xff" or marker in (SOD, b"\xff\xd9"):
            return None
        length = file.read(2)
        segment = marker + length + file.read(max(int.from_bytes(length, "big") - 2, 0))
        if marker in (COD, COC):
            _check_style(segment, name)
        elif marker == POC:
            raise _refused(name, "JPEG2000", "a change of its order")
    raise _refused(name, "JPEG2000", f"more than {MAX_SEGMENTS:,} segments")


def _check_style(segment: bytes, name: str) -> None:
    """Of COD: style, order, layers (2), components, levels, block. Of COC: component, style, ..."""
    is_default = segment[:2] == COD
    start = 9 if is_default else 6
    style, values = segment[4 if is_default else 5], segment[start:]
    if is_default and int.from_bytes(segment[6:8], "big") > MAX_LAYERS:
        raise _refused(name, "JPEG2000", f"more than {MAX_LAYERS} layers")
    if len(values) < 5:
        raise _refused(name, "JPEG2000", "a damaged header")
    if (values[1] & 15) + (values[2] & 15) + 4 < LEAST_BLOCK:
        raise _refused(name, "JPEG2000", "code blocks of less than 1,024 pixels")
    edges = [min(value & 15, value >> 4) for value in reversed(values[5:])] if style & 1 else []
    if any(edge + smaller < LEAST_PRECINCT for smaller, edge in enumerate(edges)):
        raise _refused(name, "JPEG2000", "precincts of less than 128 pixels")


def _refused(name: str, kind: str, found: str) -> ImageError:
    return ImageError(
        f"{name} takes too long to decode",
        expected=f"a {kind} file as encoders write it",
        found=found,
        fix="save it again, as PNG",
    )
