"""The built-in demo model: what it promises in its card, and that its bundle keeps it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from himix_edge import bundles, evaluation
from himix_edge.contract import FileRecord
from himix_edge.export.bundle import export_bundle
from himix_edge.models.checkpoints import read_checkpoint
from himix_edge.runtimes import Model
from himix_edge.runtimes.generate import generate
from himix_edge.shapes.benchmark import held_out_scene
from himix_edge.shapes.questions import KINDS, Question
from himix_edge.shapes.render import render
from himix_edge.training.recipe import SHAPES

SCENES_COMPARED = 200
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
        for question in (questions[0], questions[1 + number % (len(questions) - 1)]):
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
