from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from himix_edge.shapes.scenes import (
    COLOUR_JITTER,
    COLOURS,
    GAP,
    MARGIN,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Scene,
    random_scene,
)

SCENES = 600


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(1)
    return [random_scene(rng) for _ in range(SCENES)]


def test_a_seed_draws_the_same_scene() -> None:
    assert random_scene(np.random.default_rng(5)) == random_scene(np.random.default_rng(5))
    assert random_scene(np.random.default_rng(5)) != random_scene(np.random.default_rng(6))


def test_the_world_is_as_rich_as_promised(scenes: list[Scene]) -> None:
    assert len(SHAPES) >= 6
    assert len(COLOURS) >= 8
    assert len(SIZES) == 2
    seen = {(item.size, item.colour, item.shape) for scene in scenes for item in scene.objects}
    assert seen == set(itertools.product(SIZES, COLOURS, SHAPES))


def test_every_number_of_objects_is_equally_likely(scenes: list[Scene]) -> None:
    numbers = Counter(len(scene.objects) for scene in scenes)
    deviation = 4 * math.sqrt(SCENES * 0.25 * 0.75)  # four standard deviations
    assert set(numbers) == set(range(1, MAX_OBJECTS + 1))
    assert all(abs(number - SCENES / MAX_OBJECTS) < deviation for number in numbers.values())


def test_objects_stand_from_left_to_right_under_names_of_their_own(scenes: list[Scene]) -> None:
    for scene in scenes:
        places = [item.x for item in scene.objects]
        assert places == sorted(places)
        assert len({item.name for item in scene.objects}) == len(scene.objects)


def test_objects_keep_apart_and_inside(scenes: list[Scene]) -> None:
    for scene in scenes:
        for item in scene.objects:
            low, high = SIZES[item.size]
            assert low <= item.radius <= high
            edge = item.radius + MARGIN
            assert edge <= item.x <= 1 - edge
            assert edge <= item.y <= 1 - edge
        for a, b in itertools.combinations(scene.objects, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius + GAP


def test_paint_is_the_named_colour_or_near_it(scenes: list[Scene]) -> None:
    for scene in scenes:
        for item in scene.objects:
            for painted, named in zip(item.rgb, COLOURS[item.colour], strict=True):
                assert abs(painted - named) <= COLOUR_JITTER
                assert 0 <= painted <= 255
        assert min(scene.ground) >= 222
