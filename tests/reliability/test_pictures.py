"""Pictures that take time or memory out of proportion, and files that are no pictures."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.reliability.mutate_pictures import outcome_of
from benchmarks.reliability.pictures import corpus, mutated
from himix_edge.config import PreprocessConfig
from himix_edge.errors import ImageError
from himix_edge.runtimes import image_sources
from himix_edge.runtimes.preprocess import load_image, prepare
from tests.reliability.table import tried

SIZE = (40, 30)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))


def encoded(kind: str, image: Image.Image = PICTURE, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def same(data: bytes, kind: str, **options: Any) -> None:
    """The picture within is that of the plain file, in little memory."""
    tracemalloc.start()
    try:
        found = np.asarray(load_image(data))
        assert tracemalloc.get_traced_memory()[1] < len(data) + 30e6
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found, np.asarray(load_image(encoded(kind, **options))))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes) -> bytes:
    data = encoded("PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def segment(marker: int, data: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def jpeg_with(extra: bytes) -> bytes:
    data = encoded("JPEG")
    return data[:2] + extra + data[2:]


def exif_of_overlaps(entries: int, size: int) -> bytes:
    """Each entry names the same bytes."""
    body = b"".join(struct.pack("<HHLL", 0x9000 + i, 7, size, 8) for i in range(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + body + bytes(4 + size)


BOMB = zlib.compress(bytes(200_000_000), 9)


@tried(
    "Pictures",
    "PNG files with packed texts and profiles of 200 MB, EXIF data that names the same bytes 4,000 "
    "times, 10,000 chunks",
    "decoded without them",
)
@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"Comment\0\0" + BOMB),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB),
        chunk(b"iCCP", b"profile\0\0" + BOMB),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB),
        chunk(b"eXIf", exif_of_overlaps(4000, 500_000)),
        chunk(b"tEXt", b"Comment\0" + bytes(60_000_000)),
        chunk(b"tEXt", b"a\0b") * 10_000,
        chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)) + chunk(b"fdAT", bytes(99)) * 9999,
    ],
    ids=["zTXt", "iTXt", "iCCP", "raw-profile", "eXIf", "tEXt", "many", "frames"],
)
def test_png_chunks(extra: bytes) -> None:
    same(png_with(extra), "PNG")


@tried(
    "Pictures",
    "JPEG files with 60 MB of comments, with 3,000 profiles, with EXIF data of overlapping entries",
    "decoded without them",
)
@pytest.mark.parametrize(
    "extra",
    [
        segment(0xFE, bytes(65_000)) * 923,
        segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(99)) * 3000,
        segment(0xE1, b"Exif\0\0" + exif_of_overlaps(2000, 30_000)) * 5,
        b"\xff" * 1_000_000,
    ],
    ids=["comments", "profiles", "exif", "fill"],
)
def test_jpeg_segments(extra: bytes) -> None:
    same(jpeg_with(extra), "JPEG")


@tried(
    "Pictures",
    "JPEG, PNG and GIF files of a million tiny parts",
    "refused before they are decoded",
)
@pytest.mark.parametrize(
    "data",
    [
        jpeg_with(segment(0xFE, b"") * 1_000_000),
        png_with(chunk(b"tEXt", b"") * 1_000_000),
        encoded("GIF")[:13] + b"!\xfe\x00" * 1_000_000 + encoded("GIF")[13:],
        encoded("GIF")[:13] + b"!\xfe" + b"\x01a" * 1_000_000 + b"\0" + encoded("GIF")[13:],
    ],
    ids=["jpeg", "png", "gif", "gif-comment"],
)
def test_a_million_parts(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"takes too long|can't be read"):
        load_image(data)


@tried("Pictures", "a GIF with a comment of 20 MB, and one of 3,000 frames", "its first frame")
def test_gif_blocks() -> None:
    data = encoded("GIF")
    table = 13 + (3 << (data[10] & 7) + 1)
    comment = b"!\xfe" + (b"\xff" + bytes(255)) * 80_000 + b"\0"
    same(data[:table] + comment + data[table:], "GIF")
    same(data[:-1] + data[table:-1] * 3000 + b";", "GIF")


def tiff_with(change: Callable[[int, list[bytes], bytes], bytes]) -> bytes:
    """A TIFF whose directory is written anew: from its place, its entries and all before it."""
    data = encoded("TIFF")
    (at,) = struct.unpack("<L", data[4:8])
    (count,) = struct.unpack("<H", data[at : at + 2])
    entries = [data[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(count)]
    return change(len(data), entries, data)


def directory(entries: list[bytes], following: int) -> bytes:
    return struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<L", following)


def moved(data: bytes, place: int) -> bytes:
    return data[:4] + struct.pack("<L", place) + data[8:]


@tried(
    "Pictures",
    "TIFF files of 300,000 directories, of directories in a loop, of 30,000 tags that name the "
    "same megabytes",
    "the first picture, with the tags that it needs",
)
def test_tiff_directories() -> None:
    def chained(end: int, entries: list[bytes], data: bytes) -> bytes:
        first = end + 2 + 12 * len(entries) + 4
        rest = b"".join(struct.pack("<HL", 0, first + 6 * (i + 1)) for i in range(300_000))
        return moved(data, end) + directory(entries, first) + rest

    def looped(end: int, entries: list[bytes], data: bytes) -> bytes:
        return moved(data, end) + directory(entries, end)

    def overlapping(end: int, entries: list[bytes], data: bytes) -> bytes:
        many = [struct.pack("<HHLL", 40_000 + i, 7, 3_000_000, 8) for i in range(20_000)]
        return moved(data, end) + directory([*entries, *many], 0) + bytes(4_000_000)

    def nested(end: int, entries: list[bytes], data: bytes) -> bytes:
        return moved(data, end) + directory([*entries, struct.pack("<HHLL", 34665, 4, 1, end)], 0)

    for change in (chained, looped, overlapping, nested):
        same(tiff_with(change), "TIFF")


@tried("Pictures", "a TIFF tag of 2**30 values, and tiles of 2**30 pixels", "refused")
def test_tiff_sizes() -> None:
    def many(end: int, entries: list[bytes], data: bytes) -> bytes:
        wrong = [struct.pack("<HHLL", 320, 3, 2**30, 8)]
        return moved(data, end) + directory([*wrong, *entries], 0)

    def tiles(end: int, entries: list[bytes], data: bytes) -> bytes:
        wrong = [struct.pack("<HHLL", 322 + i, 4, 1, 2**15) for i in range(2)]
        return moved(data, end) + directory([*entries, *wrong], 0)

    for change in (many, tiles):
        with pytest.raises(ImageError, match="takes too long"):
            load_image(tiff_with(change))


@tried(
    "Pictures",
    "pictures that Pillow decodes in Python (run-length BMP, plain PPM, PPM of other levels), of "
    "more than 2 megapixels",
    "refused by their headers",
)
@pytest.mark.parametrize(
    "data",
    [
        b"P3 2000 2000 255\n" + b"0 " * 99,
        b"P1 # a comment\n2000 2000\n" + b"0 " * 99,
        b"P6 2000 2000 100\n" + bytes(99),
        b"P5\n#" + b"x" * 999 + b"\n2000 2000 7\n" + bytes(99),
        b"BM" + struct.pack("<LLLLLLHHLLLLLL", 99, 0, 1078, 40, 2000, 2000, 1, 8, 1, 99, 0, 0, 0, 0)
        + bytes(1200),
    ],
    ids=["P3", "P1", "P6", "P5", "BMP"],
)  # fmt: skip
def test_slow_decoders(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"at most 2 megapixels, found 2000 x 2000"):
        load_image(data)


def test_small_pictures_of_slow_decoders() -> None:
    assert load_image(b"P3 2 1 255\n1 2 3 4 5 6").tobytes() == bytes([1, 2, 3, 4, 5, 6])
    with pytest.raises(ImageError, match="no width and height"):
        load_image(b"P6\n#" + b"x" * 70_000 + b"\n1 1 255\n123")


@tried(
    "Pictures",
    "JPEG 2000 in code blocks of 16 pixels, in tiny precincts, in 10,000 tiles",
    "refused by its header",
)
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"codeblock_size": (4, 4)}, "code blocks of less than 1,024 pixels"),
        ({"precinct_size": (64, 64), "codeblock_size": (32, 32)}, "precincts of less than 128"),
        ({"tile_size": (4, 4)}, "more than 4,096 tiles"),
    ],
)
def test_jpeg_2000_in_small_parts(options: dict[str, Any], found: str) -> None:
    with pytest.raises(ImageError, match=found):
        load_image(encoded("JPEG2000", Image.new("L", (300, 300)), **options))


@tried("Pictures", "a picture of one row of 52 million pixels", "refused by its header")
@pytest.mark.parametrize("size", [(2_000_000, 1), (1, 2_000_000)])
def test_an_endless_row(size: tuple[int, int]) -> None:
    head = chunk(b"IHDR", struct.pack(">LLLB", *size, 1 << 24, 0))
    data = encoded("PNG")[:8] + head + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="at most 1,000,000 pixels in width and height"):
        load_image(data)
    long = Image.new("L", (min(size[0], 200_000), min(size[1], 200_000)), 200)
    for resize in ("squash", "crop", "pad"):
        assert prepare(long, PreprocessConfig(32), resize=resize).pixels.shape == (1, 3, 32, 32)


@tried(
    "Pictures",
    "a named pipe that nobody writes to, or whose writer falls silent",
    "an error after ten seconds",
)
def test_a_pipe_without_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sources, "PATIENCE", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ImageError, match="nothing came through the pipe"):
        load_image(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pipe, os.O_WRONLY)
    os.close(reader)
    try:
        os.set_blocking(writer, False)
        with pytest.raises(ImageError, match="nothing came through the pipe"):
            load_image(pipe)
    finally:
        os.close(writer)


@tried("Pictures", "devices: /dev/zero, /dev/null, a terminal", "refused, nothing is read")
@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/dev/urandom", "/dev/full"])
def test_devices(path: str) -> None:
    with pytest.raises(ImageError, match="expected a file, found a device"):
        load_image(path)


@tried(
    "Pictures",
    "EPS, PDF, ICO, TGA and other files whose decoders start programs or are many",
    "refused: no such decoder is asked",
)
@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "DDS"])
def test_other_formats_of_pillow(kind: str) -> None:
    with pytest.raises(ImageError, match="expected one of PNG, JPEG"):
        load_image(encoded(kind))


@tried(
    "Pictures",
    "12,000 mutated pictures of eleven formats (a sample of them here)",
    "an array or an ImageError, and nothing else",
)
def test_mutated_pictures() -> None:
    files = corpus()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [outcome_of(mutated(files, seed)[1]) for seed in range(100)]
    assert set(found) == {"array", "ImageError"}
    assert min(found.count("array"), found.count("ImageError")) > 30
