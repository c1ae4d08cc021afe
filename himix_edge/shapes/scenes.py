"""Scenes as data: one to four objects on a plain, light ground."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (215, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (240, 205, 30),
    "green": (40, 155, 65),
    "cyan": (60, 195, 215),
    "blue": (40, 75, 215),
    "purple": (140, 60, 185),
    "black": (30, 30, 30),
}
SIZES = {"small": (0.075, 0.09), "large": (0.135, 0.165)}  # radius, as a part of the image's width

MAX_OBJECTS = 4
COLOUR_JITTER = 12  # of 255, each way, on each channel
MAX_TURN = 10.0  # degrees, each way
GAP = 0.02  # between two objects' circles, as a part of the width
MARGIN = 0.01  # between an object's circle and the image's edge


@dataclass(frozen=True)
class SceneObject:
    """One object; its centre and radius are parts of the image's width, y pointing down.

    Attributes:
        radius: of the circle that holds the object.
        rgb: the colour as painted, 0 to 255.
        turn: degrees, counter-clockwise.
    """

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]
    turn: float

    @property
    def name(self) -> str:
        """ "red circle": within a scene no two objects share it."""
        return f"{self.colour} {self.shape}"

    @property
    def full_name(self) -> str:
        return f"{self.size} {self.name}"


@dataclass(frozen=True)
class Scene:
    objects: tuple[SceneObject, ...]  # from left to right
    ground: tuple[int, int, int]


def random_scene(rng: np.random.Generator) -> Scene:
    """Draws a scene: every number of objects is equally likely, no two objects are named alike."""
    count = int(rng.integers(1, MAX_OBJECTS + 1))
    kinds = list(itertools.product(COLOURS, SHAPES))
    names = [kinds[i] for i in rng.choice(len(kinds), size=count, replace=False)]
    sizes = [str(size) for size in rng.choice(list(SIZES), size=count)]
    radii = [float(rng.uniform(*SIZES[size])) for size in sizes]
    centres = _random_centres(rng, radii)
    objects = [
        SceneObject(
            size=size,
            colour=colour,
            shape=shape,
            x=x,
            y=y,
            radius=radius,
            rgb=_jittered(rng, COLOURS[colour]),
            turn=float(rng.uniform(-MAX_TURN, MAX_TURN)),
        )
        for size, (colour, shape), (x, y), radius in zip(sizes, names, centres, radii, strict=True)
    ]
    return Scene(tuple(sorted(objects, key=lambda item: item.x)), _random_ground(rng))


def _random_centres(rng: np.random.Generator, radii: list[float]) -> list[tuple[float, float]]:
    """Centres for circles that neither touch each other nor leave the image."""
    while True:
        centres: list[tuple[float, float]] = []
        for radius in radii:
            edge = radius + MARGIN
            for _ in range(20):
                x, y = (float(value) for value in rng.uniform(edge, 1 - edge, size=2))
                apart = (
                    math.hypot(x - other_x, y - other_y) >= radius + other + GAP
                    for (other_x, other_y), other in zip(centres, radii, strict=False)
                )
                if all(apart):
                    centres.append((x, y))
                    break
        if len(centres) == len(radii):
            return centres


def _random_ground(rng: np.random.Generator) -> tuple[int, int, int]:
    """White as often as not, else some light tint."""
    if rng.random() < 0.5:
        return (255, 255, 255)
    red, green, blue = (int(value) for value in rng.integers(222, 256, size=3))
    return red, green, blue


def _jittered(rng: np.random.Generator, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    shifts = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=3)
    red, green, blue = (int(min(max(c + s, 0), 255)) for c, s in zip(rgb, shifts, strict=True))
    return red, green, blue
