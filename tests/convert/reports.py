"""A conversion with made-up figures, each of them different, and its pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from PIL import Image

from himix_edge.config import ProjectionConfig
from himix_edge.convert.blame import Blame, HeadBlame
from himix_edge.convert.fit import Fit
from himix_edge.convert.judge import Exchange, Judgement
from himix_edge.convert.report import Conversion
from himix_edge.convert.sums import CurvePoint
from tests.tiny import tiny_config

CURVE = (CurvePoint(8, (0.3, 0.1), (0.5, 0.2)), CurvePoint(56, (0.25, 0.05), (0.4, 0.1)))
FIT = Fit(
    keys=(0.25, 0.05),
    values=(0.4, 0.1),
    trained_keys=(0.2, 0.04),
    trained_values=(0.35, 0.08),
    penalty=1e-4,
    images=56,
    held_out=7,
    rows=224,
    curve=CURVE,
    skipped={"notes.txt": "image notes.txt can't be read: it is <b>no</b> picture"},
)
BLAME = Blame((0.01, 0.5), (0.02, 0.03), 0.61, 0.07, (HeadBlame(1, (0.4, 0.11), (0.01, 0.02)),), 4)
FITTED = Judgement(
    (
        Exchange("a.png", "How many?", None, "two", "two", 2, 2, 0.125, 0.25),
        Exchange("b.png", "Which?", "the red one", "the red one", "the blue one", 4, 3, 0.5, 0.75),
    )
)
DISTILLED = Judgement(tuple(dataclasses.replace(one, kl=one.kl / 4) for one in FITTED.exchanges))


def conversion(distilled: Judgement | None = None, **changes: object) -> Conversion:
    teacher = tiny_config("vanilla")
    student = dataclasses.replace(
        teacher,
        design="himix",
        projection=ProjectionConfig(bias=True),
        vision_key_rotation="slots",
        prefix_tokens=3,
    )
    made = Conversion(
        name="llava-tiny",
        family="llava",
        licence="apache-2.0",
        teacher=teacher,
        student=student,
        options={"neighbourhood": 1, "connector": False, "joined_layers": (), "batch": 8},
        fit=FIT,
        fitted=FITTED,
        distilled=distilled,
        distil_steps=250 if distilled else 0,
        blame=BLAME,
        seconds={"fit": 100.5, "judge": 20.0},
        peak_memory=3 * 2**30,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def painted(folder: Path, names: tuple[str, ...] = ("a.png", "b.png")) -> dict[str, Path]:
    for name in names:
        Image.new("RGB", (320, 200), "#b03020").save(folder / name, format="PNG")
    return {name: folder / name for name in names}
