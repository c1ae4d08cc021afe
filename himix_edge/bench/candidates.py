"""What is timed in a round: from a picture's file to tokens, as HiMix and as a vanilla model.

Vanilla is the same pair without HiMix: the same vision graph, then all N + M tokens through the
same decoder graph on an empty cache. To a decoder one token is as good as another, so ordinary ids
stand in the image's place; no second export is needed, and neither side gets other kernels. What a
vanilla model would do besides is left out in its favour: its connector.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from himix_edge.errors import ConfigError, PromptError
from himix_edge.runtimes.base import Engine, FloatArray, IntArray
from himix_edge.runtimes.kvcache import Cache
from himix_edge.runtimes.model import Model
from himix_edge.runtimes.preprocess import load_image, pixel_values

Candidate = Literal["himix", "vanilla"]
CANDIDATES: tuple[Candidate, ...] = get_args(Candidate)
LONG = 512  # text tokens of a long context
DECODED = 16  # tokens that a rate is measured over
TEXT = "Describe the picture: every object in it, its colour and size, and where it stands. "


@dataclass(frozen=True)
class Plan:
    """What each candidate goes through.

    Attributes:
        ids: as many token ids as any step needs.
        text: M.
        long: text tokens of the long context; None where the positions don't suffice for one.
        vanilla: whether it is timed too.
    """

    ids: list[int]
    text: int
    long: int | None
    vanilla: bool

    def tokens(self, count: int) -> IntArray:
        """The first `count` of them, [1, count]"""
        return np.array([self.ids[:count]], np.int64)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate in one round.

    Attributes:
        preprocess: the picture's file to pixels.
        encode: the vision graph, projections included.
        prefill: a cache that begins with the image, the prompt through the decoder, and the choice
            of the first token.
        first_token: all of these, by one clock.
        first_decode: the second token.
        short, long: a later token, on average, after M text tokens and after `Plan.long`.
    """

    preprocess: float
    encode: float
    prefill: float
    first_token: float
    first_decode: float
    short: float
    long: float | None


def plan_for(model: Model, text: int, *, vanilla: bool) -> Plan:
    """Checks that everything fits into the model's positions and the engine's cache.

    Raises:
        ConfigError: less than one text token.
        PromptError: more than fit.
    """
    if text < 1:
        raise ConfigError("text is out of range", expected="1 or more tokens", found=str(text))
    images = model.manifest.config.image_slots
    slots = model.engine.open(None).capacity  # without an image
    room = slots - (images if vanilla else 0)
    if model.manifest.cache_slots is not None:
        room = min(room, slots - images)
    most = room - 1 - DECODED
    if text > most:
        raise PromptError(
            f"{text} text tokens are too many" + (" for the vanilla model" if vanilla else ""),
            expected=f"at most {most}, with {1 + DECODED} for the answer"
            + (f" and {images} for the image" if vanilla else ""),
            found=str(text),
            fix="give a smaller --text" + (", or leave out --vs" if vanilla else ""),
        )
    long = min(LONG, room - DECODED)
    told = long > text + 1 + DECODED
    return Plan(token_ids(model, images + max(text, LONG)), text, long if told else None, vanilla)


def token_ids(model: Model, count: int) -> list[int]:
    """Exactly so many, of a fixed text within the chat template."""
    chat = model.tokenizer.chat
    ids = model.tokenizer.encode_turn(chat.first, TEXT)
    return (ids * (1 + count // len(ids)))[:count]


@dataclass
class Answer:
    """A conversation as far as its first token.

    Attributes:
        seconds: the clock at the start, after preprocessing, after the vision graph, and at the
            first token.
    """

    cache: Cache
    token: IntArray
    seconds: tuple[float, float, float, float]


def first_token(model: Model, picture: Path, ids: IntArray, candidate: Candidate) -> Answer:
    """From the file on: the image's keys and values, then the ids; for vanilla the encoder first.

    Args:
        ids: [1, M], for vanilla [1, N + M].
    """
    began = time.perf_counter()
    pixels = pixel_values(load_image(picture), model.manifest.config.preprocess)
    seen = time.perf_counter()
    image = model.engine.encode(pixels)
    image.wait()
    encoded = time.perf_counter()
    cache = model.engine.open(image if candidate == "himix" else None)
    token = _likeliest(model.engine.prefill(ids, cache))
    return Answer(cache, token, (began, seen, encoded, time.perf_counter()))


def run(model: Model, picture: Path, plan: Plan, candidate: Candidate) -> Timing:
    """One candidate's turn."""
    engine, images = model.engine, model.manifest.config.image_slots
    prompt = plan.tokens(plan.text + (images if candidate == "vanilla" else 0))
    answer = first_token(model, picture, prompt, candidate)
    began, seen, encoded, first = answer.seconds
    cache, token = answer.cache, answer.token
    token = _likeliest(engine.step(token, cache))
    second = time.perf_counter()
    short, long = _decode(engine, cache, token), None
    if plan.long is not None:
        engine.prefill(plan.tokens(images + plan.long - cache.length), cache)
        long = _decode(engine, cache, token)
    return Timing(
        preprocess=1e3 * (seen - began),
        encode=1e3 * (encoded - seen),
        prefill=1e3 * (first - encoded),
        first_token=1e3 * (first - began),
        first_decode=1e3 * (second - first),
        short=short,
        long=long,
    )


def run_text_only(engine: Engine, plan: Plan) -> float:
    """Milliseconds of M tokens with no image before them, on an empty cache."""
    start = time.perf_counter()
    _likeliest(engine.prefill(plan.tokens(plan.text), engine.open(None)))
    return 1e3 * (time.perf_counter() - start)


def _decode(engine: Engine, cache: Cache, token: IntArray) -> float:
    """Milliseconds a token, the choice of the next one included."""
    start = time.perf_counter()
    for _ in range(DECODED):
        token = _likeliest(engine.step(token, cache))
    return 1e3 * (time.perf_counter() - start) / DECODED


def _likeliest(logits: FloatArray) -> IntArray:
    """[1, V] -> [1, 1]"""
    token: IntArray = logits.argmax(-1)[:, None]
    return token
