from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from himix_edge.data.pictures import QUESTIONS, picture_files
from himix_edge.errors import ConfigError, OutputError
from himix_edge.shapes.album import album_scene, write_album
from himix_edge.shapes.benchmark import HELD_OUT, held_out_scene
from himix_edge.shapes.questions import DESCRIBE_TEXTS, KINDS
from himix_edge.shapes.render import render

SCENES = 6


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("albums") / "album"
    write_album(folder, SCENES, seed=3)
    return folder


def lines_of(folder: Path) -> list[dict[str, str]]:
    text = (folder / QUESTIONS).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_picture_is_that_of_its_questions(album: Path) -> None:
    files, lines = picture_files(album), lines_of(album)
    assert len(files) == SCENES
    for index, file in enumerate(files):
        scene, questions = album_scene(3, index)
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(render(scene)))
        asked = [line for line in lines if line["image"] == file.name]
        assert [(q["prompt"], q["answer"]) for q in asked] == [
            (question.text, question.answer) for question in questions
        ]
        assert len(questions) <= 9
    assert len(lines) == sum(len(album_scene(3, index)[1]) for index in range(SCENES))


def test_the_answers_are_right_by_what_the_scene_holds() -> None:
    kinds = []
    for index in range(40):
        scene, questions = album_scene(0, index)
        names = [item.full_name for item in scene.objects]
        for question in questions:
            kinds.append(question.kind)
            if question.text in DESCRIBE_TEXTS:
                said = question.answer.lower().rstrip(".").replace(" and ", ", ").split(", ")
                assert said == [f"a {name}" for name in names]
            if question.text.startswith(("Is there a", "Can you see a")):
                what = question.text.rstrip("?").removeprefix("Is there ")
                words = what.removeprefix("Can you see ").split()[1:]
                there = any(set(words) <= set(name.split()) for name in names)
                assert question.answer == ("Yes." if there else "No.")
    assert set(kinds) == set(KINDS)
    assert len(kinds) > 7 * 40


def test_the_same_seed_gives_the_same_bytes(album: Path, tmp_path: Path) -> None:
    write_album(tmp_path / "again", SCENES, seed=3)
    write_album(tmp_path / "other", SCENES, seed=4)
    assert contents(tmp_path / "again") == contents(album)
    assert not set(contents(tmp_path / "other").values()) & set(contents(album).values())


@pytest.mark.parametrize("seed", [0, HELD_OUT])
def test_no_held_out_scene_is_in_it(seed: int) -> None:
    held_out = {held_out_scene(index)[0] for index in range(150)}
    assert not held_out & {album_scene(seed, index)[0] for index in range(150)}


def test_an_older_album_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    write_album(tmp_path / "album", 2, seed=0)
    write_album(tmp_path / "album", 1, seed=0)
    assert sorted(contents(tmp_path / "album")) == [".album.json", QUESTIONS, "scene-00000.png"]
    (tmp_path / "album" / "mine.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"expected a folder of scenes.*found another folder"):
        write_album(tmp_path / "album", 1, seed=0)
    assert (tmp_path / "album" / "mine.png").read_bytes() == b"mine"
    (tmp_path / "album" / "mine.png").unlink()
    (tmp_path / "album" / QUESTIONS).write_text("mine")
    with pytest.raises(OutputError, match=f"{QUESTIONS} in it is not as himix-edge drew it"):
        write_album(tmp_path / "album", 1, seed=0)


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_album(tmp_path / "album", 3, 0, interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (-1, 0), (1, -1)])
def test_no_scenes_and_no_such_seed_are_refused(tmp_path: Path, count: int, seed: int) -> None:
    with pytest.raises(ConfigError, match=f"found {count} of seed {seed}"):
        write_album(tmp_path / "album", count, seed)
