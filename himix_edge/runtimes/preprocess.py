"""From an image of any kind to `pixel_values`, in Pillow and numpy.

Reference: transformers' `CLIPImageProcessorPil` for resize="crop", and its
`SiglipImageProcessorPil` for resize="squash".
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from himix_edge.config import PreprocessConfig
from himix_edge.errors import HimixError, ImageError

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]"

MAX_PIXELS = 50_000_000
# Formats that Pillow decodes by itself; EPS, for one, would start another program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")


def load_image(source: ImageSource) -> Image.Image:
    """Any image as upright 8-bit RGB, transparency on white; of an animation, the first frame.

    Args:
        source: a path, a file's bytes, a Pillow image, or uint8 [H, W, 3], [H, W, 4] (the last is
            alpha), [H, W, 1] or [H, W].

    Raises:
        ImageError: no such file, not an image, damaged, empty, of unknown depth, or of more than
            MAX_PIXELS (seen in the header, before anything is decoded).
    """
    name = "the image" if not isinstance(source, (str, os.PathLike)) else f"image {source}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_image_errors(name))
        if isinstance(source, np.ndarray):
            image = _image_from_array(source)
        elif isinstance(source, Image.Image):
            image = source
        elif isinstance(source, bytes):
            image = _opened(io.BytesIO(source))
        elif isinstance(source, (str, os.PathLike)):
            image = _opened(stack.enter_context(Path(source).open("rb")))
        else:
            raise ImageError(
                "this is no image",
                expected="a path, bytes, a Pillow image or a uint8 array",
                found=type(source).__name__,
            )
        _check_size(name, *image.size)
        image = ImageOps.exif_transpose(image)
        return _rgb(image)


def pixel_values(image: Image.Image, config: PreprocessConfig) -> NDArray[np.float32]:
    """An RGB image -> [1, 3, H, W], normalized per channel.

    Raises:
        ImageError: so thin that its shorter edge can't be resized to the model's size.
    """
    size, resample = config.image_size, Image.Resampling[config.resample.upper()]
    if config.resize == "squash":
        image = image.resize((size, size), resample)
    else:
        shorter = min(image.size)
        width, height = (int(size * edge / shorter) for edge in image.size)
        _check_size(f"a thin image of {_dimensions(*image.size)}, resized,", width, height)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), resample)
        image = image.crop((left, top, left + size, top + size))

    levels = (np.asarray(image) * (1 / 255)).astype(np.float32)  # [H, W, 3]
    mean, std = (np.array(c, np.float32) for c in (config.image_mean, config.image_std))
    return np.ascontiguousarray(((levels - mean) / std).transpose(2, 0, 1)[None])


def _opened(file: IO[bytes]) -> Image.Image:
    if not file.read(1):
        raise EOFError("an empty file")
    file.seek(0)
    return Image.open(file, formats=FORMATS)


def _image_from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    ):
        raise ImageError(
            "this array is no image",
            expected="uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]",
            found=f"{array.dtype} {list(array.shape)}",
            fix="scale it to 0..255 and put the channels last",
        )
    _check_size("the array", array.shape[1], array.shape[0])
    return Image.fromarray(np.ascontiguousarray(array))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey_from_16_bits(np.asarray(image)).convert("RGB")
    if image.mode == "F":
        raise _unknown_depth("floating point numbers")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_from_16_bits(values: NDArray[np.integer]) -> Image.Image:
    """0..65535 -> 0..255; Pillow's own conversion would clip at 255."""
    if values.min() < 0 or values.max() > 65535:
        raise _unknown_depth(f"values from {values.min()} to {values.max()}")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _unknown_depth(found: str) -> ImageError:
    return ImageError(
        "the image's depth is unknown",
        expected="8 or 16 bits a channel",
        found=found,
        fix="save it as an 8-bit PNG",
    )


def _check_size(name: str, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(
            f"{name} is empty", expected="at least one pixel", found=_dimensions(width, height)
        )
    if width * height > MAX_PIXELS:
        raise _too_large(name, _dimensions(width, height))


def _too_large(name: str, found: str) -> ImageError:
    return ImageError(
        f"{name} is too large",
        expected=f"at most {MAX_PIXELS / 1e6:.0f} megapixels",
        found=found,
        fix="scale it down, or cut out the part that matters",
    )


def _dimensions(width: int, height: int) -> str:
    return f"{width} x {height}"


@contextlib.contextmanager
def _image_errors(name: str) -> Iterator[None]:
    """Whatever reading and decoding may raise, as an ImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except HimixError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = Image.MAX_IMAGE_PIXELS or MAX_PIXELS  # Pillow's own, which it checks while opening
        raise _too_large(name, f"more than {limit / 1e6:.0f}") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} can't be read",
            expected=f"one of {', '.join(FORMATS)}",
            found="something else",
            fix="convert it to PNG",
        ) from error
    except Exception as error:  # of hostile or damaged bytes, decoders raise all kinds
        known = isinstance(error, OSError) and error.errno is not None
        reason = os.strerror(error.errno) if known else _first_line(error)  # type: ignore[attr-defined]
        raise ImageError(
            f"{name} can't be read",
            found=reason,
            fix="check the path" if known else "get a whole copy of the file",
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
