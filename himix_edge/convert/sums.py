"""What a pass over the calibration pictures collects, and how an interrupted one goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from himix_edge.convert.images import Calibration
from himix_edge.convert.moments import Moments
from himix_edge.convert.teacher import Teacher
from himix_edge.training.state import load_state, save_state

SAVE_SECONDS = 60.0  # between two states on disk


@dataclass(frozen=True)
class CurvePoint:
    """How well a fit on the first `images` pictures does on those held out."""

    images: int
    keys: tuple[float, ...]
    values: tuple[float, ...]


@dataclass
class Part:
    """The pictures held out, or the others: their sums, and how far they were taken."""

    name: str
    held_out: bool
    sums: Moments
    files: int = 0  # taken, read or not
    images: int = 0


@dataclass
class Sums:
    """All that a run collects, and its state on disk.

    Attributes:
        path: the state's.
        run: all that decides the run, as plain data: whose state it is.
    """

    parts: tuple[Part, Part]
    path: Path
    run: dict[str, Any]
    curve: list[CurvePoint] = field(default_factory=list)
    saved: float = field(default_factory=time.monotonic)

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{part.name}/{name}": tensor
            for part in self.parts
            for name, tensor in part.sums.tensors().items()
        }

    def save(self, calibration: Calibration) -> None:
        taken = {part.name: [part.files, part.images] for part in self.parts}
        curve = [dataclasses.asdict(point) for point in self.curve]
        notes = {"taken": taken, "curve": curve, "skipped": calibration.skipped}
        save_state(self.path, self.run, self.tensors(), notes)
        self.saved = time.monotonic()

    def save_if_due(self, calibration: Calibration) -> None:
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save(calibration)

    def load(self, calibration: Calibration) -> None:
        notes = load_state(self.path, self.run, self.tensors())
        if notes is None:
            return
        for part in self.parts:
            part.files, part.images = notes["taken"][part.name]
        self.curve = [
            CurvePoint(point["images"], tuple(point["keys"]), tuple(point["values"]))
            for point in notes["curve"]
        ]
        calibration.recall(notes["skipped"])


def batches(
    calibration: Calibration, part: Part, batch: int
) -> Iterator[tuple[list[Path], Tensor]]:
    """Pictures not taken yet, [B, 3, H, W]; a batch ends where the curve has a point, at 2^n."""
    images = part.images
    paths: list[Path] = []
    held: list[Tensor] = []
    for path, pixels in calibration.pictures(part.held_out, part.files):
        paths.append(path)
        held.append(torch.from_numpy(pixels))
        images += 1
        if len(held) == batch or images & (images - 1) == 0:
            yield paths, torch.cat(held)
            paths, held = [], []
    if held:
        yield paths, torch.cat(held)


def fingerprint(teacher: Teacher) -> dict[str, Any]:
    """What tells one teacher from another, as plain data: a few of its weights by their sha256."""
    decoder = teacher.model.decoder.model
    layer: Any = decoder.layers[0]  # a `Layer`; ModuleList forgets it
    weights: dict[str, Tensor] = {
        "connector": next(teacher.connector.parameters()),
        "key_projection": layer.self_attn.k_proj.weight,
        "norm": decoder.norm.weight,
    }
    digests = {
        name: hashlib.sha256(weight.float().cpu().numpy().tobytes()).hexdigest()[:16]
        for name, weight in weights.items()
    }
    return {"dtype": str(teacher.dtype), "prefix": list(teacher.prefix_ids), **digests}
