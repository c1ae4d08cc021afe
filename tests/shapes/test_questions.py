"""Every answer is checked against a second reader of the question, written from docs/shapes.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from himix_edge.shapes.questions import KINDS, Question, ask, description, is_right
from himix_edge.shapes.scenes import COLOURS, SHAPES, Scene, SceneObject, random_scene

COUNT_WORDS = ["None.", "One.", "Two.", "Three.", "Four."]
FURTHER: dict[str, Callable[[SceneObject], float]] = {
    "to the left of": lambda item: -item.x,
    "to the right of": lambda item: item.x,
    "above": lambda item: -item.y,
    "below": lambda item: item.y,
    "furthest to the left": lambda item: -item.x,
    "furthest to the right": lambda item: item.x,
    "at the top": lambda item: -item.y,
    "at the bottom": lambda item: item.y,
}


def asked(kind: str, scenes: int = 400) -> Iterator[tuple[Scene, Question]]:
    rng = np.random.default_rng(11)
    for _ in range(scenes):
        scene = random_scene(rng)
        if question := ask(kind, scene, rng):
            assert question.kind == kind
            yield scene, question


def fits(item: SceneObject, words: str) -> bool:
    """Whether an object is what the words say: "small red circle", "crosses", "red objects"."""
    singular = {"crosses": "cross", **{f"{shape}s": shape for shape in SHAPES if shape != "cross"}}
    traits = {item.size, item.colour, item.shape, "objects"}
    return {singular.get(word, word) for word in words.split()} <= traits


def only(scene: Scene, words: str) -> SceneObject:
    found = [item for item in scene.objects if fits(item, words)]
    assert len(found) == 1, words
    return found[0]


def test_descriptions_name_everything_from_left_to_right() -> None:
    for scene, question in asked("describe"):
        triples = re.findall(r"(small|large) (\w+) (\w+)", question.answer)
        expected = sorted(scene.objects, key=lambda item: item.x)
        assert triples == [(item.size, item.colour, item.shape) for item in expected]
        assert question.answer[:2] == "A "
        assert question.answer[-1] == "."
        assert question.answer.count(" and ") == (1 if len(expected) > 1 else 0)


def test_counts() -> None:
    answers = Counter[str]()
    for scene, question in asked("count"):
        [words] = re.fullmatch(r"How many (.+) (?:are there|can you see)\?", question.text).groups()  # type: ignore[union-attr]
        number = sum(fits(item, words) for item in scene.objects)
        assert question.answer == COUNT_WORDS[number]
        answers[question.answer] += 1
    assert set(answers) == set(COUNT_WORDS)
    assert max(answers.values()) < 0.5 * answers.total()  # no answer is right most of the time


def test_colours() -> None:
    for scene, question in asked("colour"):
        [words] = re.fullmatch(r"What colou?r is the (.+)\?", question.text).groups()  # type: ignore[union-attr]
        assert question.answer == f"The {words} is {only(scene, words).colour}."


def test_existence_and_its_balance() -> None:
    answers = Counter[str]()
    for scene, question in asked("exists"):
        [words] = re.fullmatch(r"(?:Is there|Can you see) an? (.+)\?", question.text).groups()  # type: ignore[union-attr]
        assert question.answer == (
            "Yes." if any(fits(item, words) for item in scene.objects) else "No."
        )
        assert ("an orange" in question.text) == (words.startswith("orange"))
        answers[question.answer] += 1
    assert 0.4 < answers["Yes."] / answers.total() < 0.6


def test_relations_and_their_balance() -> None:
    answers = Counter[tuple[str, str]]()
    for scene, question in asked("relation"):
        match = re.fullmatch(
            r"Is the (\w+ \w+) (to the left of|to the right of|above|below) the (\w+ \w+)\?",
            question.text,
        )
        assert match
        first, direction, second = match.groups()
        further = FURTHER[direction](only(scene, first)) - FURTHER[direction](only(scene, second))
        assert abs(further) >= 0.1
        assert question.answer == ("Yes." if further > 0 else "No.")
        answers[direction, question.answer] += 1
    assert len(answers) == 8
    yes = sum(number for (_, answer), number in answers.items() if answer == "Yes.")
    assert 0.4 < yes / answers.total() < 0.6


def test_which_object_has_one_clear_answer() -> None:
    forms = Counter[str]()
    for scene, question in asked("which"):
        trait = question.text.removeprefix("Which object is ").removesuffix("?")
        place, _, other = trait.partition(" the ") if " of the " in trait else (trait, "", "")
        beside = re.fullmatch(r"(to the left of|to the right of|above|below) the (.+)", trait)
        if beside:
            direction, name = beside.groups()
            other_object = only(scene, name)
            ahead = [
                item
                for item in scene.objects
                if FURTHER[direction](item) - FURTHER[direction](other_object) >= 0.1
            ]
            forms[direction] += 1
        elif trait in FURTHER:
            ranked = sorted(scene.objects, key=FURTHER[trait], reverse=True)
            assert FURTHER[trait](ranked[0]) - FURTHER[trait](ranked[1]) >= 0.1
            ahead = ranked[:1]
            forms[trait] += 1
        else:
            ahead = [only(scene, trait)]
            forms["trait"] += 1
        assert [f"The {item.name}." for item in ahead] == [question.answer], (place, other)
    assert set(forms) == {*FURTHER, "trait"}


def test_every_kind_can_be_asked_of_a_scene_with_several_objects() -> None:
    rng = np.random.default_rng(2)
    scene = next(s for s in iter(lambda: random_scene(rng), None) if len(s.objects) == 3)
    assert all(ask(kind, scene, rng) for kind in ("describe", "count", "exists", "relation"))


def test_choices_are_what_an_answer_could_be() -> None:
    choices = {kind: next(asked(kind))[1].choices for kind in KINDS}
    assert choices["relation"] == choices["exists"] == 2
    assert choices["count"] == 5
    assert choices["colour"] == len(COLOURS)
    assert choices["which"] == len(COLOURS) * len(SHAPES)
    # One to four of 96 kinds of object, no two of one colour and shape.
    assert choices["describe"] == 96 + 96 * 94 // 2 + 96 * 94 * 92 // 6 + 96 * 94 * 92 * 90 // 24


TWO = Question("describe", "describe", "A large red circle and a small blue star.", 1)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("A large red circle and a small blue star.", True),
        ("A small blue star and a large red circle.", True),  # any order
        ("a small blue star, a large red circle", True),
        ("A large red circle.", False),  # one is missing
        ("A large red circle and a small blue star and a small red ring.", False),
        ("A large red circle, a large red circle and a small blue star.", False),  # one twice
        ("A small red circle and a small blue star.", False),  # a wrong size
        ("A large blue circle and a small red star.", False),  # colours swapped
        ("A large red circle and a small blue star on a table.", False),  # something else
        ("A red circle and a blue star.", False),  # no sizes
        ("", False),
        ("Yes.", False),
    ],
)
def test_a_description_is_right_if_it_names_everything_and_nothing_else(
    answer: str, right: bool
) -> None:
    assert is_right(TWO, answer) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Yes.", True), ("yes", True), ("No.", False), ("Yes. Yes.", False), ("", False)],
)
def test_other_answers_are_right_word_for_word(answer: str, right: bool) -> None:
    assert is_right(Question("exists", "Is there a star?", "Yes.", 2), answer) is right


def test_the_description_of_a_scene_is_right_about_it() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        scene = random_scene(rng)
        question = ask("describe", scene, rng)
        assert question
        assert is_right(question, description(scene))
