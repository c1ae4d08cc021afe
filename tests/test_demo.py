"""The built-in demo model: what it promises in its card, and that its bundle keeps it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from safetensors import safe_open

from himix_edge import bundles, evaluation
from himix_edge.config import HiMixConfig
from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH, FileRecord, Manifest
from himix_edge.export.bundle import export_bundle
from himix_edge.export.expected import Array
from himix_edge.export.onnx import decoder_onnx_from_weights, vision_onnx_from_weights, write_graph
from himix_edge.export.rewrites import native_decoder, native_vision
from himix_edge.export.sessions import DecoderSession, VisionSession
from himix_edge.export.verify import Closeness
from himix_edge.models.checkpoints import read_checkpoint
from himix_edge.runtimes import Model
from himix_edge.runtimes.generate import generate
from himix_edge.runtimes.preprocess import pixel_values
from himix_edge.runtimes.tokenizer import Tokenizer
from himix_edge.shapes.benchmark import held_out_scene
from himix_edge.shapes.questions import KINDS, Question
from himix_edge.shapes.render import render
from himix_edge.training.recipe import SHAPES
from tests.tolerances import HALF_KV_COSINE

SCENES_COMPARED = 200
SCENES_PER_DIALECT = 12
PROMISED_KIND, PROMISED_ALL = 0.8, 0.9


@pytest.fixture(scope="module")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "bundle"
    export_bundle(read_checkpoint(bundles.DEMO_CHECKPOINT), folder)
    return folder


def greedy_tokens(model: Model, number: int, question: Question) -> list[int]:
    """The tokens that the model answers with, the end token left out."""
    scene, _ = held_out_scene(number)
    text = model.tokenizer.encode_turn(model.tokenizer.chat.first, question.text)
    cache = model.engine.open(model.encode(render(scene)).kv)
    end = model.manifest.config.decoder.eos_token_ids
    return list(
        generate(model.engine, cache, text, lambda logits, _: int(logits.argmax()), end, 64)
    )


def test_the_weights_are_small_half_precision_and_of_the_recipe() -> None:
    checkpoint = read_checkpoint(bundles.DEMO_CHECKPOINT)
    assert checkpoint.config == SHAPES.config
    weights = bundles.DEMO_CHECKPOINT / "model.safetensors"
    assert weights.stat().st_size <= 25_000_000
    assert checkpoint.files == {weights: FileRecord.of(weights)}
    with safe_open(weights, framework="np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118


def test_the_card_keeps_the_targets() -> None:
    card = read_checkpoint(bundles.DEMO_CHECKPOINT).model_card
    rows = re.findall(r"^\| (\w+) \| (\d+) \| ([\d.]+)% \| ([\d.]+)% \|$", card, re.MULTILINE)
    accuracy = {kind: float(share) / 100 for kind, _, share, _ in rows}
    assert set(accuracy) == {*KINDS, "all"}
    assert min(accuracy.values()) >= PROMISED_KIND
    assert accuracy["all"] >= PROMISED_ALL
    assert all(float(share) > float(chance) + 20 for _, _, share, chance in rows)


@pytest.mark.slow
def test_the_bundle_and_torch_choose_the_same_tokens(demo_bundle: Path) -> None:
    bundle = evaluation.opened(demo_bundle)
    torch = evaluation.opened(bundles.DEMO_CHECKPOINT)
    for number in range(SCENES_COMPARED):
        questions = held_out_scene(number)[1]
        question = questions[number % len(questions)]
        expected = greedy_tokens(torch, number, question)
        assert greedy_tokens(bundle, number, question) == expected, (number, question.text)


@pytest.mark.slow
def test_the_bundle_answers_as_well_as_its_card_says(demo_bundle: Path) -> None:
    result = evaluation.evaluate(demo_bundle, 100, None, lambda *_: None)
    by = {score.kind: score for score in result.scores}
    assert by["all"].accuracy >= PROMISED_ALL
    for kind in KINDS:
        deviation = 3 * np.sqrt(PROMISED_KIND * (1 - PROMISED_KIND) / by[kind].asked)
        assert by[kind].accuracy >= PROMISED_KIND - deviation


@pytest.mark.slow
def test_all_dialects_and_types_answer_alike(demo_bundle: Path, tmp_path: Path) -> None:
    """Portable and native, float32 and float16: the same tokens, and nearly the same cache."""
    checkpoint = read_checkpoint(bundles.DEMO_CHECKPOINT)
    config, slots = checkpoint.config, checkpoint.config.vision.num_image_tokens + 100
    half = tmp_path / "portable-float16"
    half.mkdir()
    for name, make in (
        (VISION_GRAPH, vision_onnx_from_weights),
        (DECODER_GRAPH, decoder_onnx_from_weights),
    ):
        write_graph(make(config, checkpoint.weights, "float16"), half / name)
    folders = [demo_bundle, half]
    for portable in (demo_bundle, half):
        native = tmp_path / f"native-{portable.name}"
        native.mkdir()
        for name, rewrite in ((VISION_GRAPH, native_vision), (DECODER_GRAPH, native_decoder)):
            graph = onnx_ir.load(portable / name)
            rewrite(graph, config, slots)
            write_graph(graph, native / name)
        folders.append(native)

    tokenizer = Tokenizer.from_folder(demo_bundle, Manifest.read(demo_bundle).chat)
    asked = []
    for number in range(SCENES_PER_DIALECT):
        scene, questions = held_out_scene(number)
        pixels = pixel_values(render(scene), config.preprocess)
        asked.append((pixels, tokenizer.encode_turn(tokenizer.chat.first, questions[0].text)))
    (caches, answers), *others = [greedy_answers(folder, config, asked) for folder in folders]
    assert sum(len(tokens) for tokens in answers) > 5 * SCENES_PER_DIALECT
    for other_caches, other_answers in others:
        assert other_answers == answers
        for cache, expected in zip(other_caches, caches, strict=True):
            for part, exact in zip(cache, expected, strict=True):
                assert Closeness.of(part, exact).cosine >= HALF_KV_COSINE


def greedy_answers(
    folder: Path, config: HiMixConfig, asked: Sequence[tuple[Array, list[int]]]
) -> tuple[list[list[Array]], list[list[int]]]:
    """Each image's keys and values, and each answer's tokens up to an end token."""
    vision = VisionSession(folder / VISION_GRAPH, config)
    decoder = DecoderSession(folder / DECODER_GRAPH, config)
    caches = [vision.encode(pixels) for pixels, _ in asked]
    answers = []
    for cache, (_, prompt) in zip(caches, asked, strict=True):
        logits, past = decoder.step(np.array([prompt]), cache)
        tokens = [int(logits.argmax())]
        while tokens[-1] not in config.decoder.eos_token_ids and len(tokens) < 60:
            logits, past = decoder.step(np.array([tokens[-1:]]), past)
            tokens.append(int(logits.argmax()))
        answers.append(tokens)
    return caches, answers
