"""Tokens that are never to be chosen, in every dialect, type and quantization.

The tokens suppressed are those that the same model says where it is free to.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import himix_edge
from himix_edge.bundle.quality import quality_of
from himix_edge.config import HiMixConfig
from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH, Dialect, Dtype, Manifest
from himix_edge.errors import ParityError
from himix_edge.export.bundle import export_bundle
from himix_edge.export.expected import expected_from_model, trial_images
from himix_edge.export.quantized_bundle import quantize_bundle
from himix_edge.export.recipes import WeightChoice
from himix_edge.export.sessions import DecoderSession, VisionSession
from himix_edge.export.verify import verify
from himix_edge.export.widen import write_widened
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.models.himix import HiMix
from himix_edge.runtimes.sampling import Sampler, SamplingOptions
from himix_edge.shapes.render import render
from himix_edge.shapes.scenes import random_scene
from tests import tiny
from tests.conftest import take_graphs
from tests.export.conftest import PROMPTS

SCENE = render(random_scene(np.random.default_rng(4)), 60)
FREE = tiny.converted_config("siglip")
LENGTH = 12


def said(model: HiMix) -> set[int]:
    images = trial_images(model.config.preprocess)
    answers = [
        model.generate_greedy(torch.from_numpy(image), torch.tensor([prompt]), LENGTH)
        for image in images
        for prompt in PROMPTS
    ]
    return {token for answer in answers for token in answer} - {0}


def suppressing(tokens: set[int]) -> HiMixConfig:
    decoder = dataclasses.replace(FREE.decoder, suppressed_token_ids=tuple(sorted(tokens)))
    return dataclasses.replace(FREE, decoder=decoder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    tokens = said(tiny.tiny_model(FREE))
    assert tokens
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("suppressing") / "c", suppressing(tokens))


@pytest.fixture(scope="module")
def portable(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("portable") / "bundle"
    export_bundle(checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def ort(checkpoint: Checkpoint, portable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ort") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        take_graphs(patch, portable)
        export_bundle(checkpoint, folder, dialect="ort")
    return folder


def assert_silent(folder: Path, config: HiMixConfig) -> None:
    """Every graph's logits of the suppressed tokens are numbers, far below all others."""
    ids = list(config.decoder.suppressed_token_ids)
    pixels = trial_images(config.preprocess)[0]
    image = VisionSession(folder / VISION_GRAPH, config).encode(pixels)
    graphs = [path for path in folder.glob("*.onnx") if path.name != VISION_GRAPH]
    assert folder / DECODER_GRAPH in graphs
    for path in graphs:
        logits, _ = DecoderSession(path, config).step(np.array([PROMPTS[0]]), image)
        assert logits.dtype == np.float32
        assert np.isfinite(logits).all()
        assert logits[:, ids].max() < np.delete(logits, ids, axis=-1).min() - 1e4


def test_the_checkpoint_and_the_bundle_keep_them(checkpoint: Checkpoint, ort: Path) -> None:
    ids = checkpoint.config.decoder.suppressed_token_ids
    assert Manifest.read(ort).config.decoder.suppressed_token_ids == ids
    data = checkpoint.config.to_dict()
    assert HiMixConfig.from_dict(data) == checkpoint.config
    del data["decoder"]["suppressed_token_ids"]  # as older files are
    assert HiMixConfig.from_dict(data) == FREE


def test_the_model_says_other_tokens(checkpoint: Checkpoint) -> None:
    model, free = checkpoint.model(), tiny.tiny_model(FREE)
    ids = set(checkpoint.config.decoder.suppressed_token_ids)
    assert said(free) == ids
    assert not said(model) & ids
    pixels = torch.from_numpy(trial_images(FREE.preprocess)[0])
    ours, theirs = (each(pixels, torch.tensor([PROMPTS[0]])) for each in (model, free))
    kept = [i for i in range(tiny.VOCAB_SIZE) if i not in ids]
    assert torch.equal(ours[..., kept], theirs[..., kept])


def test_a_portable_graph_suppresses_them(checkpoint: Checkpoint, portable: Path) -> None:
    assert_silent(portable, checkpoint.config)


