"""Formats by their bytes, reduced decoding, and what is refused by its header."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, UnidentifiedImageError, features

from himix_edge.config import PreprocessConfig
from himix_edge.errors import ImageError
from himix_edge.runtimes import image_files
from himix_edge.runtimes.image_kinds import brand_of
from himix_edge.runtimes.jpeg_scans import buffered_scans
from himix_edge.runtimes.preprocess import load_image, prepare
from tests.tolerances import REDUCED_PIXELS

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")


def waves(width: int, height: int) -> Image.Image:
    """Without noise: smooth in both directions, another wave in each channel."""
    y, x = np.mgrid[0:height, 0:width]
    levels = [np.sin(x / 40), np.sin(y / 60), np.sin((x + y) / 90)]
    return Image.fromarray((127.5 + 120 * np.stack(levels, -1)).round().astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def heic(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, **options)
    return file.getvalue()


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


# HEIC and AVIF


def test_heic_is_what_was_encoded(tmp_path: Path) -> None:
    image = waves(300, 200)
    path = tmp_path / "photo.png"  # its name says nothing
    path.write_bytes(heic(image, quality=-1, chroma=444))
    difference = np.asarray(load_image(path)).astype(int) - np.asarray(image)
    assert np.abs(difference).max() <= 3  # by way of YCbCr


def test_heic_with_alpha_and_in_grey() -> None:
    clear = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
    assert np.asarray(load_image(heic(clear))).min() >= 250
    assert np.asarray(load_image(heic(Image.new("L", (64, 64), 90))))[5, 5].tolist() == [90] * 3


def test_heic_is_turned_once(tmp_path: Path) -> None:
    """As phones write it: the container says how to turn it, and EXIF says so again."""
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (0, 0, 32, 32))
    for orientation in (1, 3, 6, 8):
        image.save(tmp_path / f"{orientation}.png", exif=with_orientation(orientation))
    code = """
import sys, pillow_heif
from PIL import Image
pillow_heif.register_heif_opener()  # saves only so; not in this process
for name in sys.argv[1:]:
    image = Image.open(name)
    image.save(name[:-3] + "heic", quality=-1, chroma=444, exif=image.getexif().tobytes())
