"""Image files, decoded by Pillow, and no larger than they have to be.

A decoder gets the parts of a file that its picture needs, and only if these take no more than
BUDGET of memory and a few seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import struct
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, NamedTuple, cast

import PIL
from PIL import Image

from himix_edge.errors import HimixError, ImageError
from himix_edge.runtimes.image_checks import SLOW_PIXELS, is_slow
from himix_edge.runtimes.image_kinds import HEAD, brand_of, other_kind
from himix_edge.runtimes.jpeg_scans import buffered_scans
from himix_edge.runtimes.orientation import orientation_of
from himix_edge.runtimes.picture_parts import needed_parts
from himix_edge.runtimes.spliced import spliced
from himix_edge.runtimes.tiff_parts import BITS_PER_SAMPLE, COMPRESSION, UNCOMPRESSED

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile
    from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.TiffImagePlugin import TiffImageFile

# In memory, after reduced decoding. "50 megapixels" are up to 8192 x 6144 = 50.3 million in phones
# and 8256 x 6192 = 51.1 in cameras; and half as wide and high, "200" are 8192 x 6144 again.
MAX_PIXELS = 52_000_000
MAX_EDGE = 1_000_000  # pixels in a row or column; each row takes some memory of its own
MAX_REDUCTION = 4  # of width and height: of JPEG and JPEG 2000, which can be decoded smaller
# Bytes of memory for decoding a picture and making it RGB, beside the file itself.
BUDGET = 560_000_000
# What a pixel takes of it: 4 as it is decoded, 4 as RGB, and what a decoder holds besides.
COSTS = {"WEBP": 19, "JPEG2000": 25, "AVIF": 24, "HEIC": 20}
COST = 8
# Of a JPEG whose coefficients are all in memory (see `jpeg_scans.py`), for each of MAX_PIXELS:
# 312 MB at 2 bytes each, which are 104 megapixels with colours at half resolution, 52 with all.
MAX_COEFFICIENTS = 3
MAX_SCANS = 100  # of a JPEG; each is one more pass over the picture. Encoders write about ten
MAX_SCANNED = 2_000_000_000  # pixels of all scans: 40 of a picture of 50 megapixels
HELD = ("WEBP", "AVIF", "HEIC")  # whose files are read as a whole, and copied
MAX_HELD = 100_000_000  # bytes of such a file

# What Pillow decodes by itself; EPS, for one, would start another program. The first that accepts a
# file's head is its format.
PLUGINS = {
    "PNG": "PngImagePlugin",
    "JPEG": "JpegImagePlugin",
    "WEBP": "WebPImagePlugin",
    "GIF": "GifImagePlugin",
    "BMP": "BmpImagePlugin",
    "TIFF": "TiffImagePlugin",
    "PPM": "PpmImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
}
FORMATS = (*PLUGINS, "AVIF", "HEIC")
EXTRA = "pip install 'himix-edge[heif]'"


class Decoded(NamedTuple):
    """A file's first picture.

    Attributes:
        size: width and height that it has in the file.
        orientation: as EXIF numbers them; 1 is upright.
    """

    image: Image.Image
    size: tuple[int, int]
    orientation: int = 1


def decode(file: IO[bytes], name: str) -> Decoded:
    """A file's first picture.

    Pictures of up to MAX_PIXELS come in full. A larger JPEG or JPEG 2000 comes at the largest half
    or quarter that fits; its shorter edge then still has 390 pixels or more. Pillow's own limit,
    which is its user's, is not asked.

    Raises:
        ImageError: in an unknown format, in one that lacks its decoder, empty, or too large by what
            its header says, or slow.
    """
    head = file.read(HEAD)
    if not head:
        raise ImageError(
            f"{name} can't be read", found="an empty file", fix="get a whole copy of the file"
        )
    kind = _kind_of(head, name)
    needed = needed_parts(file, kind, name)
    length = file.seek(0, os.SEEK_END)
    if kind in HELD and length > MAX_HELD:
        raise ImageError(
            f"{name} is too large",
            expected=f"at most {MAX_HELD // 10**6} MB of {kind}",
            found=f"{length // 10**6}",
            fix="save it smaller, or as JPEG",
        )
    slow = is_slow(file, kind, name)
    file.seek(0)
    source = spliced(file, needed.parts) if needed else file
    image = _opened(source, kind, name)
    size = image.size
    if image.mode == "F":
        raise unknown_depth("floating point numbers")
    most = min(MAX_PIXELS, (BUDGET - _held(image, kind, length)) // _cost(image))
    check_size(name, *size, SLOW_PIXELS if slow else _largest(image, source, name, most))
    _check_edges(name, size)
    if (step := _step(size, most)) > 1:
        _reduce(image, step)
    exif, xmp = (needed.exif, needed.xmp) if needed else (_info(image, "exif"), _info(image, "xmp"))
    try:
        image.load()
    except Exception as error:
        if step > 1 and kind == "JPEG2000":  # it may hold no smaller resolution
            raise too_large(name, *size, most) from error
        raise
    check_size(name, *image.size)  # some formats tell the truth only now
    return Decoded(image, size, orientation_of(exif, xmp))


def _info(image: Image.Image, key: str) -> bytes:
    found = image.info.get(key)
    return found if isinstance(found, bytes) else b""


def _kind_of(head: bytes, name: str) -> str:
    brand = brand_of(head)
    if brand is not None:
        return brand
    for kind, module in PLUGINS.items():
        importlib.import_module(f"PIL.{module}")
        accept = Image.OPEN[kind][1]
        accepted = accept(head) if accept else True
        if isinstance(accepted, str):
            raise _undecodable(name, kind, accepted)
        if accepted:
            return kind
    other, fix = other_kind(head) or ("something else", "convert it to PNG")
    raise ImageError(
        f"{name} can't be read", expected=f"one of {', '.join(FORMATS)}", found=other, fix=fix
    )


def _opened(file: IO[bytes], kind: str, name: str) -> ImageFile:
    """As `Image.open` does, but for its limit, which could be lifted for all threads only."""
    if kind == "AVIF":
        return _opened_avif(file, name)
    if kind == "HEIC":
        return _opened_heic(file, name)
    return _made(Image.OPEN[kind][0], file, kind, name)


def _opened_avif(file: IO[bytes], name: str) -> ImageFile:
    try:
        importlib.import_module("PIL.AvifImagePlugin")
    except ImportError as error:
        raise _undecodable(name, "AVIF", f"Pillow {PIL.__version__}", "Pillow 11.3") from error
    factory, accept = Image.OPEN["AVIF"]
    accepted = accept(file.read(HEAD)) if accept else True
    file.seek(0)
    if isinstance(accepted, str):
        raise _undecodable(name, "AVIF", f"Pillow {PIL.__version__} built without it")
    return _made(factory, file, "AVIF", name)


def _opened_heic(file: IO[bytes], name: str) -> ImageFile:
    try:  # its class alone: the app's Pillow learns no new format
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise _undecodable(name, "HEIC", "none", "pillow-heif") from error
    return _made(HeifImageFile, file, "HEIC", name)


def _made(factory: object, file: IO[bytes], kind: str, name: str) -> ImageFile:
    try:
        return factory(file, "")  # type: ignore[operator, no-any-return]
    except (SyntaxError, IndexError, TypeError, KeyError, struct.error) as error:
        raise ImageError(
            f"{name} can't be read",
            found=f"a damaged {kind} file ({first_line(error)})",
            fix="get a whole copy of the file",
        ) from error


def _undecodable(name: str, kind: str, found: str, needs: str = "a decoder") -> ImageError:
    return ImageError(
        f"{name} can't be read: it is in the format {kind}",
        expected=f"{needs} to decode it",
        found=found,
        fix=f"{EXTRA}, or convert it to PNG",
    )


def _cost(image: ImageFile) -> int:
    """Bytes that a pixel takes at most: in decoding, as decoded, and as RGB."""
    if image.format == "TIFF":  # a strip may be the whole picture, at its own depth
        bits = cast("TiffImageFile", image).tag_v2.get(BITS_PER_SAMPLE, (8,))
        return max(COST, COST // 2 + -(-sum(bits) // 8))
    return COSTS.get(str(image.format), COSTS["HEIC"] if image.format == "HEIF" else COST)


def _held(image: ImageFile, kind: str, length: int) -> int:
    """Bytes of the file that stay in memory while it is decoded."""
    if kind == "TIFF":  # libtiff's formats come as a whole
        raw = cast("TiffImageFile", image).tag_v2.get(COMPRESSION, UNCOMPRESSED) == UNCOMPRESSED
        return 0 if raw else min(length, BUDGET)
    return 2 * length if kind in HELD else 0


def _largest(image: ImageFile, file: IO[bytes], name: str, most: int) -> int:
    """How many pixels a picture in this file may have, of which `most` are decoded."""
    if image.format in ("JPEG", "MPO"):
        scans = buffered_scans(file, MAX_SCANS)
        if scans > MAX_SCANS:
            raise ImageError(
                f"{name} takes too long to decode",
                expected=f"a JPEG of at most {MAX_SCANS} scans",
                found="more",
                fix="save it again",
            )
        if scans:
            held = MAX_PIXELS * MAX_COEFFICIENTS / _coefficients(cast("JpegImageFile", image))
            return min(int(held), MAX_SCANNED // scans)
        return most * MAX_REDUCTION**2
    return most * (MAX_REDUCTION**2 if image.format == "JPEG2000" else 1)


def _coefficients(image: JpegImageFile) -> float:
    """For each pixel: 1 in grey, 1.5 to 3 in colour, by what its components are sampled at."""
    samples = [(across, down) for _, across, down, _ in image.layer]
    full = max(across for across, _ in samples) * max(down for _, down in samples)
    return sum(across * down for across, down in samples) / full


def _step(size: tuple[int, int], most: int) -> int:
    """1, or what to divide width and height by, so that no more than `most` pixels are left."""
    step = 1
    while -(-size[0] // step) * -(-size[1] // step) > most:
        step *= 2
    return step


def _reduce(image: ImageFile, step: int) -> None:
    if image.format == "JPEG2000":
        cast("Jpeg2KImageFile", image).reduce = step.bit_length() - 1
    else:
        width, height = image.size
        image.draft(None, (max(width // step, 1), max(height // step, 1)))


def _check_edges(name: str, size: tuple[int, int]) -> None:
    if max(size) > MAX_EDGE:
        raise ImageError(
            f"{name} is too large",
            expected=f"at most {MAX_EDGE:,} pixels in width and height",
            found=f"{size[0]} x {size[1]}",
            fix="cut out the part that matters",
        )


def unknown_depth(found: str) -> ImageError:
    """Of a picture whose numbers have no known largest value."""
    return ImageError(
        "the image's depth is unknown",
        expected="8 or 16 bits a channel",
        found=found,
        fix="save it as an 8-bit PNG",
    )


def check_size(name: str, width: int, height: int, most: int | None = None) -> None:
    """Raises an ImageError for no pixels, or for more than `most`, by default MAX_PIXELS."""
    if width < 1 or height < 1:
        raise ImageError(
            f"{name} is empty", expected="at least one pixel", found=f"{width} x {height}"
        )
    if width * height > (MAX_PIXELS if most is None else most):
        raise too_large(name, width, height, most)


def too_large(name: str, width: int, height: int, most: int | None = None) -> ImageError:
    return ImageError(
        f"{name} is too large",
        expected=f"at most {(most or MAX_PIXELS) / 1e6:.0f} megapixels",
        found=f"{width} x {height}",
        fix="scale it down, or cut out the part that matters",
    )


@contextlib.contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Whatever reading and decoding may raise, as an ImageError."""
    try:
        yield
    except HimixError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(  # a few decoders ask Pillow's own limit
            f"{name} is too large",
            expected=f"at most {MAX_PIXELS / 1e6:.0f} megapixels",
            found=first_line(error),
            fix="scale it down, or cut out the part that matters",
        ) from error
    except Exception as error:  # of hostile or damaged bytes, decoders raise all kinds
        known = isinstance(error, OSError) and error.errno is not None
        reason = os.strerror(error.errno) if known else first_line(error)  # type: ignore[attr-defined]
        raise ImageError(
            f"{name} can't be read",
            found=reason,
            fix="check the path" if known else "get a whole copy of the file",
        ) from error


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
