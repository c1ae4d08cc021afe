"""What a JPEG's markers tell of the work and memory that decoding it takes, before any of it.

Reference: ITU-T T.81, annex B.
"""

from __future__ import annotations

import os
import re
from typing import IO

# Within a scan FF 00 is a byte of data and FF D0..D7 a restart; FF FF is a fill byte.
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
CHUNK = 1 << 16  # bytes searched at a time
# Frame headers: C0..CF without DHT, JPG and DAC; of these, those of progressive frames.
FRAMES = {0xC0 + i for i in range(16)} - {0xC4, 0xC8, 0xCC}
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
MARKERS = 50  # for each scan, all kinds; an encoder writes up to ten
SCAN, END, START, TEMPORARY = 0xDA, 0xD9, 0xD8, 0x01


def buffered_scans(file: IO[bytes], most: int) -> int:
    """The number of scans if the decoder must hold all of the picture's coefficients, else 0.

    It must where a scan is not the whole picture: in progressive files, and in sequential ones
    whose first scan holds some of the components only. The file's position is left as it was.

    Args:
        most: counting ends above this number, and where there are far more markers of any kind.
    """
    position = file.tell()
    file.seek(2)  # the start of the image
    scans, components, progressive, markers = 0, 0, False, 0
    while scans <= most and (marker := next_marker(file)) != END:
        markers += 1
        if markers > MARKERS * most:
            return most + 1
        if marker in (START, TEMPORARY):
            continue
        length = int.from_bytes(file.read(2), "big")
        if marker in FRAMES:
            progressive = marker in PROGRESSIVE
            components = (file.read(6)[5:] or b"\0")[0]
            length -= 6
        elif marker == SCAN:
            in_scan = (file.read(1) or b"\0")[0]
            if not scans and not progressive and in_scan >= components:
                break
            scans += 1
            length -= 1
        file.seek(max(length - 2, 0), os.SEEK_CUR)
    file.seek(position)
    return scans


def next_marker(file: IO[bytes]) -> int:
    """Past data, to behind the next marker; END if there is none."""
    while chunk := file.read(CHUNK):
        if found := MARKER.search(chunk):
            file.seek(found.end() - len(chunk), os.SEEK_CUR)
            return chunk[found.end() - 1]
        if len(chunk) > 1 and chunk.endswith(b"\xff"):
            file.seek(-1, os.SEEK_CUR)  # a marker may begin here
    return END
