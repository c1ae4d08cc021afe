"""The verification passes what is right, and fails what is wrong by the right name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from himix_edge.config import Design
from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH
from himix_edge.errors import ExportError, ParityError
from himix_edge.export.expected import Array, Expected, expected_from_model, trial_images
from himix_edge.export.onnx import vision_onnx_from_weights, write_graph
from himix_edge.export.sessions import DecoderSession
from himix_edge.export.verify import BOUNDS, Closeness, Parity, verify
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.models.himix import HiMix
from himix_edge.models.weights import held_weights
from tests.export.conftest import Exported
from tests.tiny import tiny_config, tiny_model

PROMPTS = [[1, 40, 41, 42, 2], [1, 50, 2]]
CONFIG = tiny_config()
Step = tuple[Array, list[Array]]


def asked(model: HiMix) -> Expected:
    return expected_from_model(model, trial_images(model.config.preprocess), PROMPTS)


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Checkpoint) -> Expected:
    return asked(tiny_checkpoint.model())


def copied(bundle: Path, folder: Path) -> Path:
    """The two graphs, to be tampered with."""
    folder.mkdir()
    for name in (VISION_GRAPH, DECODER_GRAPH):
        shutil.copy(bundle / name, folder)
        shutil.copy(bundle / f"{name}.data", folder)
    return folder


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    return copied(tiny_bundle, tmp_path / "graphs")


def check(expected: Expected, folder: Path) -> Parity:
    return verify(expected, folder, CONFIG, "float32")


def tamper(path: Path, weight: str, change: Callable[[Array], Array]) -> None:
    graph = onnx.load(path)
    [tensor] = [t for t in graph.graph.initializer if t.name == weight]
    changed = change(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(changed, weight))
    onnx.save(graph, path)


@pytest.mark.parametrize("design", ["himix", "uniform", "hierarchical", "vanilla"])
def test_every_design_is_verified(
    tiny_checkpoint: Checkpoint, folder: Path, design: Design
) -> None:
    model = tiny_checkpoint.model()  # whose graphs stand in the folder
    if design != "himix":
        other = tiny_model(tiny_config(design))
        other.decoder.load_state_dict(model.decoder.state_dict())
        model = other
        graph = vision_onnx_from_weights(model.config, held_weights(model))
        write_graph(graph, folder / VISION_GRAPH)
    parity = verify(asked(model), folder, model.config, "float32")
    assert (parity.images, parity.prompts) == (3, 2)
    assert (parity.max_error, parity.min_cosine) == (1e-4, 1 - 1e-7)
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


def test_the_right_layer_is_blamed(expected: Expected, folder: Path) -> None:
    def scaled(weight: Array) -> Array:  # [d_v, L * 2 * Hkv * D]: layer 1's values come last
        weight[:, -16:] *= 1.01
        return weight

    tamper(folder / VISION_GRAPH, "injection.weight.T", scaled)
    with pytest.raises(ParityError, match=r"^vision\.onnx .*1\.0e-02 .* in present\.1\.value"):
        check(expected, folder)


@pytest.mark.parametrize(
    ("weight", "blamed"),
    [
        ("decoder.model.norm.weight", "logits"),
        ("decoder.model.layers.0.self_attn.k_proj.weight.T", "present.0.key"),
    ],
)
def test_the_decoder_is_blamed(expected: Expected, folder: Path, weight: str, blamed: str) -> None:
    def flipped(values: Array) -> Array:
        values[..., 3] *= -1
        return values

    tamper(folder / DECODER_GRAPH, weight, flipped)
    with pytest.raises(ParityError, match=rf"^decoder\.onnx .* in {blamed}, the worst"):
        check(expected, folder)


def test_a_small_error_is_an_error(expected: Expected, folder: Path) -> None:
    tamper(folder / VISION_GRAPH, "injection.weight.T", lambda weight: weight * 1.0002)
    with pytest.raises(ParityError, match=r"at most 0\.0001 .*found 2\.0e-04"):
        check(expected, folder)


def test_numbers_that_are_none(expected: Expected, folder: Path) -> None:
    tamper(folder / DECODER_GRAPH, "decoder.model.norm.weight", lambda weight: weight * np.nan)
    with pytest.raises(ParityError, match=r"^decoder\.onnx .*inf .* in logits"):
        check(expected, folder)


def test_keys_that_are_no_numbers_are_called_that(expected: Expected, folder: Path) -> None:
    weight = "decoder.model.layers.0.self_attn.k_proj.weight.T"
    tamper(folder / DECODER_GRAPH, weight, lambda weight: weight * np.nan)
    with pytest.raises(ParityError, match=r"^decoder\.onnx gives other numbers.*found inf"):
        check(expected, folder)


def test_a_graph_of_another_model(folder: Path) -> None:
    other = tiny_model(tiny_config())
    other.vision.model.embeddings.patch_embedding.weight.neg_()
    with pytest.raises(ParityError, match=r"^vision\.onnx gives other numbers"):
        check(asked(other), folder)


def test_tokens_that_are_written_one_slot_too_late(
    expected: Expected, ort_bundle: Path, tmp_path: Path
) -> None:
    """Slots that nothing was written into hold other numbers than zero in the comparison."""
    folder = copied(ort_bundle, tmp_path / "ort")
    assert check(expected, folder).greedy_tokens >= 16
    tamper(folder / DECODER_GRAPH, "lengths.one", lambda one: one * 0)
    with pytest.raises(ParityError, match=r"^decoder\.onnx gives other numbers than the model"):
        check(expected, folder)


@pytest.mark.parametrize("name", ["present.0.key", "present.1.value"])
def test_a_cache_whose_old_slots_change(expected: Expected, folder: Path, name: str) -> None:
    """By less than any bound: what is cached is cached."""
    model = onnx.load(folder / DECODER_GRAPH)
    past = name.replace("present", "past_key_values")
    [concat] = [node for node in model.graph.node if name in node.output]
    assert concat.input[0] == past
    concat.input[0] = "moved"
    moved = helper.make_node("Mul", [past, "factor"], ["moved"])
    model.graph.node.insert(0, moved)
    model.graph.initializer.append(
        numpy_helper.from_array(np.array(1 + 1e-6, np.float32), "factor")
    )
    onnx.save(model, folder / DECODER_GRAPH)
    with pytest.raises(ParityError, match=rf"already held.*found others in {name}"):
        check(expected, folder)


def changed_step(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Array], Array]) -> None:
    """`change` gets the number of each step of the greedy answers, and its logits [B, V]."""
    calls = -8  # before them 4 pairs of image and prompt, a prefill and a decode each
    step = DecoderSession.step

    def changed(self: DecoderSession, ids: Array, past: list[Array]) -> Step:
        nonlocal calls
        logits, present = step(self, ids, past)
        calls += 1
        return (logits if calls < 1 else change(calls, logits)), present

    monkeypatch.setattr(DecoderSession, "step", changed)


def test_other_tokens_fail(
    expected: Expected, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = expected.greedy[0]
    other = int(said.logits[3].argmin())

    def fourth(call: int, logits: Array) -> Array:
        if call == 4:
            logits[0, other] = 1e3
        return logits

    changed_step(monkeypatch, fourth)
    with pytest.raises(ParityError, match="other tokens than the model") as error:
        check(expected, folder)
    assert error.value.expected == f"token {said.tokens[3]} after 3 tokens of the answer"
    assert str(error.value.found).startswith(f"token {other}, whose logit is ")


def test_every_greedy_token_is_compared(
    expected: Expected, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[int] = []

    def listen(call: int, logits: Array) -> Array:
        fed.append(call)
        return logits

    changed_step(monkeypatch, listen)
    parity = check(expected, folder)
    assert len(fed) == sum(len(greedy.tokens) for greedy in expected.greedy)
    assert parity.greedy_tokens == parity.greedy_tokens_equal == len(fed)


def test_a_tie_may_fall_either_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model's two likeliest tokens have one logit, either is its greedy choice."""
    other = tiny_model(tiny_config())
    embeddings = other.decoder.model.embed_tokens.weight
    chosen = asked(other).greedy[0].tokens[0]
    twin = 299 if chosen != 299 else 298
    embeddings[twin] = embeddings[chosen]
    twins = embeddings.numpy().copy()
    tamper(folder / DECODER_GRAPH, "decoder.model.embed_tokens.weight", lambda _: twins)
    expected = asked(other)
    token = expected.greedy[0].tokens[0]
    assert token in (chosen, twin)

    def nudged(call: int, logits: Array) -> Array:
        if call == 1:
            logits[0, chosen + twin - token] += 1e-6 * np.abs(logits).max()
        return logits

    changed_step(monkeypatch, nudged)
    parity = check(expected, folder)
    rest = sum(len(greedy.tokens) for greedy in expected.greedy[1:])
    # The first answer is compared no further: from there on the two answers are different texts.
    assert (parity.greedy_tokens, parity.greedy_tokens_equal) == (1 + rest, rest)


