from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from himix_edge.config import PreprocessConfig
from himix_edge.errors import ConfigError
from himix_edge.runtimes.preprocess import prepare
from himix_edge.runtimes.shape_notices import FAR_FROM_SQUARE, TINY_EDGE, shape_notices


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [(4000, 3000), (3000, 4000), (1920, 804), (1080, 2400), (16, 16)])
def test_of_ordinary_pictures_nothing_is_said(resize: Any, size: tuple[int, int]) -> None:
    assert shape_notices(*size, resize, 384) == ()


@pytest.mark.parametrize(
    ("resize", "size", "notice"),
    [
        ("crop", (4000, 500), "crop keeps the middle 12 % of this 4000 x 500 picture; "
         "run --resize pad shows all of it"),
        ("crop", (60_000, 20), "crop keeps the middle 0.033 % of this 60000 x 20 picture; "
         "run --resize pad shows all of it"),
        ("squash", (4000, 500), "squash shrinks the width of this 4000 x 500 picture 8 times as "
         "much as its height; run --resize pad keeps its shape, and --resize crop that of its "
         "middle"),
        ("squash", (500, 2000), "squash shrinks the height of this 500 x 2000 picture 4 times as "
         "much as its width; run --resize pad keeps its shape, and --resize crop that of its "
         "middle"),
        ("pad", (400, 100), "pad gives this 400 x 100 picture 25 % of what the model sees, and the "
         "rest to the margin; run --resize crop shows its middle larger"),
    ],
)  # fmt: skip
def test_of_stripes_what_becomes_of_them(resize: Any, size: tuple[int, int], notice: str) -> None:
    assert shape_notices(*size, resize, 384) == (notice,)


def test_of_tiny_ones_that_little_is_there() -> None:
    [notice] = shape_notices(1, 1, "squash", 224)
    assert notice.startswith("this 1 x 1 picture has fewer than 16 pixels along an edge")
    assert len(shape_notices(1, 300, "squash", 224)) == 2


def test_the_thresholds_are_where_they_are_said_to_be() -> None:
    edge = int(100 * FAR_FROM_SQUARE)
    assert not shape_notices(edge - 1, 100, "crop", 224)
    assert shape_notices(edge, 100, "crop", 224)
    assert shape_notices(TINY_EDGE - 1, TINY_EDGE - 1, "crop", 224)


def test_they_come_with_the_pixels() -> None:
    image, config = np.zeros((10, 100, 3), np.uint8), PreprocessConfig(32, "crop")
    assert "crop keeps the middle 10 %" in prepare(image, config).notices[1]
    padded = prepare(image, config, resize="pad")
    assert "pad gives" in padded.notices[1]
    expected = prepare(image, PreprocessConfig(32, "pad")).pixels
    np.testing.assert_array_equal(padded.pixels, expected)
    assert not np.array_equal(padded.pixels, prepare(image, config).pixels)


@pytest.mark.parametrize(
    ("name", "fix"),
    [("pads", "mean 'pad'"), ("Fill", "use one of: squash"), (3, "use")],
)
def test_an_unknown_way_to_resize(name: Any, fix: str) -> None:
    with pytest.raises(ConfigError, match=f"expected squash, crop, pad, found '?{name}.*{fix}"):
        prepare(np.zeros((9, 9), np.uint8), PreprocessConfig(8), resize=name)
