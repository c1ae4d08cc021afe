from __future__ import annotations

import contextlib
import io
import json
import zlib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers import BatchFeature
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from himix_edge.config import PreprocessConfig, VisionFamily
from himix_edge.errors import ImageError
from himix_edge.models.preprocessor import preprocess_from_json
from himix_edge.runtimes import preprocess
from himix_edge.runtimes.preprocess import MAX_PIXELS, load_image, pixel_values
from tests.tolerances import PIXEL_VALUES, REDUCED_PIXELS

SIZES = [
    (112, 112),
    (113, 111),
    (640, 480),
    (481, 641),
    (999, 37),
    (7, 640),
    (1, 300),
    (300, 1),
    (1, 1),
    (2, 3),
    (112, 500),
]
SIGLIP_MEAN = (0.5, 0.5, 0.5)


def noise(width: int, height: int, channels: int = 3) -> NDArray[np.uint8]:
    random = np.random.default_rng(width * 1000 + height)
    return random.integers(0, 256, (height, width, channels), dtype=np.uint8)


def image_bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> object:
    assert image.mode == "RGB"
    return image.getpixel((x, y))


# pixel_values against transformers


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [112, 97])
@pytest.mark.parametrize("dimensions", SIZES)
def test_crop_is_clips(dimensions: tuple[int, int], size: int, resample: str) -> None:
    image = Image.fromarray(noise(*dimensions))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=Image.Resampling[resample.upper()],
    )
    config = PreprocessConfig(size, "crop", resample)  # type: ignore[arg-type]
    same_pixels(pixel_values(image, config), processor(image, return_tensors="np"))


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [112, 97])
@pytest.mark.parametrize("dimensions", SIZES)
def test_squash_is_siglips(dimensions: tuple[int, int], size: int, resample: str) -> None:
    image = Image.fromarray(noise(*dimensions))
    processor = SiglipImageProcessorPil(
        size={"height": size, "width": size}, resample=Image.Resampling[resample.upper()]
    )
    config = PreprocessConfig(size, "squash", resample, SIGLIP_MEAN, SIGLIP_MEAN)  # type: ignore[arg-type]
    same_pixels(pixel_values(image, config), processor(image, return_tensors="np"))


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 700), height=st.integers(1, 700), size=st.integers(1, 130))
def test_crop_is_clips_at_any_size(width: int, height: int, size: int) -> None:
    image = Image.fromarray(noise(width, height))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    reference = processor(image, return_tensors="np")
    same_pixels(pixel_values(image, PreprocessConfig(size)), reference)


# from the files that transformers writes

PROCESSORS: dict[str, Any] = {
    "clip": CLIPImageProcessorPil(
        size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}
    ),
    "clip, bilinear": CLIPImageProcessorPil(
        size={"shortest_edge": 33},
        crop_size={"height": 33, "width": 33},
        resample=Image.Resampling.BILINEAR,
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
    ),
    "clip, squashed": CLIPImageProcessorPil(size={"height": 30, "width": 30}, do_center_crop=False),
    "siglip": SiglipImageProcessorPil(size={"height": 30, "width": 30}),
    "llava, padded": LlavaImageProcessorPil(
        size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}, do_pad=True
    ),
    "siglip 2": SiglipImageProcessorPil(
        size={"height": 32, "width": 32}, resample=Image.Resampling.BILINEAR
    ),
}
IMAGES = {
    "wide": Image.fromarray(noise(64, 48)),
    "tall": Image.fromarray(noise(41, 90)),
    "exact": Image.fromarray(noise(30, 30)),
    "tiny": Image.fromarray(noise(2, 3)),
    "one pixel": Image.fromarray(noise(1, 1)),
    "a hair": Image.fromarray(noise(900, 7)),
    "grey": Image.fromarray(noise(50, 40, 1)[:, :, 0]),
    "one bit": Image.fromarray(noise(50, 40, 1)[:, :, 0] > 127),
    "transparent": Image.fromarray(noise(50, 40, 4)),
    "transparent grey": Image.fromarray(noise(50, 40, 4)).convert("LA"),
}


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_a_folders_processor_gives_these_pixels(
    tmp_path: Path, processor: Any, image: Image.Image
) -> None:
    processor.save_pretrained(tmp_path)
    theirs = type(processor).from_pretrained(tmp_path)(image, return_tensors="np")
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    for family in get_args(VisionFamily):  # the file says which it is
        config = preprocess_from_json(settings, family)
        same_pixels(pixel_values(load_image(image), config), theirs)


