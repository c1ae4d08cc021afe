"""What several tests of exports share: bundles and graphs, and what was asked of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from himix_edge.contract import DECODER_GRAPH
from himix_edge.export.bundle import export_bundle
from himix_edge.export.calibration import Feeds
from himix_edge.export.cost import CalibrationFeeds, Exchange, exchanges_from_graphs
from himix_edge.export.expected import Array, trial_images
from himix_edge.export.onnx import decoder_onnx_from_weights, write_graph
from himix_edge.export.sessions import packed_session
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.models.himix import HiMix
from himix_edge.models.weights import held_weights
from tests import tiny

PROMPTS = [[1, 40, 41, 42, 2], [1, 50, 2], [7, 8, 9, 10, 11, 12]]


class Exported(NamedTuple):
    checkpoint: Checkpoint
    folder: Path


class Traced(NamedTuple):
    model: HiMix
    decoder: Path  # its portable graph


def run(path: Path, *feeds: Feeds) -> list[dict[str, Array]]:
    """The outputs by name, for each of the inputs."""
    session = packed_session(path)
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, dict(f)), strict=True)) for f in feeds]


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Projections with biases, and a head with a matrix of its own."""
    config = tiny.tiny_config(attention_bias=True, tie_word_embeddings=False, rope_theta=1e6)
    model = tiny.tiny_model(config)
    path = tmp_path_factory.mktemp("qwen2") / DECODER_GRAPH
    write_graph(decoder_onnx_from_weights(config, held_weights(model)), path)
    return Traced(model, path)


@pytest.fixture(scope="session")
def bfloat(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Heads of 16, whose scale of 1/4 bfloat16 has exactly."""
    config = tiny.tiny_config()
    vision = dataclasses.replace(config.vision, num_attention_heads=2)
    folder = tmp_path_factory.mktemp("bfloat")
    checkpoint = tiny.tiny_checkpoint(
        folder / "checkpoint", dataclasses.replace(config, vision=vision)
    )
    export_bundle(checkpoint, folder / "bundle", dtype="bfloat16")
    return Exported(checkpoint, folder / "bundle")


@pytest.fixture(scope="session")
def exchanges(ort_bundle: Path) -> list[Exchange]:
    """Three images, each asked every prompt."""
    config = tiny.tiny_config()
    return exchanges_from_graphs(ort_bundle, config, trial_images(config.preprocess), PROMPTS, 6)


@pytest.fixture(scope="session")
def feeds(exchanges: list[Exchange]) -> Sequence[Feeds]:
    return CalibrationFeeds(tiny.tiny_config(), exchanges, "any")
