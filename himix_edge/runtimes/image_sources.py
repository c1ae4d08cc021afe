"""All that an image may be given as: a path, bytes, a file object, a Pillow image, an array."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import select
import stat
import sys
import urllib.parse
from collections.abc import Iterator
from typing import IO, Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from himix_edge.errors import ConfigError, ImageError, closest
from himix_edge.runtimes.image_files import Decoded, check_size, decode, first_line


class Readable(Protocol):
    """A binary file object."""

    def read(self, size: int = ..., /) -> bytes | None:
        """Up to that many bytes; none at the end."""
        ...


class ArrayLike(Protocol):
    """What numpy can make an array of, such as a tensor."""

    def __array__(self) -> NDArray[Any]:
        """As an array of numpy's."""
        ...


Size: TypeAlias = "tuple[int, int]"  # width, height
Channels = Literal["RGB", "BGR"]
ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | Readable | Image.Image"
    " | NDArray[np.uint8] | ArrayLike"
)

CHANNELS: tuple[Channels, ...] = ("RGB", "BGR")
MAX_BYTES = 160 << 20  # that are read of what has no known size: MAX_PIXELS of RGB fit
PATIENCE = 10.0  # seconds until a named pipe must have something
OPENING = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
URL = re.compile(r"data:|[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # but not C:/


def picture_argument(argument: str) -> str | bytes:
    """What a command line's argument for a picture means: a path, or "-", what stdin has.

    Raises:
        ImageError: nothing is piped in, or too much.
    """
    if argument != "-":
        return argument
    if sys.stdin is None or sys.stdin.isatty():
        raise ImageError(
            "no picture comes in",
            expected="a file's bytes on stdin",
            found="nothing" if sys.stdin is None else "a terminal",
            fix="pipe one in: cat picture.png | himix-edge run - PROMPT",
        )
    return _all_of(sys.stdin.buffer, "the picture on stdin")


def name_of(source: object) -> str:
    """What errors call it."""
    if not isinstance(source, (str, os.PathLike)):
        return "the image"
    name = os.fsdecode(source)
    return f"image {name if len(name) <= 200 else name[:197] + '...'}"


def open_image(source: ImageSource, channels: Channels = "RGB") -> Decoded:
    """The image as it is stored, its pixels in memory.

    Raises:
        ConfigError: unknown channels, or BGR in what says itself what its channels are.
        ImageError: see `load_image`.
    """
    name = name_of(source)
    array = _array_of(source)
    _check_channels(channels, is_array=array is not None)
    if array is not None:
        image = _image_from_array(array, channels)
        return Decoded(image, image.size)
    if isinstance(source, Image.Image):
        check_size(name, *source.size)
        return Decoded(source, source.size)
    if isinstance(source, (str, os.PathLike)):
        with _opened(source, name) as file:
            return decode(file, name)
    if callable(getattr(source, "read", None)):
        return decode(io.BytesIO(_all_of(source, name)), name)
    try:
        data = memoryview(source)  # type: ignore[arg-type]
    except TypeError:
        raise ImageError(
            "this is no image",
            expected="a path, bytes, a binary file object, a Pillow image or a uint8 array",
            found=type(source).__name__,
        ) from None
    return decode(io.BytesIO(source if isinstance(source, bytes) else data.tobytes()), name)


def _check_channels(channels: str, is_array: bool) -> None:
    if channels not in CHANNELS:
        raise ConfigError(
            "the order of channels is unknown",
            expected=" or ".join(CHANNELS),
            found=repr(channels),
            fix=closest(str(channels).upper(), CHANNELS),
        )
    if channels != "RGB" and not is_array:
        raise ConfigError(
            f"channels {channels} means nothing here",
            expected="an array",
            found="an image that says itself what its channels are",
            fix="leave channels out",
        )


def _array_of(source: object) -> NDArray[Any] | None:
    """What is an array, or can be one; not an image that Pillow can take as it is."""
    if isinstance(source, np.ndarray):
        return source
    if isinstance(source, (Image.Image, str, os.PathLike)):
        return None
    if isinstance(source, memoryview) and source.ndim > 1:
        return np.asarray(source)
    if not hasattr(source, "__array__"):
        return None
    try:
        return np.asarray(source)
    except Exception as error:  # a tensor on a GPU, or one with gradients: theirs to choose
        raise ImageError(
            f"this {type(source).__name__} can't be made an array",
            found=first_line(error),
            fix="give a numpy array on the CPU: tensor.detach().cpu().numpy()",
        ) from error


def _image_from_array(array: NDArray[Any], channels: Channels) -> Image.Image:
    shape = list(array.shape)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    ):
        raise ImageError(
            "this array is no image",
            expected="uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]",
            found=f"{array.dtype} {shape}",
            fix=_array_advice(array),
        )
    check_size("the array", array.shape[1], array.shape[0])
    if channels == "BGR" and array.ndim == 3:
        array = array[:, :, [2, 1, 0, 3][: array.shape[2]]]
    return Image.fromarray(np.ascontiguousarray(array))


