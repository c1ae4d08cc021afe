from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from himix_edge.shapes.benchmark import Exchange, Score, exchanges, held_out_scene, scores
from himix_edge.shapes.questions import KINDS, Question
from himix_edge.shapes.render import render

SCENES = 60


def asked_by(answer: str) -> list[Exchange]:
    """What comes of always giving the same answer."""

    def answerer(_: Image.Image, questions: Sequence[str]) -> list[str]:
        return [answer] * len(questions)

    return [exchange for batch in exchanges(answerer, SCENES) for exchange in batch]


def by_kind(asked: list[Exchange]) -> dict[str, Score]:
    return {score.kind: score for score in scores(asked)}


def test_the_held_out_scenes_are_always_the_same() -> None:
    assert held_out_scene(3) == held_out_scene(3)
    assert held_out_scene(3) != held_out_scene(4)
    assert [q.kind for q in held_out_scene(3)[1]] == [
        kind for kind in KINDS if kind in {q.kind for q in held_out_scene(3)[1]}
    ]


def test_the_answerer_sees_the_scenes_picture_and_questions() -> None:
    seen: list[tuple[Image.Image, Sequence[str]]] = []

    def answerer(picture: Image.Image, questions: Sequence[str]) -> list[str]:
        seen.append((picture, questions))
        return [question.answer for question in held_out_scene(len(seen) - 1)[1]]

    asked = [exchange for batch in exchanges(answerer, SCENES) for exchange in batch]
    assert len(seen) == SCENES
    for index, (picture, questions) in enumerate(seen):
        scene, expected = held_out_scene(index)
        assert np.array_equal(np.asarray(picture), np.asarray(render(scene)))
        assert list(questions) == [question.text for question in expected]
    assert all(score.accuracy == 1.0 for score in scores(asked))


def test_an_answer_that_is_always_yes_is_right_only_by_chance() -> None:
    by = by_kind(asked_by("Yes."))
    for kind in ("describe", "count", "colour", "which"):
        assert by[kind].right == 0
    for kind in ("exists", "relation"):
        assert 0.3 < by[kind].accuracy < 0.7
        assert by[kind].accuracy <= by[kind].chance
    assert by["all"].right == sum(by[kind].right for kind in KINDS)
    assert by["all"].asked == sum(by[kind].asked for kind in KINDS)


def test_chance_is_the_better_of_guessing_and_the_commonest_answer() -> None:
    def exchange(answer: str, choices: int) -> Exchange:
        return Exchange(0, Question("count", "?", answer, choices), "")

    guessing = scores([exchange("One.", 2), exchange("Two.", 2), exchange("Three.", 2)])
    assert guessing[1].asked == 3
    assert guessing[1].chance == pytest.approx(0.5)
    commonest = scores([exchange("One.", 5), exchange("One.", 5), exchange("Three.", 5)])
    assert commonest[1].chance == pytest.approx(2 / 3)


def test_no_questions_no_accuracy() -> None:
    assert all(score.accuracy == 0 for score in scores([]))
