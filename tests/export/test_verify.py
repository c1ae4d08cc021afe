"""The verification passes what is right, and fails what is wrong by the right name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from himix_edge.config import Design
from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH
from himix_edge.errors import ExportError, ParityError
from himix_edge.export.onnx import vision_onnx_from_model, write_graph
from himix_edge.export.verify import Array, Closeness, Graphs, trial_images, verify
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.models.himix import HiMix
from tests.tiny import tiny_config, tiny_model

PROMPTS = [[1, 40, 41, 42, 2], [1, 50, 2]]
Verified = Callable[[], object]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint) -> HiMix:
    return tiny_checkpoint.model()


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The two graphs, to be tampered with."""
    for name in (VISION_GRAPH, DECODER_GRAPH):
        shutil.copy(tiny_bundle / name, tmp_path)
        shutil.copy(tiny_bundle / f"{name}.data", tmp_path)
    return tmp_path


def check(model: HiMix, folder: Path) -> object:
    return verify(model, folder, trial_images(model.config.preprocess), PROMPTS)


def tamper(path: Path, weight: str, change: Callable[[Array], Array]) -> None:
    graph = onnx.load(path)
    [tensor] = [t for t in graph.graph.initializer if t.name == weight]
    changed = change(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(changed, weight))
    onnx.save(graph, path)


def test_trial_images_are_preprocessed_pictures(model: HiMix) -> None:
    images = trial_images(model.config.preprocess)
    assert [image.shape for image in images] == [(1, 3, 28, 28)] * 4
    assert all(image.std() > 0.05 for image in images)
    assert not any(np.array_equal(images[0], image) for image in images[1:])


@pytest.mark.parametrize("design", ["himix", "uniform", "hierarchical", "vanilla"])
def test_every_design_is_verified(model: HiMix, folder: Path, design: Design) -> None:
    other = tiny_model(tiny_config(design))
    other.decoder.load_state_dict(model.decoder.state_dict())  # whose graph stands in the folder
    write_graph(vision_onnx_from_model(other), folder / VISION_GRAPH)
    parity = verify(other, folder, trial_images(other.config.preprocess), PROMPTS)
    assert (parity.images, parity.prompts) == (4, 2)
    assert list(parity.vision) == [
        "present.0.key",
        "present.0.value",
        "present.1.key",
        "present.1.value",
    ]
    assert set(parity.decoder) == {"logits", *parity.vision}
    for closeness in (*parity.vision.values(), *parity.decoder.values()):
        assert 0 < closeness.error < 1e-5
        assert closeness.cosine == pytest.approx(1, abs=1e-10)
    assert parity.greedy_tokens >= 16
    assert parity.greedy_tokens_equal == parity.greedy_tokens


def test_the_right_layer_is_blamed(model: HiMix, folder: Path) -> None:
    def scaled(weight: Array) -> Array:  # [d_v, L * 2 * Hkv * D]: layer 1's values come last
        weight[:, -16:] *= 1.01
        return weight

    tamper(folder / VISION_GRAPH, "injection.weight.T", scaled)
    with pytest.raises(ParityError, match=r"^vision\.onnx .*1\.0e-02 .* in present\.1\.value"):
        check(model, folder)


@pytest.mark.parametrize(
    ("weight", "blamed"),
    [
        ("decoder.model.norm.weight", "logits"),
        ("decoder.model.layers.0.self_attn.k_proj.weight.T", "present.0.key"),
    ],
)
def test_the_decoder_is_blamed(model: HiMix, folder: Path, weight: str, blamed: str) -> None:
    def flipped(values: Array) -> Array:
        values[..., 3] *= -1
        return values

    tamper(folder / DECODER_GRAPH, weight, flipped)
    with pytest.raises(ParityError, match=rf"^decoder\.onnx .* in {blamed}, the worst"):
        check(model, folder)


