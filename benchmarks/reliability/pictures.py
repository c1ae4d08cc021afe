"""A corpus of small pictures in every format, and the mutations that are made of them."""

from __future__ import annotations

import contextlib
import io
import random
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

SIZES = ((64, 48), (33, 17))


def corpus() -> dict[str, bytes]:
    """Whole files by name, about 100."""
    return dict(_files())


def _files() -> Iterator[tuple[str, bytes]]:
    noise = np.random.default_rng(0)
    for width, height in SIZES:
        levels = noise.integers(0, 256, (height, width, 4), np.uint8)
        levels[: height // 2] //= 64  # half of it smooth
        rgba = Image.fromarray(levels)
        modes = {mode: rgba.convert(mode) for mode in ("1", "L", "LA", "RGB", "RGBA", "CMYK")}
        modes["P"] = modes["RGB"].quantize(64)
        modes["I;16"] = Image.fromarray(levels[:, :, 0].astype(np.uint16) * 257)
        for kind, mode, options in _VARIANTS:
            file = io.BytesIO()
            with contextlib.suppress(OSError, KeyError, ValueError, ImportError):  # not this Pillow
                modes[mode].save(file, kind, **_with_frames(options, modes[mode]))
                yield f"{kind} {mode} {options} {width}", file.getvalue()
        yield from _heic(modes, width)


def _with_frames(options: dict[str, object], image: Image.Image) -> dict[str, object]:
    if not options.get("save_all"):
        return options
    return {**options, "append_images": [image.transpose(Image.Transpose.ROTATE_180)] * 3}


def _heic(modes: dict[str, Image.Image], width: int) -> Iterator[tuple[str, bytes]]:
    with contextlib.suppress(ImportError):
        import pillow_heif

        for mode in ("L", "RGB", "RGBA"):
            file = io.BytesIO()
            pillow_heif.from_pillow(modes[mode]).save(file, quality=60)
            yield f"HEIC {mode} {width}", file.getvalue()


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    return exif.tobytes()


_VARIANTS: list[tuple[str, str, dict[str, object]]] = [
    *(("JPEG", m, {"progressive": p}) for m in ("L", "RGB", "CMYK") for p in (False, True)),
    ("JPEG", "RGB", {"exif": _exif(), "comment": b"a comment", "icc_profile": bytes(200)}),
    ("JPEG", "RGB", {"subsampling": "4:4:4", "restart_marker_rows": 1}),
    ("MPO", "RGB", {"save_all": True}),
    *(("PNG", m, {}) for m in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    ("PNG", "P", {"transparency": 3}),
    ("PNG", "RGB", {"exif": _exif(), "icc_profile": bytes(200), "dpi": (72, 72)}),
    ("PNG", "RGBA", {"save_all": True}),
    *(("GIF", m, {}) for m in ("1", "L", "P")),
    ("GIF", "P", {"save_all": True, "transparency": 3, "comment": b"a comment"}),
    *(("WEBP", m, {"lossless": lossless}) for m in ("RGB", "RGBA") for lossless in (False, True)),
    ("WEBP", "RGBA", {"save_all": True, "exif": _exif()}),
    *(("BMP", m, {}) for m in ("1", "L", "P", "RGB", "RGBA")),
    *(("PPM", m, {}) for m in ("1", "L", "RGB", "I;16")),
    *(("TIFF", m, {}) for m in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")),
    *(
        ("TIFF", "RGB", {"compression": name})
        for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    ),
    *(("TIFF", "1", {"compression": name}) for name in ("group3", "group4")),
    ("TIFF", "RGB", {"save_all": True, "big_tiff": True, "exif": _exif()}),
    *(("JPEG2000", m, {}) for m in ("L", "RGB", "RGBA")),
    ("JPEG2000", "RGB", {"tile_size": (16, 16), "no_jp2": True}),
    ("AVIF", "RGB", {"speed": 10}),
    ("AVIF", "RGBA", {"speed": 10, "exif": _exif()}),
]


def flip_bits(data: bytearray, rng: random.Random, _: bytes) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def flip_early_bits(data: bytearray, rng: random.Random, _: bytes) -> bytearray:
    for _ in range(rng.choice((1, 2, 4))):
        data[rng.randrange(min(len(data), 200))] ^= 1 << rng.randrange(8)
    return data


def insert(data: bytearray, rng: random.Random, _: bytes) -> bytearray:
    at = rng.randrange(len(data))
    data[at:at] = rng.choice((rng.randbytes(rng.randint(1, 64)), bytes(300), b"\xff" * 300))
    return data


def delete(data: bytearray, rng: random.Random, _: bytes) -> bytearray:
    at = rng.randrange(len(data))
    del data[at : at + rng.randint(1, 64)]
    return data


def truncate(data: bytearray, rng: random.Random, _: bytes) -> bytearray:
    return data[: rng.randrange(len(data))]


def set_number(data: bytearray, rng: random.Random, _: bytes) -> bytearray:
    """A length, an offset or a dimension that is very large, or next to its limits."""
    width = rng.choice((1, 2, 4))
    number = rng.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 30_000, 0x7FFFFFFF, 0xFFFFFFFF))
    at = rng.randrange(min(len(data), rng.choice((40, 400, 1 << 20))))
    order = rng.choice(("big", "little"))
    data[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]
    return data


def duplicate(data: bytearray, rng: random.Random, _: bytes) -> bytearray:
    at, length = rng.randrange(len(data)), rng.randint(4, 400)
    data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
    return data


def splice(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def overwrite(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    at, start, length = rng.randrange(len(data)), rng.randrange(len(other)), rng.randint(4, 200)
    data[at : at + length] = other[start : start + length]
    return data


MUTATIONS: tuple[Callable[[bytearray, random.Random, bytes], bytearray], ...] = (
    flip_bits,
    flip_early_bits,
    insert,
    delete,
    truncate,
    set_number,
    set_number,
    duplicate,
    splice,
    overwrite,
)


def mend_checksums(data: bytes) -> bytes:
    """Of a PNG, so that a mutation gets past them."""
    found, at = bytearray(data), 8
    while at + 12 <= len(found):
        end = at + 8 + int.from_bytes(found[at : at + 4], "big")
        if end + 4 > len(found):
            break
        found[end : end + 4] = zlib.crc32(found[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(found)


def mutated(files: dict[str, bytes], seed: int) -> tuple[str, bytes]:
    """What was done to which file, and the result; the same for the same seed."""
    rng = random.Random(seed)
    name = rng.choice(sorted(files))
    alike = [other for other in files if other.split()[0] == name.split()[0]]
    data, done = bytearray(files[name]), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutation = rng.choice(MUTATIONS)
        data = mutation(data, rng, files[rng.choice(alike)]) or bytearray(b"\0")
        done.append(mutation.__name__)
    if name.startswith("PNG") and rng.random() < 0.7:
        done.append("checksums mended")
        data = bytearray(mend_checksums(bytes(data)))
    return f"{name[:60]}: {', '.join(done)}", bytes(data)
