"""A TIFF's first picture alone: a directory of the tags that its pixels need, and no other.

Pillow reads what every tag points to, of every directory: a small file may point to the same bytes
thousands of times, or have a million directories.

References: TIFF 6.0; BigTIFF.
"""

from __future__ import annotations

import struct
from typing import IO

from himix_edge.runtimes.spliced import Part

# Bytes of a value by its type.
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4} | {
    16: 8,
    17: 8,
    18: 8,
}
SHORT = 3
BITS_PER_SAMPLE, COMPRESSION, TILE_WIDTH, TILE_LENGTH = 258, 259, 322, 323
UNCOMPRESSED = 1
KEPT = {
    256, 257, BITS_PER_SAMPLE, COMPRESSION, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317,
    320, TILE_WIDTH, TILE_LENGTH, 324, 325, 332, 338, 339, 347, *range(512, 522), *range(529, 533),
}  # fmt: skip
MAX_VALUES = 1_000_000  # of a tag: places of strips, one a row at most
MAX_TAGS = 65_536
MAX_TILE = 1 << 24  # pixels, which are decoded together; usual are 2**16


def tiff_parts(file: IO[bytes], size: int) -> list[Part]:
    """The file with another directory, at its end.

    Raises:
        OverflowError: a tag of more values than a picture needs.
        ValueError: no TIFF.
    """
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = struct.unpack(order + "H", head[2:4])[0] == 43
    count, entry, offset = ("Q", "HHQQ", "Q") if big else ("H", "HHLL", "L")
    at = 8 if big else 4
    width = struct.calcsize(order + offset)
    (start,) = struct.unpack(order + offset, head[at : at + width])
    file.seek(start)
    (tags,) = struct.unpack(order + count, file.read(struct.calcsize(order + count)))
    if tags > MAX_TAGS:
        raise OverflowError(f"{tags:,} tags")
    step = struct.calcsize(order + entry)
    data = file.read(tags * step)
    kept: dict[int, bytes] = {}
    for place in range(0, len(data) - step + 1, step):
        each = data[place : place + step]
        tag, kind, values, _ = struct.unpack(order + entry, each)
        if tag not in KEPT or tag in kept:
            continue
        if values > MAX_VALUES or values * SIZES.get(kind, 1) > size:
            raise OverflowError(f"{values:,} values of a tag")
        kept[tag] = each
    tile = [_value(kept.get(tag, b""), order, big) for tag in (TILE_WIDTH, TILE_LENGTH)]
    if tile[0] * tile[1] > MAX_TILE:
        raise OverflowError(f"tiles of {tile[0]} x {tile[1]}")
    directory = struct.pack(order + count, len(kept)) + b"".join(kept.values())
    directory += struct.pack(order + offset, 0)  # no further one
    return [
        (0, at),
        struct.pack(order + offset, size),
        (at + width, size),
        directory,
    ]


def _value(entry: bytes, order: str, big: bool) -> int:
    """The first value of an entry: 2 bytes if it is a short, else 4 or 8."""
    if not entry:
        return 0
    form = "H" if struct.unpack(order + "H", entry[2:4])[0] == SHORT else "Q" if big else "L"
    at = 12 if big else 8
    return int(struct.unpack(order + form, entry[at : at + struct.calcsize(order + form)])[0])
