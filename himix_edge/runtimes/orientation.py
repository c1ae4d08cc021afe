"""How a picture is turned, by its EXIF data or its XMP; of these nothing else is read.

Pillow reads all of EXIF: a hundred kilobytes may name the same bytes thousands of times over, and
take gigabytes.
"""

from __future__ import annotations

import re

from PIL import Image

ORIENTATION = 0x0112
SHORT = 3  # the type of its value
XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation_of(exif: bytes, xmp: bytes = b"") -> int:
    """From 1, upright, to 8; 1 where nothing says it."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "little", b"MM": "big"}.get(exif[:2])
    if order is not None:
        found = _first(exif, order)
        if found is not None:
            return found if found in TURNS else 1
    stated = XMP.search(xmp)
    return int(stated[1]) if stated else 1


def _first(exif: bytes, order: str) -> int | None:
    """The orientation that the first directory names."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], order)  # type: ignore[arg-type]

    start = number(4, 4)
    for entry in range(start + 2, start + 2 + 12 * number(start, 2), 12):
        if entry + 12 > len(exif):
            return None
        if number(entry, 2) == ORIENTATION:
            return number(entry + 8, 2 if number(entry + 2, 2) == SHORT else 4)
    return None


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image, turned as EXIF says."""
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)