@pytest.mark.slow
@pytest.mark.parametrize(("dialect", "dtype"), [("native", "float16"), ("portable", "bfloat16")])
def test_a_graph_in_half_precision_suppresses_them(
    checkpoint: Checkpoint, tmp_path: Path, dialect: Dialect, dtype: Dtype
) -> None:
    export_bundle(checkpoint, tmp_path / "b", dialect=dialect, dtype=dtype)
    if dtype == "bfloat16":  # as the verification does: no CPU has it
        for name in (VISION_GRAPH, DECODER_GRAPH):
            (tmp_path / "wide").mkdir(exist_ok=True)
            write_widened(tmp_path / "b" / name, tmp_path / "wide" / name)
    assert_silent(tmp_path / ("wide" if dtype == "bfloat16" else "b"), checkpoint.config)


@pytest.mark.parametrize(
    "choice",
    [
        None,
        WeightChoice(decoder="int8"),
        WeightChoice(decoder="int4", block_size=32, head="int4", prefill="int8"),
    ],
    ids=["float32", "int8", "int4"],
)
def test_no_quantized_head_forgets_them(
    checkpoint: Checkpoint, ort: Path, tmp_path: Path, choice: WeightChoice | None
) -> None:
    folder = ort
    if choice:
        folder = tmp_path / "small"
        manifest = quantize_bundle(ort, folder, choice)
        quality = quality_of(manifest.quantization)
        assert quality
        assert all(0 < way.divergence < 0.1 for way in quality.ways)  # finite, of what is left
    assert_silent(folder, checkpoint.config)
    ids = set(checkpoint.config.decoder.suppressed_token_ids)
    for options in (
        SamplingOptions(),
        SamplingOptions(repetition_penalty=1.3),
        SamplingOptions(temperature=1.5, seed=0),
        SamplingOptions(temperature=1000, repetition_penalty=1e-6, seed=1),  # all alike
    ):
        assert not ids & set(answered(folder, Sampler(options)))


def answered(folder: Path, sample: Sampler) -> list[int]:
    """60 tokens, whatever ends there are, on a device."""
    model = himix_edge.load(folder, threads=1)
    cache = model.engine.open(model.encode(SCENE).kv)
    text = list(PROMPTS[0])
    for _ in range(60):
        logits = model.engine.step(np.array([text[cache.text_length :]]), cache)
        text.append(sample(logits[0], text))
    return text[len(PROMPTS[0]) :]


def test_a_graph_that_forgets_them_is_no_copy_of_the_model(
    checkpoint: Checkpoint, ort: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(ort, tmp_path / "copy"))
    expected = expected_from_model(checkpoint.model(), trial_images(FREE.preprocess), PROMPTS)
    assert verify(expected, folder, checkpoint.config, "float32").greedy_tokens > 0
    graph = onnx.load(folder / DECODER_GRAPH)
    [add] = [node for node in graph.graph.node if "decoder.suppression" in node.input]
    add.op_type = "Identity"
    del add.input[1:]
    onnx.save(graph, folder / DECODER_GRAPH)
    with pytest.raises(ParityError, match=r"other numbers.*in logits, the worst"):
        verify(expected, folder, checkpoint.config, "float32")


def test_a_small_error_is_not_hidden_by_them(
    checkpoint: Checkpoint, ort: Path, tmp_path: Path
) -> None:
    """Against the suppressed logits' own size, an error of 6 would be within the bounds."""
    folder = Path(shutil.copytree(ort, tmp_path / "copy"))
    expected = expected_from_model(checkpoint.model(), trial_images(FREE.preprocess), PROMPTS)
    graph = onnx.load(folder / DECODER_GRAPH)
    [tensor] = [t for t in graph.graph.initializer if t.name == "decoder.suppression"]
    changed = onnx.numpy_helper.to_array(tensor).copy()
    kept = int(np.flatnonzero(changed == 0)[5])
    changed[kept] = 0.01
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
    onnx.save(graph, folder / DECODER_GRAPH)
    with pytest.raises(ParityError, match="in logits, the worst"):
        verify(expected, folder, checkpoint.config, "float32")