def same_pixels(ours: NDArray[np.float32], theirs: BatchFeature) -> None:
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous
    np.testing.assert_allclose(ours, theirs["pixel_values"], rtol=0, atol=PIXEL_VALUES)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [112, 97])
@pytest.mark.parametrize("dimensions", SIZES)
def test_pad_is_llavas(dimensions: tuple[int, int], size: int, resample: str) -> None:
    image = Image.fromarray(noise(*dimensions))
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=Image.Resampling[resample.upper()],
        do_pad=True,
    )
    config = PreprocessConfig(size, "pad", resample)  # type: ignore[arg-type]
    same_pixels(pixel_values(image, config), processor(image, return_tensors="np"))


def expand2square(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """LLaVA-1.5's own, of its `mm_utils.py`."""
    width, height = image.size
    if width == height:
        return image
    if width > height:
        result = Image.new(image.mode, (width, width), background)
        result.paste(image, (0, (width - height) // 2))
        return result
    result = Image.new(image.mode, (height, height), background)
    result.paste(image, ((height - width) // 2, 0))
    return result


@pytest.mark.parametrize("band", [1, 1000, 1 << 22])
@pytest.mark.parametrize(
    "dimensions", [(97, 97), (200, 33), (33, 200), (30, 97), (97, 30), (1, 50)]
)
def test_padding_in_bands_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, dimensions: tuple[int, int], band: int
) -> None:
    monkeypatch.setattr(preprocess, "MAX_BAND", band)
    image = Image.fromarray(noise(*dimensions))
    config = PreprocessConfig(97, "pad")
    square = expand2square(image, tuple(int(x * 255) for x in config.image_mean))
    expected = pixel_values(square, PreprocessConfig(97, "squash"))
    np.testing.assert_array_equal(pixel_values(image, config), expected)


def test_a_square_too_large_to_pad_is_padded_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    image = ramps(1600, 400)
    expected = pixel_values(image, PreprocessConfig(32, "pad"))
    monkeypatch.setattr(preprocess, "MAX_PADDED", 400**2)
    np.testing.assert_allclose(
        pixel_values(image, PreprocessConfig(32, "pad")), expected, rtol=0, atol=REDUCED_PIXELS
    )


@pytest.mark.parametrize("dimensions", [(6000, 20), (20, 6007)])
def test_a_hair_that_would_be_resized_beyond_the_limit(
    monkeypatch: pytest.MonkeyPatch, dimensions: tuple[int, int]
) -> None:
    image = ramps(*dimensions)
    expected = pixel_values(image, PreprocessConfig(60))
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 100_000)
    cut = pixel_values(image, PreprocessConfig(60))
    np.testing.assert_allclose(cut, expected, rtol=0, atol=REDUCED_PIXELS)


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("dimensions", [(1, 1), (60_000, 1), (1, 60_000), (300_000, 160)])
def test_every_shape_works_in_every_way(resize: Any, dimensions: tuple[int, int]) -> None:
    image = Image.new("RGB", dimensions, (7, 7, 7))
    config = PreprocessConfig(112, resize, image_mean=(0.5, 0.5, 0.5))
    pixels = pixel_values(image, config)
    assert pixels.shape == (1, 3, 112, 112)
    dark = (7 / 255 - 0.5) / config.image_std[0]
    if resize != "pad" or dimensions == (1, 1):
        np.testing.assert_allclose(pixels[0, 0], dark, rtol=0, atol=PIXEL_VALUES)
    else:
        margin = (127 / 255 - 0.5) / config.image_std[0]
        np.testing.assert_allclose(pixels[0, 0, ::111, ::111], margin, rtol=0, atol=PIXEL_VALUES)


def ramps(width: int, height: int) -> Image.Image:
    """A picture without noise: smooth in both directions, another in each channel."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 40), np.sin(y / 60), np.sin((x + y) / 90)]
    return Image.fromarray((127.5 + 120 * np.stack(waves, -1)).round().astype(np.uint8))


# load_image: what kinds of image


def test_the_same_image_from_path_bytes_pillow_and_array(tmp_path: Path) -> None:
    array = noise(5, 4)
    image = Image.fromarray(array)
    path = tmp_path / "a.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), image, array, array[::-1][::-1]):
        np.testing.assert_array_equal(np.asarray(load_image(source)), array)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_formats(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = Image.new("RGB", (16, 16), (0, 0, 255))
    loaded = load_image(image_bytes(image, kind, **options))
    assert np.abs(np.asarray(loaded).astype(int) - (0, 0, 255)).max() <= 1  # JPEG rounds


def test_a_view_of_an_array_in_any_order() -> None:
    array = noise(6, 4)
    loaded = np.asarray(load_image(array[:, ::-1]))
    np.testing.assert_array_equal(loaded, array[:, ::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    """The camera's sensor saw `stored`; the tag says how to turn it (EXIF 2.3, table 6)."""
    upright = noise(3, 2)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),  # row 0 is the visual right side
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = image_bytes(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(source)), upright)


def test_alpha_lies_on_white() -> None:
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], np.uint8)
    expected = [[[200, 100, 0], [255, 255, 255], [244, 224, 204]]]  # 51 / 255 is a fifth
    for source in (rgba, image_bytes(Image.fromarray(rgba))):
        assert np.asarray(load_image(source)).tolist() == expected
    grey = Image.merge("LA", (Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 51)))
    assert pixel(load_image(image_bytes(grey))) == (224, 224, 224)