def _array_advice(array: NDArray[Any]) -> str:
    advice = []
    if array.ndim == 4:
        advice.append("give one image of the batch: array[0]")
    first = array.shape[-3] if array.ndim in (3, 4) else 0
    if first in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        advice.append("put the channels last: array.transpose(1, 2, 0), tensor.permute(1, 2, 0)")
    if array.dtype != np.uint8:
        advice.append("scale it to 0..255 and make it uint8: np.uint8(255 * array)")
    return ", and ".join(advice) or "scale it to 0..255 and put the channels last"


@contextlib.contextmanager
def _opened(source: str | os.PathLike[str], name: str) -> Iterator[IO[bytes]]:
    """A path's file, read into memory if it is a pipe."""
    path = os.fsdecode(source)
    if URL.match(path) and not os.path.lexists(path):
        raise _url(path)
    if not path or "\0" in path:
        raise ImageError(
            "this is no path to an image",
            expected="a file's name",
            found="nothing" if not path else f"a NUL character in {path!r}",
        )
    # Without NONBLOCK, a pipe that nobody writes to would not even open.
    descriptor = os.open(path, OPENING)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            with open(descriptor, "rb", closefd=False) as file:
                yield file
        elif stat.S_ISFIFO(mode):
            yield io.BytesIO(_all_of(_Pipe(descriptor), name))
        else:
            raise ImageError(
                f"{name} can't be read",
                expected="a file",
                found=os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "a device",
                fix="give a picture in it" if stat.S_ISDIR(mode) else "give a picture's file",
            )
    finally:
        os.close(descriptor)


class _Pipe:
    """A named pipe, which may have no writer, or one that falls silent."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def read(self, size: int) -> bytes:
        if not self._poll.poll(1000 * PATIENCE):
            raise TimeoutError(f"nothing came through the pipe for {PATIENCE:.0f} seconds")
        return os.read(self._descriptor, size)


def _url(url: str) -> ImageError:
    scheme = url.split(":", 1)[0].lower()
    fix = "download it, and give the file"
    if scheme == "data":
        fix = "give its bytes: base64.b64decode(url.split(',', 1)[1])"
    elif scheme == "file":
        path = urllib.parse.unquote(url.split(":", 1)[1].lstrip("/"))
        fix = f"give the path: /{path}"
    return ImageError(
        f"{url if len(url) <= 100 else url[:97] + '...'} is a URL",
        expected="a file on this machine",
        found="an address, from which himix-edge fetches nothing",
        fix=fix,
    )


def _all_of(file: Any, name: str) -> bytes:
    """A file object's bytes from its position on; the file stays open."""
    parts = bytearray()
    left = MAX_BYTES
    while left >= 0 and (part := file.read(min(left + 1, 1 << 20))):
        if not isinstance(part, (bytes, bytearray, memoryview)):
            if hasattr(part, "close"):  # a coroutine, which would complain of never being awaited
                part.close()
            raise ImageError(
                f"{name} can't be read from a {type(file).__name__}",
                expected="a binary file object",
                found=f"{type(part).__name__} from read()",
                fix='open the file with mode "rb", or give its bytes',
            )
        parts += part
        left -= len(part)
    if left < 0:
        raise ImageError(
            f"{name} is too large",
            expected=f"at most {MAX_BYTES >> 20} MiB",
            found="more",
            fix="scale it down, or cut out the part that matters",
        )
    return bytes(parts)
