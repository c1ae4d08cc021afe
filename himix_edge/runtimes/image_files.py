"""Image files, decoded by Pillow, and no larger than they have to be."""

from __future__ import annotations

import contextlib
import importlib
import os
import struct
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, cast

import PIL
from PIL import Image

from himix_edge.errors import HimixError, ImageError
from himix_edge.runtimes.image_kinds import HEAD, brand_of, other_kind
from himix_edge.runtimes.jpeg_scans import buffered_scans

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile
    from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
    from PIL.JpegImagePlugin import JpegImageFile

# In memory, after reduced decoding. "50 megapixels" are up to 8192 x 6144 = 50.3 million in phones
# and 8256 x 6192 = 51.1 in cameras; and half as wide and high, "200" are 8192 x 6144 again.
MAX_PIXELS = 52_000_000
MAX_REDUCTION = 4  # of width and height: of JPEG and JPEG 2000, which can be decoded smaller
# Of a JPEG whose coefficients are all in memory (see `jpeg_scans.py`), for each of MAX_PIXELS:
# 624 MB at 2 bytes each, which are 208 megapixels with colours at half resolution, 104 with all.
MAX_COEFFICIENTS = 6
MAX_SCANS = 100  # of a JPEG; each is one more pass over the picture. Encoders write about ten

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


def decode(file: IO[bytes], name: str) -> tuple[Image.Image, tuple[int, int]]:
    """A file's first picture, and the width and height that it has in the file.

    Pictures of up to MAX_PIXELS come in full. A larger JPEG or JPEG 2000 comes at the largest half
    or quarter that fits; its shorter edge then still has 390 pixels or more. Pillow's own limit,
    which is its user's, is not asked.

    Raises:
        ImageError: in an unknown format, in one that lacks its decoder, empty, or too large by what
            its header says.
    """
    head = file.read(HEAD)
    if not head:
        raise ImageError(
            f"{name} can't be read", found="an empty file", fix="get a whole copy of the file"
        )
    file.seek(0)
    image = _opened(file, head, name)
    size = image.size
    check_size(name, *size, _largest(image, file, name))
    if (step := _step(size)) > 1:
        _reduce(image, step)
    try:
        image.load()
    except Exception as error:
        if step > 1 and image.format == "JPEG2000":  # it may hold no smaller resolution
            raise too_large(name, *size) from error
        raise
    check_size(name, *image.size)  # some formats tell the truth only now
    return image, size


def _opened(file: IO[bytes], head: bytes, name: str) -> ImageFile:
    """As `Image.open` does, but for its limit, which could be lifted for all threads only."""
    brand = brand_of(head)
    if brand == "AVIF":
        return _opened_avif(file, head, name)
    if brand == "HEIC":
        return _opened_heic(file, name)
    for kind, module in PLUGINS.items():
        importlib.import_module(f"PIL.{module}")
        factory, accept = Image.OPEN[kind]
        accepted = accept(head) if accept else True
        if isinstance(accepted, str):
            raise _undecodable(name, kind, accepted)
        if accepted:
            return _made(factory, file, kind, name)
    kind, fix = other_kind(head) or ("something else", "convert it to PNG")
    raise ImageError(
        f"{name} can't be read", expected=f"one of {', '.join(FORMATS)}", found=kind, fix=fix
    )


def _opened_avif(file: IO[bytes], head: bytes, name: str) -> ImageFile:
    try:
        importlib.import_module("PIL.AvifImagePlugin")
    except ImportError as error:
        raise _undecodable(name, "AVIF", f"Pillow {PIL.__version__}", "Pillow 11.3") from error
    factory, accept = Image.OPEN["AVIF"]
    accepted = accept(head) if accept else True
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


def _largest(image: ImageFile, file: IO[bytes], name: str) -> int:
    """How many pixels a picture in this file may have."""
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
            return int(MAX_PIXELS * MAX_COEFFICIENTS / _coefficients(cast("JpegImageFile", image)))
        return MAX_PIXELS * MAX_REDUCTION**2
    return MAX_PIXELS * (MAX_REDUCTION**2 if image.format == "JPEG2000" else 1)


def _coefficients(image: JpegImageFile) -> float:
    """For each pixel: 1 in grey, 1.5 to 3 in colour, by what its components are sampled at."""
    samples = [(across, down) for _, across, down, _ in image.layer]
    full = max(across for across, _ in samples) * max(down for _, down in samples)
    return sum(across * down for across, down in samples) / full


def _step(size: tuple[int, int]) -> int:
    """1, or what to divide width and height by, so that no more than MAX_PIXELS are left."""
    step = 1
    while -(-size[0] // step) * -(-size[1] // step) > MAX_PIXELS:
        step *= 2
    return step


def _reduce(image: ImageFile, step: int) -> None:
    if image.format == "JPEG2000":
        cast("Jpeg2KImageFile", image).reduce = step.bit_length() - 1
    else:
        width, height = image.size
        image.draft(None, (max(width // step, 1), max(height // step, 1)))


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
