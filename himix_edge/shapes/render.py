"""Scenes as pictures."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from himix_edge.shapes.scenes import Scene, SceneObject

OVERSAMPLING = 3  # drawn this many times larger, then averaged: smooth edges

# Proportions, as parts of the object's radius.
SQUARE_HALF_SIDE = 0.8
STAR_INNER_RADIUS = 0.42
CROSS_HALF_WIDTH = 0.32
RING_INNER_RADIUS = 0.55


def render(scene: Scene, size: int = 336) -> Image.Image:
    """The scene as a square RGB picture of `size` x `size` pixels, with smooth edges."""
    width = size * OVERSAMPLING
    picture = Image.new("RGB", (width, width), scene.ground)
    draw = ImageDraw.Draw(picture)
    for item in scene.objects:
        _draw_object(draw, item, width, fill=item.rgb, hole=scene.ground)
    return picture.reduce(OVERSAMPLING)


def object_mask(scene: Scene, size: int) -> Image.Image:
    """What each pixel shows, as an 8-bit picture: 0 is the ground, i + 1 is `objects[i]`."""
    mask = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(mask)
    for i, item in enumerate(scene.objects):
        _draw_object(draw, item, size, fill=i + 1, hole=0)
    return mask


def _draw_object(
    draw: ImageDraw.ImageDraw,
    item: SceneObject,
    width: int,
    fill: int | tuple[int, int, int],
    hole: int | tuple[int, int, int],
) -> None:
    x, y, radius = item.x * width, item.y * width, item.radius * width
    if item.shape in ("circle", "ring"):
        _draw_disc(draw, x, y, radius, fill)
        if item.shape == "ring":
            _draw_disc(draw, x, y, radius * RING_INNER_RADIUS, hole)
        return
    turn = math.radians(item.turn)
    draw.polygon(
        [
            (x + radius * length * math.cos(turn + at), y - radius * length * math.sin(turn + at))
            for length, at in OUTLINES[item.shape]
        ],
        fill=fill,
    )


def _draw_disc(
    draw: ImageDraw.ImageDraw,
    x: float,
    y: float,
    radius: float,
    fill: int | tuple[int, int, int],
) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _polar(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(x, y), y pointing up, as (distance, angle)."""
    return [(math.hypot(x, y), math.atan2(y, x)) for x, y in points]


def _outlines() -> dict[str, list[tuple[float, float]]]:
    """The corners of each polygon as (distance in radii, angle in radians), upright."""
    up, fifth = math.pi / 2, math.tau / 5
    half, arm = SQUARE_HALF_SIDE, CROSS_HALF_WIDTH
    quarter = [(arm, arm), (arm, 1.0), (-arm, 1.0)]  # a cross, as far as its upper arm
    cross = list(quarter)
    for _ in range(3):
        quarter = [(-y, x) for x, y in quarter]
        cross += quarter
    return {
        "square": _polar([(half, half), (-half, half), (-half, -half), (half, -half)]),
        "triangle": [(1.0, up + i * math.tau / 3) for i in range(3)],
        "star": [
            corner
            for i in range(5)
            for corner in (
                (1.0, up + i * fifth),
                (STAR_INNER_RADIUS, up + (i + 0.5) * fifth),
            )
        ],
        "cross": _polar(cross),
    }


OUTLINES = _outlines()