def test_a_small_error_is_an_error(model: HiMix, folder: Path) -> None:
    tamper(folder / VISION_GRAPH, "injection.weight.T", lambda weight: weight * 1.0002)
    with pytest.raises(ParityError, match=r"at most 0\.0001 .*found 2\.0e-04"):
        check(model, folder)


def test_numbers_that_are_none(model: HiMix, folder: Path) -> None:
    tamper(folder / DECODER_GRAPH, "decoder.model.norm.weight", lambda weight: weight * np.nan)
    with pytest.raises(ParityError, match=r"^decoder\.onnx .*inf .* in logits"):
        check(model, folder)


def test_a_graph_of_another_model(folder: Path) -> None:
    other = tiny_model(tiny_config())
    torch.nn.init.normal_(other.vision.model.embeddings.class_embedding)
    with pytest.raises(ParityError, match=r"^vision\.onnx gives other numbers"):
        check(other, folder)


def test_other_tokens_fail(model: HiMix, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = Graphs.generate_greedy

    def wrong(self: Graphs, *args: object) -> list[int]:
        tokens = greedy(self, *args)  # type: ignore[arg-type]
        tokens[3] = (tokens[3] + 1) % 300
        return tokens

    monkeypatch.setattr(Graphs, "generate_greedy", wrong)
    with pytest.raises(ParityError, match=r"expected token \d+ after 3 tokens"):
        check(model, folder)


def test_a_tie_may_fall_either_way(
    model: HiMix, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model's two likeliest tokens have one logit, either is its greedy choice."""
    other = tiny_model(tiny_config())
    other.load_state_dict(model.state_dict())
    embeddings = other.decoder.model.embed_tokens.weight
    image, prompt = trial_images(other.config.preprocess)[0], PROMPTS[0]
    chosen = other.generate_greedy(torch.from_numpy(image), torch.tensor([prompt]), 1)[0]
    twin = 299 if chosen != 299 else 298
    embeddings[twin] = embeddings[chosen]
    tamper(
        folder / DECODER_GRAPH,
        "decoder.model.embed_tokens.weight",
        lambda _: embeddings.numpy().copy(),
    )
    greedy = Graphs.generate_greedy

    def twins(self: Graphs, *args: object) -> list[int]:
        swap = {chosen: twin, twin: chosen}
        return [swap.get(t, t) for t in greedy(self, *args)]  # type: ignore[arg-type]

    monkeypatch.setattr(Graphs, "generate_greedy", twins)
    parity = verify(other, folder, trial_images(other.config.preprocess), PROMPTS)
    assert parity.greedy_tokens_equal < parity.greedy_tokens


def test_a_graph_that_cannot_be_run(model: HiMix, folder: Path) -> None:
    (folder / DECODER_GRAPH).write_bytes(b"graph")
    with pytest.raises(ExportError, match=r"ONNX Runtime can't run decoder\.onnx"):
        check(model, folder)


def test_closeness_by_hand() -> None:
    close = Closeness.of(np.array([1.0, 2.0, -4.0]), np.array([1.0, 2.5, -4.0]))
    assert close.error == pytest.approx(0.5 / 4)
    assert close.cosine == pytest.approx(22 / (21 * 23.25) ** 0.5)
    assert Closeness.of(np.zeros(2), np.zeros(2)) == Closeness(0.0, 1.0)
    assert Closeness.of(np.zeros(2), np.ones(2)) == Closeness(1.0, 0.0)
    assert Closeness.of(np.ones(3), np.ones(2)) == Closeness(np.inf, 0.0)
    for none in (np.nan, np.inf):
        assert Closeness.of(np.array([none]), np.ones(1)) == Closeness(np.inf, 0.0)
        assert Closeness.of(np.ones(1), np.array([none])) == Closeness(np.inf, 0.0)
    assert Closeness(0.1, 0.9).worst(Closeness(0.2, 0.95)) == Closeness(0.2, 0.9)