def test_grey_is_the_same_in_all_channels() -> None:
    grey = np.array([[0, 99, 255]], np.uint8)
    expected = [[[0] * 3, [99] * 3, [255] * 3]]
    for source in (grey, grey[:, :, None], image_bytes(Image.fromarray(grey))):
        assert np.asarray(load_image(source)).tolist() == expected


def test_grey_with_a_transparent_level() -> None:
    source = image_bytes(Image.fromarray(np.array([[7, 8]], np.uint8)), transparency=7)
    assert np.asarray(load_image(source)).tolist() == [[[255] * 3, [8] * 3]]


def test_palette() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    expected = [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    assert np.asarray(load_image(image_bytes(image))).tolist() == expected
    expected[0][1] = [255, 255, 255]  # one transparent colour
    assert np.asarray(load_image(image_bytes(image, transparency=1))).tolist() == expected
    expected[0] = [[255, 0, 0], [255, 255, 255], [204, 204, 255]]  # an alpha for each colour
    source = image_bytes(image, transparency=bytes([255, 0, 51]))
    assert np.asarray(load_image(source)).tolist() == expected


def test_cmyk() -> None:
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for source in (image, image_bytes(image, "TIFF")):
        assert pixel(load_image(source)) == (0, 255, 255)


def test_one_bit() -> None:
    image = Image.fromarray(np.array([[True, False]]))
    assert np.asarray(load_image(image_bytes(image))).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 1000, 32768, 65406, 65407, 65535]], np.uint16)
    image = load_image(image_bytes(Image.fromarray(values), kind))
    expected = [round(v * 255 / 65535) for v in values[0].tolist()]
    assert np.asarray(image)[0, :, 0].tolist() == expected == [0, 0, 1, 1, 4, 128, 254, 255, 255]


def test_16_bits_in_either_byte_order_and_in_32() -> None:
    values = np.array([[0, 1000, 65535]])
    for mode, dtype in (("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4")):
        image = Image.frombytes(mode, (3, 1), values.astype(dtype).tobytes())
        assert np.asarray(load_image(image))[0, :, 2].tolist() == [0, 4, 255]


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 65536), ("I", -1)])
def test_depths_whose_scale_is_unknown(mode: str, value: float) -> None:
    with pytest.raises(ImageError, match="expected 8 or 16 bits a channel, found"):
        load_image(Image.new(mode, (2, 2), value))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    source = image_bytes(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(source)) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert pixel(load_image(source)) == (255, 0, 0)


