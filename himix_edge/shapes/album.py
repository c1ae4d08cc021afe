"""A folder of scenes, with questions about them: what a model is calibrated or converted with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from himix_edge.data.pictures import QUESTIONS
from himix_edge.errors import ConfigError
from himix_edge.files import Kind, refuse_foreign_folder, sha256_of, whole_folder
from himix_edge.replacing import entries
from himix_edge.shapes.questions import KINDS, Question, ask
from himix_edge.shapes.render import render
from himix_edge.shapes.scenes import Scene, random_scene

ALBUM = 40_000_003  # begins the seed of every album's scene; those held out begin with another
SUMS = ".album.json"  # the sha256 of every other file: what may be replaced by the next album
ASKED = (*KINDS, "count", "relation", "which")  # of these three a scene has many


def album_scene(seed: int, index: int) -> tuple[Scene, list[Question]]:
    """An album's scene of that number, with up to nine questions, one or two of every kind."""
    rng = np.random.default_rng([ALBUM, seed, index])
    scene = random_scene(rng)
    asked = (ask(kind, scene, rng) for kind in ASKED)
    return scene, list({question.text: question for question in asked if question}.values())


def write_album(
    folder: Path, count: int, seed: int, watch: Callable[[int], None] = lambda _: None
) -> None:
    """Writes `count` scenes as PNG files, and QUESTIONS with all questions and right answers.

    The folder is written whole or not at all; an older album there is replaced, unless a
    file of it was changed or added.

    Args:
        watch: called with the number of scenes that are drawn.

    Raises:
        ConfigError: no scenes, or a seed below 0.
        OutputError: a place that can't be written, or a folder of someone else's.
    """
    if count < 1 or seed < 0:
        raise ConfigError(
            "can't draw an album",
            expected="1 scene or more, seed 0 or more",
            found=f"{count} of seed {seed}",
        )
    refuse_foreign_folder(folder, KIND)
    with whole_folder(folder, kind=KIND, last=SUMS) as temporary:
        with (temporary / QUESTIONS).open("w", encoding="utf-8") as lines:
            for index in range(count):
                scene, questions = album_scene(seed, index)
                name = f"scene-{index:05d}.png"
                render(scene).save(temporary / name)
                for question in questions:
                    line = {"image": name, "prompt": question.text, "answer": question.answer}
                    lines.write(json.dumps(line) + "\n")
                watch(index + 1)
        sums = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
        (temporary / SUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def _not_of_an_album(folder: Path) -> str | None:
    """What in a folder is not as `write_album` wrote it: pictures and questions are edited, too."""
    try:
        sums = dict(json.loads((folder / SUMS).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return f"it has no {SUMS}, so that himix-edge did not draw it"
    for entry in sorted(entries(folder)):
        if entry.name != SUMS and (not entry.is_file() or sha256_of(entry) != sums.get(entry.name)):
            return f"{entry.name} in it is not as himix-edge drew it"
    return None


KIND = Kind("folder of scenes", _not_of_an_album)