@pytest.mark.parametrize(
    ("graph", "weight"),
    [
        (VISION_GRAPH, "injection.weight.T"),
        (DECODER_GRAPH, "decoder.model.layers.1.mlp.down_proj.weight.T"),
    ],
)
def test_a_bfloat16_graph_is_verified_by_its_own_bounds(
    bfloat: Exported, tmp_path: Path, graph: str, weight: str
) -> None:
    folder = copied(bfloat.folder, tmp_path / "graphs")
    files = sorted(folder.iterdir())
    model = bfloat.checkpoint.model()
    expected = asked(model)
    parity = verify(expected, folder, model.config, "bfloat16")
    assert (parity.max_error, parity.min_cosine) == BOUNDS["bfloat16"]
    worst = max(closeness.error for closeness in parity.decoder.values())
    assert 1e-3 < worst < 5e-2
    tamper(folder / graph, weight, lambda values: -values)
    with pytest.raises(ParityError, match=f"^{graph} gives other numbers"):
        verify(expected, folder, model.config, "bfloat16")
    assert sorted(folder.iterdir()) == files  # the wide graphs are gone


def test_a_graph_that_cannot_be_run(expected: Expected, folder: Path) -> None:
    (folder / DECODER_GRAPH).write_bytes(b"graph")
    with pytest.raises(ExportError, match=r"ONNX Runtime can't run decoder\.onnx"):
        check(expected, folder)


def test_closeness_by_hand() -> None:
    close = Closeness.of(np.array([1.0, 2.0, -4.0]), np.array([1.0, 2.5, -4.0]))
    assert close.error == pytest.approx(0.5 / 4)
    assert close.cosine == pytest.approx(22 / (21 * 23.25) ** 0.5)
    assert Closeness.of(np.zeros(2), np.zeros(2)) == Closeness(0.0, 1.0)
    assert Closeness.of(np.zeros(2), np.ones(2)) == Closeness(1.0, 0.0)
    halves = Closeness.of(np.full(2, 60000, np.float16), np.full(2, 60000.0))  # no overflow
    assert halves.error == 0.0
    assert halves.cosine == pytest.approx(1)
    assert Closeness.of(np.ones(3), np.ones(2)) == Closeness(np.inf, 0.0)
    for none in (np.nan, np.inf):
        assert Closeness.of(np.array([none]), np.ones(1)) == Closeness(np.inf, 0.0)
        assert Closeness.of(np.ones(1), np.array([none])) == Closeness(np.inf, 0.0)
    assert Closeness(0.1, 0.9).worst(Closeness(0.2, 0.95)) == Closeness(0.2, 0.9)
