"""How well anything that answers questions about pictures knows the shapes world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from himix_edge.shapes.questions import KINDS, Question, ask, is_right
from himix_edge.shapes.render import render
from himix_edge.shapes.scenes import Scene, random_scene

NOTICE = (
    "It knows only its own world, one to four plain shapes on a plain ground "
    "(draw one with: himix-edge scene); of any other picture it talks nonsense."
)
HELD_OUT = 20_000_003  # the seed of all held-out scenes; no training batch is drawn from it
Answerer = Callable[[Image.Image, Sequence[str]], Sequence[str]]  # a picture, questions -> answers


@dataclass(frozen=True)
class Score:
    """How many questions of a kind were answered right.

    Attributes:
        chance: the share that could be got right without looking: by guessing among the answers
            that a question leaves open or by always giving the commonest, whichever is better.
    """

    kind: str
    asked: int
    right: int
    chance: float

    @property
    def accuracy(self) -> float:
        return self.right / self.asked if self.asked else 0.0


@dataclass(frozen=True)
class Exchange:
    """One question about one held-out scene, and what was answered."""

    scene: int
    question: Question
    answer: str

    @property
    def right(self) -> bool:
        return is_right(self.question, self.answer)


def held_out_scene(index: int) -> tuple[Scene, list[Question]]:
    """The held-out scene of that number, with one question of every kind that it allows."""
    rng = np.random.default_rng([HELD_OUT, index])
    scene = random_scene(rng)
    asked = (ask(kind, scene, rng) for kind in KINDS)
    return scene, [question for question in asked if question is not None]


def exchanges(answerer: Answerer, scenes: int) -> Iterator[list[Exchange]]:
    """Asks everything about the first held-out scenes, scene by scene."""
    for index in range(scenes):
        scene, questions = held_out_scene(index)
        answers = answerer(render(scene), [question.text for question in questions])
        yield [
            Exchange(index, question, answer)
            for question, answer in zip(questions, answers, strict=True)
        ]


def scores(asked: Sequence[Exchange]) -> list[Score]:
    """One score for each kind of question, then one for all, named "all"."""
    each = [_score(kind, [e for e in asked if e.question.kind == kind]) for kind in KINDS]
    total = sum(score.asked for score in each)
    chance = sum(score.chance * score.asked for score in each) / total if total else 0.0
    return [*each, Score("all", total, sum(score.right for score in each), chance)]


def _score(kind: str, asked: Sequence[Exchange]) -> Score:
    if not asked:
        return Score(kind, 0, 0, 0.0)
    guessed = sum(1 / exchange.question.choices for exchange in asked) / len(asked)
    [(_, commonest)] = Counter(exchange.question.answer for exchange in asked).most_common(1)
    chance = max(guessed, commonest / len(asked))
    return Score(kind, len(asked), sum(exchange.right for exchange in asked), chance)
