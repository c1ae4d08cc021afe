"""An answer hangs on the picture and the conversation alone, in every quantization for CPUs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import himix_edge
from himix_edge import bundles
from himix_edge.bundle.files import BundleFiles
from himix_edge.contract import VISION_GRAPH, Manifest
from himix_edge.export.bundle import export_bundle
from himix_edge.export.quantized_bundle import quantize_bundle
from himix_edge.export.recipes import WeightChoice
from himix_edge.export.sessions import VisionSession, packed_session
from himix_edge.models.checkpoints import read_checkpoint
from himix_edge.runtimes.base import VisionKV
from himix_edge.runtimes.kvcache import Cache
from himix_edge.runtimes.ort import OrtEngine
from himix_edge.shapes.benchmark import held_out_scene
from himix_edge.shapes.render import render

Array = NDArray[np.float32]
PROMPT: list[int] = np.random.default_rng(5).integers(3, 250, 30).tolist()
TOKENS = 12
SCENES = 25  # of about six questions each
CHOICES = {
    "vision int8": WeightChoice("int8"),
    "int8": WeightChoice("int8", "int8"),
    "int8, head int4": WeightChoice("int8", "int8", head="int4"),
    "int4": WeightChoice("int8", "int4"),
    "int4, head int4": WeightChoice("int8", "int4", head="int4"),
    "int4, prompts int8": WeightChoice("int8", "int4", prefill="int8"),
}


@pytest.fixture(scope="module", params=CHOICES)
def quantized(
    request: pytest.FixtureRequest, ort_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "bundle"
    quantize_bundle(ort_bundle, folder, CHOICES[request.param])
    return folder


@pytest.fixture
def engine(quantized: Path) -> OrtEngine:
    return OrtEngine(BundleFiles.open(quantized), threads=1)


def pixels(seed: int, batch: int = 1) -> Array:
    return np.random.default_rng(seed).normal(size=(batch, 3, 28, 28)).astype(np.float32)


def fed(engine: OrtEngine, cache: Cache, ids: Sequence[int], part: int) -> Array:
    """The logits after a prompt that comes in parts of at most so many tokens."""
    for first in range(0, len(ids), part):
        logits = engine.prefill(np.array([ids[first : first + part]]), cache)
    return logits


def answered(
    engine: OrtEngine, cache: Cache, logits: Array, end: Sequence[int] = (), step: int = 0
) -> list[int]:
    """The likeliest token, then the one that is `step` places behind it, and so on."""
    tokens = [int(logits[0].argmax())]
    while len(tokens) < TOKENS and tokens[-1] not in end:
        logits = engine.step(np.array([tokens[-1:]]), cache)
        tokens.append(int(np.argsort(-logits[0], kind="stable")[step * len(tokens)]))
    return tokens


def varied(engine: OrtEngine, cache: Cache, logits: Array) -> list[int]:
    """As a random model with a tied head finds one token the likeliest for ever."""
    return answered(engine, cache, logits, step=1)


def filled(cache: Cache) -> list[Array]:
    return [tensor.numpy()[:, :, : cache.length].copy() for tensor in cache.tensors]


def ways(engine: OrtEngine, kv: VisionKV, ids: list[int], other: list[int]) -> Iterator[Cache]:
    """Caches about an image that go on to a prompt from what another has left of them."""
    cache = engine.open(kv)
    answered(engine, cache, fed(engine, cache, other, len(other)))
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids[:-2], other, strict=False))
    shared = min(len(list(pairs)), cache.reusable)
    yield engine.branch(cache, shared)
    engine.rewind(cache, shared)
    yield cache


def test_a_prompt_is_the_same_however_it_comes(engine: OrtEngine) -> None:
    """In parts of 1, 7 and all tokens; after another that begins with 0, 5 or all but 2 of it."""
    kv = engine.encode(pixels(0))
    fresh = engine.open(kv)
    logits = fed(engine, fresh, PROMPT, len(PROMPT))
    expected = filled(fresh)
    tokens = varied(engine, fresh, logits)
    assert len(set(tokens)) > 1

    caches = [engine.open(kv) for _ in range(2)]
    parts = [fed(engine, cache, PROMPT, part) for cache, part in zip(caches, (7, 13), strict=True)]
    for shared in (0, 5, len(PROMPT) - 2):
        for cache in ways(engine, kv, PROMPT, [*PROMPT[:shared], 2, 2, 2, 2, 2, 2]):
            assert cache.text_length == shared
            parts.append(fed(engine, cache, PROMPT[shared:], len(PROMPT)))
            caches.append(cache)
    for cache, found in zip(caches, parts, strict=True):
        np.testing.assert_array_equal(found, logits)
        for tensor, same in zip(filled(cache), expected, strict=True):
            np.testing.assert_array_equal(tensor, same)
        assert varied(engine, cache, found) == tokens

    cache = engine.open(kv)  # kernels for a single token sum in another order
    assert varied(engine, cache, fed(engine, cache, PROMPT, 1)) == tokens


def test_a_turn_after_an_answer_is_the_same_as_one_begun_with_it(engine: OrtEngine) -> None:
    kv = engine.encode(pixels(1))
    cache = engine.open(kv)
    said = varied(engine, cache, fed(engine, cache, PROMPT, len(PROMPT)))
    whole = [*PROMPT, *said, *PROMPT[:9]]
    engine.rewind(cache, cache.reusable)
    logits = fed(engine, cache, whole[cache.text_length :], len(whole))
    fresh = engine.open(kv)
    expected = fed(engine, fresh, whole, len(whole))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    assert varied(engine, cache, logits) == varied(engine, fresh, expected)


def test_a_picture_is_the_same_among_others(quantized: Path) -> None:
    config = Manifest.read(quantized).config
    vision = VisionSession(quantized / VISION_GRAPH, config, packed_session)
    several = pixels(2, batch=3)
    several[1] *= 50
    together = vision.encode(several)
    for i in range(3):
        for tensor, alone in zip(together, vision.encode(several[i : i + 1]), strict=True):
            np.testing.assert_array_equal(tensor[i : i + 1], alone)


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_questions_about_scenes(demo: Path, tmp_path: Path, choice: str) -> None:
    """Each fresh, in parts of 1 and 7, and after the question before it."""
    quantize_bundle(demo, tmp_path / "bundle", CHOICES[choice])
    asked, different = differing_answers(tmp_path / "bundle", SCENES)
    assert asked > 100
    assert different == 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "bundle"
    export_bundle(read_checkpoint(bundles.DEMO_CHECKPOINT), folder, dialect="ort")
    return folder


def differing_answers(bundle: Path, scenes: int) -> tuple[int, int]:
    """How many questions about held-out scenes were asked, and how many answers differed."""
    model = himix_edge.load(bundle, device="cpu", threads=1)
    engine, end = model.engine, model.manifest.config.decoder.eos_token_ids
    assert isinstance(engine, OrtEngine)
    asked = different = 0
    for number in range(scenes):
        scene, questions = held_out_scene(number)
        kv = model.encode(render(scene)).kv
        turn = model.tokenizer.chat.first
        texts = [model.tokenizer.encode_turn(turn, question.text) for question in questions]
        for ids, other in zip(texts, [*texts[-1:], *texts[:-1]], strict=True):
            fresh = engine.open(kv)
            expected = answered(engine, fresh, fed(engine, fresh, ids, len(ids)), end)
            found = []
            for part in (1, 7):
                cache = engine.open(kv)
                found.append(answered(engine, cache, fed(engine, cache, ids, part), end))
            for cache in ways(engine, kv, ids, other):
                logits = fed(engine, cache, ids[cache.text_length :], len(ids))
                found.append(answered(engine, cache, logits, end))
            asked += 1
            different += any(tokens != expected for tokens in found)
    return asked, different
