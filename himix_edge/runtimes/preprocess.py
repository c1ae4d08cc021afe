"""From an image of any kind to `pixel_values`, in Pillow and numpy.

References: transformers' `CLIPImageProcessorPil` for resize="crop", its `SiglipImageProcessorPil`
for resize="squash", and `expand2square` of LLaVA-1.5's repository for resize="pad".

What an image may be given as is in `image_sources.py`, how files are decoded in `image_files.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from himix_edge.config import PreprocessConfig, ResizeMode
from himix_edge.errors import ConfigError, closest
from himix_edge.runtimes.image_files import FORMATS, MAX_PIXELS, image_errors, unknown_depth
from himix_edge.runtimes.image_sources import Channels, ImageSource, Size, name_of, open_image
from himix_edge.runtimes.orientation import upright
from himix_edge.runtimes.shape_notices import shape_notices

__all__ = ["FORMATS", "MAX_PIXELS", "ImageSource", "load_image", "pixel_values", "prepare"]

MAX_BAND = 1 << 22  # pixels that are padded at a time
MAX_SIDE = 1 << 16  # pixels of an edge that is resized as it is: all of a JPEG
MAX_PADDED = 1 << 28  # ... in all: of a picture of larger square, a smaller copy is padded


@dataclass(frozen=True)
class Prepared:
    """An image as the model takes it, and what should be said of it.

    Attributes:
        pixels: [1, 3, H, W].
        notices: why the model may see too little of it; empty for most images.
    """

    pixels: NDArray[np.float32]
    notices: tuple[str, ...]


def prepare(
    source: ImageSource,
    config: PreprocessConfig,
    *,
    channels: Channels = "RGB",
    resize: str | None = None,
) -> Prepared:
    """An image of any kind, ready for the model.

    Args:
        channels: the order of an array's channels; see `load_image`.
        resize: "squash", "crop" or "pad" in place of the config's own.

    Raises:
        ConfigError: unknown channels or another `resize`.
        ImageError: see `load_image`.
    """
    if resize is not None:
        config = dataclasses.replace(config, resize=resize_mode(resize))
    image, full = _upright(source, channels)
    notices = shape_notices(*full, config.resize, config.image_size)
    return Prepared(pixel_values(image, config, full), notices)


def resize_mode(name: str) -> ResizeMode:
    """`name`, if it is a way to resize; a ConfigError if not."""
    modes = get_args(ResizeMode)
    if name not in modes:
        raise ConfigError(
            "this way to resize is unknown",
            expected=", ".join(modes),
            found=repr(name),
            fix=closest(str(name), modes),
        )
    return cast(ResizeMode, name)


def load_image(source: ImageSource, channels: Channels = "RGB") -> Image.Image:
    """Any image as upright 8-bit RGB, transparency on white; of an animation, the first frame.

    A JPEG or JPEG 2000 of more than MAX_PIXELS is decoded at half or a quarter of its size.

    Args:
        source: a path; a file's bytes, or what has bytes in it (bytearray, memoryview, mmap); a
            binary file object, which is read from its position to its end and stays open; a Pillow
            image; a uint8 array or tensor [H, W, 3], [H, W, 4] (the last is alpha), [H, W, 1] or
            [H, W].
        channels: "BGR" for an array whose channels are blue, green, red and perhaps alpha, as
            OpenCV's are.

    Raises:
        ImageError: no such file, a URL, not an image, damaged, empty, of unknown depth, in a format
            whose decoder is not installed, or of too many pixels (seen in the header, before
            anything is decoded).
        ConfigError: unknown channels, or BGR for what is no array.
    """
    return _upright(source, channels)[0]


def _upright(source: ImageSource, channels: Channels) -> tuple[Image.Image, Size]:
    """The image, and the size that it would have without reduced decoding."""
    with image_errors(name_of(source)):
        stored, (width, height), orientation = open_image(source, channels)
        lay = stored.width > stored.height
        if stored is source:
            image = ImageOps.exif_transpose(stored)  # a copy
        else:
            image = upright(stored, orientation)
            del stored  # one of the two is enough
        turned = lay != (image.width > image.height)
        return _rgb(image), (height, width) if turned else (width, height)


def pixel_values(
    image: Image.Image, config: PreprocessConfig, full: Size | None = None
) -> NDArray[np.float32]:
    """An RGB image -> [1, 3, H, W], normalized per channel.

    Args:
        full: width and height before reduced decoding, from which a crop is reckoned.
    """
    size, resample = config.image_size, Image.Resampling[config.resample.upper()]
    if config.resize == "squash":
        square = np.asarray(_resized(image, (size, size), resample))  # [H, W, 3]
    elif config.resize == "pad":
        margin = tuple(int(level * 255) for level in config.image_mean)
        square = np.asarray(_padded(image, size, resample, margin))
    else:
        square = _cropped(image, size, resample, full or image.size)

    levels = (square * (1 / 255)).astype(np.float32)
    mean, std = (np.array(c, np.float32) for c in (config.image_mean, config.image_std))
    return np.ascontiguousarray(((levels - mean) / std).transpose(2, 0, 1)[None])


def _cropped(
    image: Image.Image, size: int, resample: Image.Resampling, full: Size
) -> NDArray[np.uint8]:
    """The shorter edge becomes `size`, then the middle is cut out."""
    width, height = (int(size * edge / min(full)) for edge in full)
    shorter, longer = sorted(image.size)
    if width * height > MAX_PIXELS and longer > 8 * shorter:  # a hair; five squares are enough
        start = (longer - 5 * shorter) // 2
        if image.width > image.height:
            middle = _part(image, start, 0, longer - 2 * start, shorter)
        else:
            middle = _part(image, 0, start, shorter, longer - 2 * start)
        return _cropped(middle, size, resample, middle.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = _resized(image, (width, height), resample)
    return np.asarray(_part(resized, left, top, size, size))


def _padded(
    image: Image.Image, size: int, resample: Image.Resampling, margin: tuple[int, ...]
) -> Image.Image:
    """Centred on a square of its longer edge, then resized, without that square in memory.

    Pillow resizes the width first, row by row, and then the height. So the square's rows can come
    in bands, and those above and below the image need not come at all.
    """
    side = max(image.size)
    if side**2 > MAX_PADDED:
        ratio = MAX_PADDED**0.5 / side
        width, height = (max(int(edge * ratio), 1) for edge in image.size)
        image = _resized(image, (width, height), resample)
        side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (size, side), margin)  # [side, size, 3]
    rows = max(MAX_BAND // side, 1)
    for y in range(0, image.height, rows):
        band = Image.new("RGB", (side, min(rows, image.height - y)), margin)
        band.paste(image, (left, -y))
        narrow.paste(band.resize((size, band.height), resample), (0, top + y))
    return _resized(narrow, (size, size), resample)


def _resized(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """As `Image.resize`, in bounded memory: a very long edge is averaged down to MAX_SIDE first."""
    across, down = (-(-edge // MAX_SIDE) for edge in image.size)
    if max(across, down) > 1:
        image = image.reduce((across, down))
    return image.resize(size, resample)


def _rgb(image: Image.Image) -> Image.Image:
    """In bands: conversions take several times the memory of what they convert."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise unknown_depth("floating point numbers")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        if image.mode == "RGB":
            return image
    found = Image.new("RGB", image.size)
    rows = max(MAX_BAND // image.width, 1)
    for y in range(0, image.height, rows):
        band = _part(image, 0, y, image.width, min(rows, image.height - y))
        found.paste(_band_as_rgb(band), (0, y))
    return found


def _part(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    """As `Image.crop`, which asks Pillow's own limit, its user's."""
    part = Image.new(image.mode, (width, height))
    part.paste(image, (-left, -top))
    part.info = image.info
    return part


def _band_as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey_from_16_bits(np.asarray(image)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_from_16_bits(values: NDArray[np.integer]) -> Image.Image:
    """0..65535 -> 0..255; Pillow's own conversion would clip at 255."""
    if values.min() < 0 or values.max() > 65535:
        raise unknown_depth(f"values from {values.min()} to {values.max()}")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
