"""Questions about a scene in plain English, and their right answers.

Every question has one right answer, a sentence. What is a matter of opinion is never asked: "left
of" only where the two centres lie clearly apart, a name only where it fits one object.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from himix_edge.shapes.scenes import COLOURS, MAX_OBJECTS, SHAPES, SIZES, Scene, SceneObject

Item = TypeVar("Item")

NUMBERS = ("None", "One", "Two", "Three", "Four")
CLEARLY_APART = 0.1  # of the image's width, between two centres, for one to be beside the other
PLURALS = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}

# How much further a is in the named direction than b.
DIRECTIONS: dict[str, Callable[[SceneObject, SceneObject], float]] = {
    "to the left of": lambda a, b: b.x - a.x,
    "to the right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}
FARTHEST = {
    "furthest to the left": "to the left of",
    "furthest to the right": "to the right of",
    "at the top": "above",
    "at the bottom": "below",
}


@dataclass(frozen=True)
class Question:
    """One question and its right answer.

    Attributes:
        choices: how many answers are possible to someone who has not seen the scene.
    """

    kind: str
    text: str
    answer: str
    choices: int


def ask(kind: str, scene: Scene, rng: np.random.Generator) -> Question | None:
    """A random question of a kind about a scene; None where the scene has no such question."""
    return KINDS[kind](scene, rng)


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer is right.

    A description may name the objects in any order, but must name the size, colour and shape of
    every one, and nothing else. Any other answer must be the right one, word for word.
    """
    if question.kind == "describe":
        return _objects_named(answer) == _objects_named(question.answer) is not None
    return _words(answer) == _words(question.answer)


def _describe(scene: Scene, rng: np.random.Generator) -> Question:
    text = _any_of(rng, DESCRIBE_TEXTS)
    pairs = len(COLOURS) * len(SHAPES)
    choices = sum(math.comb(pairs, n) * len(SIZES) ** n for n in range(1, MAX_OBJECTS + 1))
    return Question("describe", text, description(scene), choices)


def description(scene: Scene) -> str:
    """ "A large red circle, a small blue star and a small red ring.", from left to right."""
    names = [f"a {item.full_name}" for item in scene.objects]
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
    return f"A{listed[1:]}."


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    """All objects, or those of a colour, shape or size; any number that occurs is as likely."""
    counts = {"objects": len(scene.objects)}
    for size in SIZES:
        counts[f"{size} objects"] = sum(item.size == size for item in scene.objects)
    for colour in COLOURS:
        counts[f"{colour} objects"] = sum(item.colour == colour for item in scene.objects)
    for shape in SHAPES:
        counts[PLURALS[shape]] = sum(item.shape == shape for item in scene.objects)
    number = _any_of(rng, sorted(set(counts.values())))
    what = _any_of(rng, [what for what, count in counts.items() if count == number])
    text = _any_of(rng, ("How many {what} are there?", "How many {what} can you see?"))
    return Question("count", text.format(what=what), f"{NUMBERS[number]}.", len(NUMBERS))


def _colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    named = _named_by_one(scene, ("shape", "size shape"))
    if not named:
        return None
    name, item = named[rng.integers(len(named))]
    text = _any_of(rng, ("What colour is the {name}?", "What color is the {name}?"))
    return Question("colour", text.format(name=name), f"The {name} is {item.colour}.", len(COLOURS))


def _exists(scene: Scene, rng: np.random.Generator) -> Question:
    """As often true as not; what is not there often shares its colour or its shape with what is."""
    wanted = rng.random() < 0.5
    present = {item.name for item in scene.objects}
    while True:
        a, b = (scene.objects[i] for i in rng.integers(len(scene.objects), size=2))
        colour = a.colour if rng.random() < 0.7 else _any_of(rng, tuple(COLOURS))
        shape = b.shape if rng.random() < 0.7 else _any_of(rng, SHAPES)
        if rng.random() < 0.25:
            what, found = f"a {shape}", any(item.shape == shape for item in scene.objects)
        else:
            what, found = f"a {colour} {shape}", f"{colour} {shape}" in present
        if found == wanted:
            text = _any_of(rng, ("Is there {what}?", "Can you see {what}?"))
            article = what.replace("a orange", "an orange")
            return Question("exists", text.format(what=article), _yes_or_no(found), 2)


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    pairs = [
        (a, direction, b, further > 0)
        for a in scene.objects
        for b in scene.objects
        for direction, distance in DIRECTIONS.items()
        if abs(further := distance(a, b)) >= CLEARLY_APART
    ]
    wanted = rng.random() < 0.5
    pairs = [pair for pair in pairs if pair[3] == wanted]
    if not pairs:
        return None
    a, direction, b, true = pairs[rng.integers(len(pairs))]
    return Question("relation", f"Is the {a.name} {direction} the {b.name}?", _yes_or_no(true), 2)


def _which(scene: Scene, rng: np.random.Generator) -> Question | None:
    """By a trait that one object alone has, by its place, or by its place beside another object."""
    found = [(f"is {name}", item) for name, item in _named_by_one(scene, ("colour", "size"))]
    for direction, distance in DIRECTIONS.items():
        for b in scene.objects:
            others = [(item, distance(item, b)) for item in scene.objects if item is not b]
            beside = [item for item, further in others if further >= CLEARLY_APART]
            clear = all(abs(further) >= CLEARLY_APART for _, further in others)
            if clear and len(beside) == 1:
                found.append((f"is {direction} the {b.name}", beside[0]))
    for place, direction in FARTHEST.items():
        for a in scene.objects:
            ahead = [DIRECTIONS[direction](a, b) for b in scene.objects if b is not a]
            if ahead and min(ahead) >= CLEARLY_APART:
                found.append((f"is {place}", a))
    if not found:
        return None
    trait, item = found[rng.integers(len(found))]
    choices = len(COLOURS) * len(SHAPES)
    return Question("which", f"Which object {trait}?", f"The {item.name}.", choices)


KINDS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "describe": _describe,
    "count": _count,
    "colour": _colour,
    "exists": _exists,
    "relation": _relation,
    "which": _which,
}
DESCRIBE_TEXTS = (
    "describe",
    "Describe the picture.",
    "Describe this image.",
    "What is in the picture?",
    "What do you see?",
)


def _named_by_one(scene: Scene, traits: Sequence[str]) -> list[tuple[str, SceneObject]]:
    """Names made of the given traits ("size shape" is both) that fit one object alone."""
    named = []
    for trait in traits:
        names = [" ".join(getattr(item, t) for t in trait.split()) for item in scene.objects]
        named += [
            (name, item)
            for name, item in zip(names, scene.objects, strict=True)
            if names.count(name) == 1
        ]
    return named


def _any_of(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.integers(len(items)))]


def _yes_or_no(value: bool) -> str:
    return "Yes." if value else "No."


def _words(sentence: str) -> list[str]:
    return sentence.lower().replace(",", " ").replace(".", " ").split()


def _objects_named(sentence: str) -> list[tuple[str, ...]] | None:
    """The (size, colour, shape) triples that a description lists, sorted; None if it holds more."""
    words = [word for word in _words(sentence) if word not in ("a", "an", "and")]
    triples = [tuple(words[i : i + 3]) for i in range(0, len(words), 3)]
    known = all(
        len(triple) == 3 and triple[0] in SIZES and triple[1] in COLOURS and triple[2] in SHAPES
        for triple in triples
    )
    return sorted(triples) if known and triples else None
