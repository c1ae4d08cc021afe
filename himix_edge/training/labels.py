"""What each patch of a scene shows, as symbols: what the encoder learns to see.

For every patch, of the object that covers it: shape, colour, size, its rank from the left and from
the top, the place of its centre, and whether the centre lies in this very patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from himix_edge.shapes.render import object_mask
from himix_edge.shapes.scenes import COLOURS, MAX_OBJECTS, SHAPES, SIZES, Scene

# For each class label, how many values it has; 0 always means that no object covers the patch.
CLASSES = {
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "size": len(SIZES) + 1,
    "from_left": MAX_OBJECTS + 1,
    "from_top": MAX_OBJECTS + 1,
    "centre": 2,
}
SYMBOLS = sum(CLASSES.values()) + 2  # the classes one-hot, and the place of the centre
COVERED = 0.15  # the part of a patch that an object must fill to be what the patch shows


@dataclass(frozen=True)
class Labels:
    """Labels of B scenes of N patches, in the order of the encoder's patch tokens."""

    classes: npt.NDArray[np.int64]  # [B, N, len(CLASSES)], in the order of CLASSES
    place: npt.NDArray[np.float32]  # [B, N, 2]: x, y of the centre, 0 to 1; 0 where no object is

    def symbols(self) -> npt.NDArray[np.float32]:
        """[B, N, SYMBOLS]: what an encoder would give that sees all of this without a fault."""
        hot = [
            np.eye(size, dtype=np.float32)[self.classes[..., i]]
            for i, size in enumerate(CLASSES.values())
        ]
        return np.concatenate([*hot, self.place], axis=-1)


def labels_of(scenes: list[Scene], image_size: int, patch_size: int) -> Labels:
    """The labels of scenes as an encoder of this image and patch size sees them."""
    each = [_scene_labels(scene, image_size, patch_size) for scene in scenes]
    return Labels(np.stack([c for c, _ in each]), np.stack([p for _, p in each]))


def _scene_labels(
    scene: Scene, image_size: int, patch_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    side = image_size // patch_size
    shown = _object_shown(scene, image_size, patch_size)  # [side, side]
    rows = [(0, 0, 0, 0, 0, 0)]
    places = [(0.0, 0.0)]
    downwards = sorted(scene.objects, key=lambda item: item.y)
    for i, item in enumerate(scene.objects):
        rows.append(
            (
                SHAPES.index(item.shape) + 1,
                list(COLOURS).index(item.colour) + 1,
                list(SIZES).index(item.size) + 1,
                i + 1,
                downwards.index(item) + 1,
                0,
            )
        )
        places.append((item.x, item.y))
    classes = np.array(rows, dtype=np.int64)[shown]
    for item in scene.objects:
        classes[int(item.y * side), int(item.x * side), -1] = 1
    place = np.array(places, dtype=np.float32)[shown]
    return classes.reshape(side * side, -1), place.reshape(side * side, 2)


def _object_shown(scene: Scene, image_size: int, patch_size: int) -> npt.NDArray[np.int64]:
    """For each patch, 0 or 1 + its object's index: whose centre it holds, or who fills most."""
    side = image_size // patch_size
    mask = np.asarray(object_mask(scene, image_size))
    patches = mask.reshape(side, patch_size, side, patch_size)
    filled = np.stack([(patches == i).mean(axis=(1, 3)) for i in range(len(scene.objects) + 1)])
    objects = filled[1:]
    shown = np.where(objects.max(axis=0) >= COVERED, objects.argmax(axis=0) + 1, 0)
    for i, item in enumerate(scene.objects):
        shown[int(item.y * side), int(item.x * side)] = i + 1
    return shown
