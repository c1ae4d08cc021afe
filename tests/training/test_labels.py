from __future__ import annotations

import numpy as np

from himix_edge.shapes.scenes import COLOURS, SHAPES, SIZES, Scene, SceneObject, random_scene
from himix_edge.training.labels import CLASSES, SYMBOLS, labels_of

IMAGE, PATCH = 112, 14  # 8 x 8 patches


def item(size: str, colour: str, shape: str, x: float, y: float, radius: float) -> SceneObject:
    return SceneObject(size, colour, shape, x, y, radius, COLOURS[colour], 0.0)


# The square covers patches 1 and 2 each way, the small circle lies low and to the right.
SCENE = Scene(
    (
        item("large", "red", "square", 0.25, 0.25, 0.15),
        item("small", "blue", "circle", 0.6875, 0.8125, 0.08),
    ),
    (255, 255, 255),
)


def test_patches_tell_of_the_object_that_covers_them() -> None:
    labels = labels_of([SCENE], IMAGE, PATCH)
    grid = labels.classes.reshape(8, 8, len(CLASSES))
    square = (SHAPES.index("square") + 1, list(COLOURS).index("red") + 1, 2, 1, 1)
    circle = (SHAPES.index("circle") + 1, list(COLOURS).index("blue") + 1, 1, 2, 2)
    assert list(SIZES) == ["small", "large"]
    for row in (1, 2):
        for column in (1, 2):
            assert tuple(grid[row, column, :5]) == square
    assert tuple(grid[6, 5, :5]) == circle
    assert not grid[0, 0].any()
    assert not grid[4:, :3].any()
    places = labels.place.reshape(8, 8, 2)
    assert np.allclose(places[1, 1], (0.25, 0.25), rtol=0, atol=1e-6)
    assert np.allclose(places[6, 5], (0.6875, 0.8125), rtol=0, atol=1e-6)
    assert not places[0, 0].any()


def test_one_patch_of_each_object_holds_its_centre() -> None:
    labels = labels_of([SCENE], IMAGE, PATCH)
    centres = labels.classes.reshape(8, 8, len(CLASSES))[..., -1]
    assert np.argwhere(centres).tolist() == [[2, 2], [6, 5]]


def test_a_rings_centre_patch_is_the_rings_though_it_shows_the_ground() -> None:
    ring = Scene((item("large", "black", "ring", 0.56, 0.56, 0.16),), (255, 255, 255))
    classes = labels_of([ring], IMAGE, PATCH).classes.reshape(8, 8, len(CLASSES))
    assert classes[4, 4, 0] == SHAPES.index("ring") + 1
    assert classes[4, 4, -1] == 1


def test_ranks_follow_the_centres() -> None:
    rng = np.random.default_rng(8)
    for _ in range(50):
        scene = random_scene(rng)
        classes = labels_of([scene], IMAGE, PATCH).classes.reshape(8, 8, len(CLASSES))
        by_height = sorted(scene.objects, key=lambda each: each.y)
        for rank, each in enumerate(scene.objects, start=1):
            patch = classes[int(each.y * 8), int(each.x * 8)]
            assert patch[3] == rank
            assert patch[4] == by_height.index(each) + 1


def test_symbols_are_the_labels_one_hot_and_the_place() -> None:
    labels = labels_of([SCENE, SCENE], IMAGE, PATCH)
    symbols = labels.symbols()
    assert symbols.shape == (2, 64, SYMBOLS)
    start = 0
    for i, size in enumerate(CLASSES.values()):
        part = symbols[..., start : start + size]
        assert np.array_equal(part.argmax(-1), labels.classes[..., i])
        assert np.array_equal(part.sum(-1), np.ones((2, 64)))
        start += size
    assert np.array_equal(symbols[..., start:], labels.place)
