from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from himix_edge.shapes.render import object_mask, render
from himix_edge.shapes.scenes import SHAPES, Scene, SceneObject, random_scene
from tests import tolerances

WHITE, INK = (255, 255, 255), (0, 0, 0)
STAR_INNER = 0.42

# The area of each shape in units of its squared radius, as docs/shapes.md describes it.
AREAS = {
    "circle": math.pi,
    "square": 1.6**2,
    "triangle": 3 * math.sqrt(3) / 4,
    "star": 5 * STAR_INNER * math.sin(math.pi / 5),
    "cross": 2 * (2 * 0.64) - 0.64**2,
    "ring": math.pi * (1 - 0.55**2),
}


def one(shape: str, radius: float = 0.16, turn: float = 0.0) -> SceneObject:
    return SceneObject("large", "black", shape, 0.4, 0.6, radius, INK, turn)


def ink(scene: Scene, size: int) -> npt.NDArray[np.float64]:
    """How much of each pixel is painted, 0 to 1."""
    return 1 - np.asarray(render(scene, size))[..., 0] / 255


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turn", [0.0, 9.0])
def test_areas_are_those_of_the_geometry(shape: str, turn: float) -> None:
    size = 500
    painted = ink(Scene((one(shape, turn=turn),), WHITE), size).sum() / (0.16 * size) ** 2
    assert painted == pytest.approx(AREAS[shape], rel=0, abs=tolerances.SHAPE_AREA)


@pytest.mark.parametrize("shape", SHAPES)
def test_objects_are_where_they_should_be_and_the_rest_is_ground(shape: str) -> None:
    size = 400
    painted = ink(Scene((one(shape),), WHITE), size)
    rows, columns = np.nonzero(painted)
    corner = {"square": math.hypot(0.8, 0.8), "cross": math.hypot(1, 0.32)}.get(shape, 1.0)
    reach = 0.16 * size * corner + 1.5
    distances = np.hypot(columns + 0.5 - 0.4 * size, rows + 0.5 - 0.6 * size)
    assert distances.max() <= reach
    centre = painted[int(0.6 * size), int(0.4 * size)]
    assert centre == (0 if shape == "ring" else 1)


def test_upright_shapes_point_up() -> None:
    painted = ink(Scene((one("triangle"),), WHITE), 400)
    widths = painted.sum(axis=1)[np.nonzero(painted.sum(axis=1))]
    assert np.all(np.diff(widths[:-1]) > 0)  # wider and wider downwards; the last row is an edge
    assert widths[-2] == pytest.approx(math.sqrt(3) * 0.16 * 400, rel=0, abs=1.5)


def test_a_turn_is_counter_clockwise() -> None:
    painted = ink(Scene((one("triangle", turn=10.0),), WHITE), 400)
    top_column = np.nonzero(painted[np.nonzero(painted.sum(axis=1))[0][0]])[0].mean()
    assert top_column == pytest.approx((0.4 - 0.16 * math.sin(math.radians(10))) * 400, abs=2)


def test_edges_are_smooth() -> None:
    painted = ink(Scene((one("circle"),), WHITE), 112)
    assert np.count_nonzero((painted > 0.1) & (painted < 0.9)) > 20


def test_paint_and_ground_have_their_exact_colours() -> None:
    item = SceneObject("large", "red", "square", 0.5, 0.5, 0.15, (201, 33, 44), 0.0)
    picture = np.asarray(render(Scene((item,), (230, 240, 250)), 100))
    assert tuple(picture[50, 50]) == (201, 33, 44)
    assert tuple(picture[0, 0]) == (230, 240, 250)


def test_the_mask_shows_the_objects_of_the_picture() -> None:
    rng = np.random.default_rng(3)
    for _ in range(30):
        scene = random_scene(rng)
        mask, picture = np.asarray(object_mask(scene, 224)), np.asarray(render(scene, 224))
        assert set(np.unique(mask)) == set(range(len(scene.objects) + 1))
        painted = (picture != np.array(scene.ground)).any(-1)
        outline = sum(2 * 12 * item.radius * 224 for item in scene.objects)  # it may go either way
        assert np.count_nonzero((mask > 0) != painted) < outline
        for i, item in enumerate(scene.objects):
            inside = picture[mask == i + 1].astype(int)
            assert np.median(np.abs(inside - np.array(item.rgb)).max(-1)) == 0