def test_the_callers_image_is_left_alone() -> None:
    image = Image.fromarray(noise(4, 4, 4))
    before = image.tobytes()
    load_image(image)
    assert (image.mode, image.tobytes()) == ("RGBA", before)


# load_image: bad input


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png can't be read: found No such file.*the path"):
        load_image(tmp_path / "gone.png")


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="Is a directory"):
        load_image(tmp_path)


def test_a_text_file_called_png(tmp_path: Path) -> None:
    path = tmp_path / "letter.png"
    path.write_text("Dear Sir or Madam,\n")
    with pytest.raises(ImageError, match=r"letter\.png can't be read: expected one of PNG, JPEG"):
        load_image(path)


def test_formats_that_would_start_another_program() -> None:
    """EPS is a program in PostScript, which Pillow hands to Ghostscript."""
    with pytest.raises(ImageError, match=r"expected one of PNG, .*, found a PostScript program"):
        load_image(image_bytes(Image.new("RGB", (4, 4)), "EPS"))


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    for source in (path, b""):
        with pytest.raises(ImageError, match="found an empty file"):
            load_image(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file(kind: str, share: float) -> None:
    whole = image_bytes(Image.fromarray(noise(64, 64)), kind)
    with pytest.raises(ImageError) as error:
        load_image(whole[: int(len(whole) * share)])
    assert "\n" not in str(error.value)
    assert "Fix: " in str(error.value)


def test_bytes_damaged_anywhere_give_an_image_or_an_image_error() -> None:
    random = np.random.default_rng(0)
    for kind in ("PNG", "GIF", "TIFF", "PPM"):
        whole = image_bytes(Image.fromarray(noise(16, 16)), kind)
        for _ in range(100):
            damaged = bytearray(whole)
            damaged[random.integers(len(whole))] = random.integers(256)
            with contextlib.suppress(ImageError):
                assert load_image(bytes(damaged)).mode == "RGB"


def huge_header(width: int, height: int) -> bytes:
    """A PNG that claims these dimensions and has no pixels to speak of."""
    small = image_bytes(Image.new("L", (1, 1)))
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + small[24:29]
    return small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]


@pytest.mark.parametrize(
    ("width", "height"),
    [(10_000, 5_201), (10_000, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)],
)
def test_too_many_pixels_are_refused_by_the_header(width: int, height: int) -> None:
    with pytest.raises(
        ImageError, match=f"expected at most 52 megapixels, found {width} x {height}"
    ):
        load_image(huge_header(width, height))


def test_as_many_pixels_as_allowed_are_decoded() -> None:
    assert MAX_PIXELS == 10_000 * 5_200
    for width, height in ((10_000, 5_200), (8192, 6144), (8256, 6192)):
        with pytest.raises(ImageError, match="whole copy"):  # so it went on to the missing pixels
            load_image(huge_header(width, height))


def test_too_large_an_array_or_pillow_image() -> None:
    array = np.broadcast_to(np.uint8(0), (10_000, 5_201, 3))  # takes no memory
    with pytest.raises(ImageError, match="too large: expected at most 52 megapixels, found 5201 x"):
        load_image(array)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0), (0, 0, 4)])
def test_arrays_without_pixels(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="is empty: expected at least one pixel"):
        load_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((4, 4), np.uint16),
    ],
)
def test_arrays_that_are_no_images(array: NDArray[np.uint8]) -> None:
    with pytest.raises(ImageError, match=r"this array is no image: expected uint8 \[H, W\]"):
        load_image(array)


def test_a_pillow_image_without_pixels() -> None:
    with pytest.raises(ImageError, match="is empty"):
        load_image(Image.new("RGB", (0, 4)))


def test_something_else() -> None:
    with pytest.raises(ImageError, match=r"this is no image: expected a path.*found int"):
        load_image(7)  # type: ignore[arg-type]