"""
    paths = sorted(tmp_path.glob("*.png"))
    subprocess.run([sys.executable, "-c", code, *paths], check=True)
    sizes = set()
    for path in paths:
        expected, found = load_image(path), load_image(path.with_suffix(".heic"))
        assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 3
        sizes.add(found.size)
    assert sizes == {(64, 32), (32, 64)}


@needs_avif
@pytest.mark.parametrize("orientation", [1, 6])
def test_avif(orientation: int) -> None:
    image, exif = waves(300, 200), with_orientation(orientation)
    found = load_image(encoded(image, "AVIF", quality=100, subsampling="4:4:4", exif=exif))
    expected = load_image(encoded(image, "PNG", exif=exif))
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 6


def test_a_format_without_its_decoder_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(Image.new("RGB", (64, 64)))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"the format HEIC.*pip install 'himix-edge\[heif\]'"):
        load_image(data)
    avif = b"\x00\x00\x00\x1cftypavif\x00\x00\x00\x00mif1miafMA1B" + bytes(40)
    monkeypatch.setitem(sys.modules, "PIL.AvifImagePlugin", None)
    with pytest.raises(ImageError, match=r"the format AVIF.*Pillow 11\.3.*himix-edge\[heif\]'"):
        load_image(avif)


@needs_avif
def test_a_pillow_that_was_built_without_avif(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (16, 16)), "AVIF")
    monkeypatch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
    with pytest.raises(ImageError, match=r"the format AVIF.*built without it.*himix-edge\[heif\]"):
        load_image(data)


def test_the_app_s_pillow_learns_nothing_of_heic() -> None:
    data = heic(Image.new("RGB", (64, 64)))
    load_image(data)
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(data))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_a_truncated_heic_or_avif(share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    wholes = [heic(noise)] + ([encoded(noise, "AVIF")] if features.check("avif") else [])
    for whole in wholes:
        with pytest.raises(ImageError, match="Fix"):
            load_image(whole[: max(int(len(whole) * share), 16)])


@pytest.mark.parametrize(
    ("brands", "expected"),
    [
        (b"heic\0\0\0\0mif1heic", "HEIC"),
        (b"mif1\0\0\0\0mif1heic", "HEIC"),
        (b"mif1\0\0\0\0mif1avif", "AVIF"),
        (b"avis\0\0\0\0msf1avif", "AVIF"),
        (b"isom\0\0\0\0isomavc1", None),
        (b"qt  \0\0\0\0qt  ", None),
    ],
)
def test_brands(brands: bytes, expected: str | None) -> None:
    assert brand_of((len(brands) + 8).to_bytes(4, "big") + b"ftyp" + brands) == expected


# what people take for pictures


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF document"),
        (b'<svg xmlns="http://www.w3.org/2000/svg">', "an SVG drawing"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a -->\n<svg width="9">', "an SVG drawing"),
        (b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41", r"a video \(MP4"),
        (b"\x00\x00\x00\x14ftypqt  \x00\x00\x02\x00qt  ", r"a video \(MP4 or QuickTime"),
        (b"\x1a\x45\xdf\xa3\x01\x00\x00\x00", r"a video \(Matroska"),
        (b"RIFF\x00\x00\x10\x00AVI LIST", r"a video \(AVI"),
        (b"\x00\x00\x00\x18ftypcrx \x00\x00\x00\x01crx isom", "a raw photo"),
        (b"\xff\x0a\xfa\x7f", "a JPEG XL image"),
        (b"<!DOCTYPE html><html><body>404", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"PK\x03\x04\x14\x00", "a ZIP archive"),
        (b"\x00" * 64, "something else"),
        (b"\x00", "something else"),
    ],
)
def test_other_files_are_named(tmp_path: Path, data: bytes, found: str) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    message = rf"image .*picture\.jpg can't be read: expected one of PNG, .*HEIC, found {found}"
    with pytest.raises(ImageError, match=message):
        load_image(path)


@pytest.mark.parametrize("kind", image_files.PLUGINS)
def test_a_header_alone_is_a_damaged_file(kind: str) -> None:
    with pytest.raises(ImageError, match=r"can't be read.*whole copy"):
        load_image(encoded(waves(40, 30), kind)[:20])


# reduced decoding


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"subsampling": "4:4:4", "quality": 95}),
        ("JPEG2000", {}),
    ],
)
@pytest.mark.parametrize("size", [(800, 600), (801, 597), (1203, 402)])
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_a_large_picture_is_decoded_smaller(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    options: dict[str, object],
    size: tuple[int, int],
    resize: str,
) -> None:
    data, config = encoded(waves(*size), kind, **options), PreprocessConfig(32)
    whole = prepare(data, config, resize=resize)
    monkeypatch.setattr(image_files, "MAX_PIXELS", size[0] * size[1] * 2 // 3)
    assert load_image(data).size in (
        ((size[0] + 1) // 2, (size[1] + 1) // 2),
        (size[0] // 2, size[1] // 2),
    )
    reduced = prepare(data, config, resize=resize)
    np.testing.assert_allclose(reduced.pixels, whole.pixels, rtol=0, atol=REDUCED_PIXELS)
    assert reduced.notices == whole.notices  # by the size that the file has


def test_as_much_is_decoded_as_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(waves(800, 400))
    for most, expected in (
        (320_000, (800, 400)),
        (319_999, (400, 200)),
        (80_000, (400, 200)),
        (79_999, (200, 100)),
        (20_000, (200, 100)),
    ):
        monkeypatch.setattr(image_files, "MAX_PIXELS", most)
        assert load_image(data).size == expected
    monkeypatch.setattr(image_files, "MAX_PIXELS", 19_999)
    with pytest.raises(ImageError, match=r"too large.*found 800 x 400"):
        load_image(data)


def test_turned_and_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(waves(800, 200), exif=with_orientation(6))
    monkeypatch.setattr(image_files, "MAX_PIXELS", 40_000)
    assert load_image(data).size == (100, 400)
    [notice] = prepare(data, PreprocessConfig(32)).notices
    assert "this 200 x 800 picture" in notice


def test_a_jpeg_in_memory_as_a_whole_may_be_less_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_PIXELS", 20_001)
    image = waves(800, 400)
    assert load_image(encoded(image)).size == (200, 100)
    with pytest.raises(ImageError, match="too large"):
        load_image(encoded(image, progressive=True))


def test_a_jpeg_2000_without_smaller_resolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(waves(300, 200), "JPEG2000", num_resolutions=1)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 20_000)
    with pytest.raises(ImageError, match=r"too large.*found 300 x 200"):
        load_image(data)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIC"])
def test_other_formats_have_the_limit_itself(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    image = waves(64, 64)
    data = heic(image) if kind == "HEIC" else encoded(image, kind)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 64 * 64)
    assert load_image(data).size == (64, 64)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(ImageError, match=r"too large.*found 64 x 64"):
        load_image(data)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(8192, 6144), (12_000, 9_000), (16_384, 12_288)])
def test_phone_photos(size: tuple[int, int]) -> None:
    """50, 108 and 200 megapixels, as phones have them."""
    data = encoded(Image.new("RGB", size, (200, 100, 50)))
    step = 1 if size[0] < 10_000 else 2
    image = load_image(data)
    assert image.size == (size[0] // step, size[1] // step)
    corner = np.asarray(image.crop((0, 0, 9, 9))).astype(int)
    assert np.abs(corner - (200, 100, 50)).max() <= 2


def claiming(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose frame header claims other dimensions."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: at + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 9 :]


@pytest.mark.parametrize(
    ("progressive", "subsampling", "most"),
    [(False, "4:4:4", 832), (True, "4:2:0", 104), (True, "4:2:2", 78), (True, "4:4:4", 52)],
)
def test_a_memory_bomb_is_refused_by_its_header(
    progressive: bool, subsampling: str, most: int
) -> None:
    small = encoded(waves(16, 16), progressive=progressive, subsampling=subsampling)
    bomb = claiming(small, 65_500, 65_500)
    with pytest.raises(ImageError, match=f"at most {most} megapixels, found 65500 x 65500"):
        load_image(bomb)


# scans


def single_scans(data: bytes) -> int:
    return buffered_scans(io.BytesIO(data), 1000)


def test_scans_are_counted_where_coefficients_are_buffered() -> None:
    assert single_scans(encoded(waves(90, 70))) == 0
    assert single_scans(encoded(waves(90, 70).convert("L"))) == 0
    progressive = encoded(waves(90, 70), progressive=True)
    assert single_scans(progressive) == progressive.count(b"\xff\xda") == 10
    assert single_scans(progressive + progressive * 3) == 10  # what follows the end is another's
    assert single_scans(progressive[:-2]) == 10
    assert single_scans(b"\xff\xd8\xff") == 0


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_markers_across_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("himix_edge.runtimes.jpeg_scans.CHUNK", max(chunk, 2))
    assert single_scans(encoded(waves(90, 70), progressive=True, restart_marker_rows=1)) == 10


def test_a_sequential_jpeg_with_a_scan_for_each_component_is_buffered() -> None:
    """The frame says three components, the first scan one of them."""
    data = encoded(waves(40, 30))
    at = data.index(b"\xff\xda")
    one = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
    assert single_scans(data[:at] + one + b"\x12\xff\x00\x34" + one + b"\x56\xff\xd9") == 2


def test_a_progressive_jpeg_of_many_scans_is_refused_at_once() -> None:
    data = encoded(Image.new("L", (4000, 4000), 128), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match="expected a JPEG of at most 100 scans"):
        load_image(data[:-2] + last * 100 + b"\xff\xd9")
    few = encoded(Image.new("L", (40, 40), 128), progressive=True)
    last = few[few.rindex(b"\xff\xda") : -2]
    assert load_image(few[:-2] + last * 20 + b"\xff\xd9").size == (40, 40)


# the host's own settings


def test_pillow_s_own_limit_and_warnings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # the app's, for its own pictures
    image = waves(64, 48)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "PPM", "JPEG2000"):
        pixels = prepare(encoded(image, kind), PreprocessConfig(32)).pixels  # warnings are errors
        assert pixels.shape == (1, 3, 32, 32)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_threads_leave_the_warning_filters_as_they_were() -> None:
    data = [encoded(waves(24, 24), kind) for kind in ("PNG", "JPEG", "GIF")] + [b"no picture"]
    before = list(warnings.filters)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    seen: list[bool] = []

    def work() -> None:
        for _ in range(50):
            for each in data:
                with contextlib.suppress(ImageError):
                    load_image(each)
            seen.append(warnings.filters == before)

    threads = [threading.Thread(target=work) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(seen) == 200
    assert all(seen)
    assert warnings.filters == before
