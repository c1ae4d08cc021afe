"""The `ort` dialect's cache: one buffer, written in place, as long as a conversation needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from himix_edge.contract import (
    DECODER_GRAPH,
    INPUT_IDS,
    LOGITS,
    PIXEL_VALUES,
    POSITION_IDS,
    TOKENIZER,
    VISION_GRAPH,
    WRITE_INDICES,
    Manifest,
    past_names,
    present_names,
)
from himix_edge.errors import BundleError
from himix_edge.runtimes import ort_cache
from himix_edge.runtimes.kvcache import Cache
from himix_edge.runtimes.model import Model
from himix_edge.runtimes.ort import OrtEngine
from tests.runtimes.fakes import (
    CHAT,
    VOCAB_SIZE,
    byte_tokenizer,
    manifest,
    tiny_config,
    tokenizer_at,
)
from tests.tolerances import ENGINE_LOGITS, IMAGE_KV

Array = NDArray[np.float32]
HEADS, KV_HEADS, HEAD_DIM, SLOTS, POSITIONS = 4, 2, 16, 9, 64  # the operator takes no less than 16
HIDDEN = HEADS * HEAD_DIM
PROMPT = [1, 40, 41, 42, 2]
RANDOM = np.random.default_rng(0)
TABLE: Array = RANDOM.normal(size=(VOCAB_SIZE, HIDDEN)).astype(np.float32)
HEAD: Array = RANDOM.normal(size=(HIDDEN, VOCAB_SIZE)).astype(np.float32)
PROJECTIONS: list[Array] = [
    RANDOM.normal(scale=1 / 8, size=(HIDDEN, heads * HEAD_DIM)).astype(np.float32)
    for _ in range(2)
    for heads in (HEADS, KV_HEADS, KV_HEADS)
]
IMAGE: Array = RANDOM.normal(scale=0.1, size=(4, 3, KV_HEADS * SLOTS * HEAD_DIM)).astype(np.float32)
ANGLES = np.outer(np.arange(SLOTS + POSITIONS), 10_000.0 ** (-np.arange(8) / 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of attention and nothing else, in ONNX Runtime's own operator."""
    folder = tmp_path_factory.mktemp("roomy")
    onnx.save(vision_graph(), folder / VISION_GRAPH)
    onnx.save(decoder_graph(), folder / DECODER_GRAPH)
    byte_tokenizer().save(str(folder / TOKENIZER))
    return folder


def ort_manifest() -> Manifest:
    config = tiny_config()
    decoder = dataclasses.replace(config.decoder, head_dim=HEAD_DIM)
    config = dataclasses.replace(config, decoder=decoder)
    return dataclasses.replace(manifest(config), dialect="ort")


@pytest.fixture
def engine(folder: Path) -> OrtEngine:
    return OrtEngine(folder, ort_manifest(), threads=1)


def pixels(seed: int = 0, batch: int = 1) -> Array:
    return np.random.default_rng(seed).normal(size=(batch, 3, 24, 24)).astype(np.float32)


def expected_logits(image: Array | None, text: list[int]) -> Array:
    """[V], by numpy and in float64, over the whole text at once: no cache."""
    hidden = TABLE[text].astype(np.float64)
    count, slots = len(text), 0 if image is None else SLOTS
    for layer in range(2):
        query, key, value = (
            (hidden @ weights).reshape(count, -1, HEAD_DIM).swapaxes(0, 1)
            for weights in PROJECTIONS[3 * layer : 3 * layer + 3]
        )
        query, key = rotated(query), rotated(key)
        if image is not None:
            seen_key, seen_value = expected_image(image)[2 * layer : 2 * layer + 2]
            key = np.concatenate([seen_key[0], key], axis=1)
            value = np.concatenate([seen_value[0], value], axis=1)
        key, value = (np.repeat(part, HEADS // KV_HEADS, axis=0) for part in (key, value))
        scores = query @ key.swapaxes(1, 2) / np.sqrt(HEAD_DIM)
        scores += np.triu(np.full(scores.shape[1:], -np.inf), slots + 1)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        hidden = hidden + (weights @ value).swapaxes(0, 1).reshape(count, HIDDEN)
    return np.asarray(hidden[-1] @ HEAD, np.float32)


def rotated(heads: NDArray[np.float64]) -> NDArray[np.float64]:
    """[H, M, D] at positions 0 to M - 1."""
    angles = ANGLES[: heads.shape[1]]
    first, second = heads[..., : HEAD_DIM // 2], heads[..., HEAD_DIM // 2 :]
    parts = (
        first * np.cos(angles) - second * np.sin(angles),
        second * np.cos(angles) + first * np.sin(angles),
    )
    return np.concatenate(parts, axis=-1)


def expected_image(image: Array) -> list[Array]:
    means = image.mean(axis=(2, 3))
    return [(means @ w).reshape(-1, KV_HEADS, SLOTS, HEAD_DIM) for w in IMAGE]


def is_close(logits: Array, image: Array | None, text: list[int]) -> None:
    expected = expected_logits(image, text)
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=ENGINE_LOGITS)


def test_every_step_is_the_whole_text_without_a_cache(engine: OrtEngine) -> None:
    cache = engine.open(engine.encode(pixels()))
    text: list[int] = []
    for step in (PROMPT, [77], [78], [79, 80, 81]):
        text += step
        is_close(engine.step(np.array([step]), cache), pixels(), text)
    assert cache.length == SLOTS + len(text)


def test_unused_slots_need_no_zeroes(engine: OrtEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    images = (pixels(), None)
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.full(shape, np.nan, dtype))
    for image in images:
        cache = engine.open(None if image is None else engine.encode(image))
        assert np.isnan(cache.tensors[0].numpy()[:, :, cache.length :]).all()
        is_close(engine.step(np.array([PROMPT]), cache), image, PROMPT)


def test_it_is_written_in_place(engine: OrtEngine) -> None:
    image = engine.encode(pixels())
    cache = engine.open(image)
    assert cache.capacity == SLOTS + POSITIONS
    tensors, binding = cache.tensors, cache.binding
    assert tensors[0].shape() == [1, KV_HEADS, SLOTS + POSITIONS, HEAD_DIM]
    engine.step(np.array([PROMPT]), cache)
    binding = cache.binding
    engine.step(np.array([[9]]), cache)
    assert cache.tensors is tensors
    assert cache.binding is binding is not None


def test_a_longer_buffer_takes_over(engine: OrtEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_cache, "USUAL_TEXT", 3)
    cache = engine.open(engine.encode(pixels()))
    text: list[int] = []
    lengths = []
    for step in ([1, 2], [3], [4], PROMPT, list(range(20)), list(range(32)), [7, 8, 9]):
        text += step
        is_close(engine.step(np.array([step]), cache), pixels(), text)
        lengths.append(cache.tensors[0].shape()[2] - SLOTS)
    assert lengths == [3, 3, 15, 15, 39, 64, 64]  # twice 9 + 3, twice that, all positions
    assert cache.room == 0


def test_the_image_stays_as_it_is(engine: OrtEngine) -> None:
    image = engine.encode(pixels(1))
    for tensor, expected in zip(image.tensors, expected_image(pixels(1)), strict=True):
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=IMAGE_KV)
    before = [tensor.numpy().copy() for tensor in image.tensors]
    caches = [engine.open(image), engine.open(image)]
    for cache, text in zip(caches, ([1, 2, 3], [4, 5]), strict=True):
        engine.step(np.array([text]), cache)
    for cache, text in zip(caches, ([1, 2, 3], [4, 5]), strict=True):
        is_close(engine.step(np.array([[9]]), cache), pixels(1), [*text, 9])
    for tensor, kept in zip(image.tensors, before, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), kept)


def test_two_images_at_once(engine: OrtEngine) -> None:
    both = pixels(2, batch=2)
    cache = engine.open(engine.encode(both))
    engine.step(np.array([PROMPT, PROMPT]), cache)
    logits = engine.step(np.array([[8], [9]]), cache)
    is_close(logits[:1], both[:1], [*PROMPT, 8])
    is_close(logits[1:], both[1:], [*PROMPT, 9])


def test_logits_are_the_callers_own(engine: OrtEngine) -> None:
    cache = engine.open(engine.encode(pixels()))
    first = engine.step(np.array([PROMPT]), cache)
    kept = first.copy()
    assert not np.array_equal(engine.step(np.array([[9]]), cache), kept)
    np.testing.assert_array_equal(first, kept)


def test_a_bundle_of_the_dialect_before(folder: Path, tmp_path: Path) -> None:
    """Its decoder knew no write_indices, and its cache grew."""
    (tmp_path / VISION_GRAPH).write_bytes((folder / VISION_GRAPH).read_bytes())
    graph = onnx.load(folder / DECODER_GRAPH)
    del graph.graph.input[[node.name for node in graph.graph.input].index(WRITE_INDICES)]
    graph.graph.initializer.append(constant(WRITE_INDICES, np.zeros(1, np.int64)))
    onnx.save(graph, tmp_path / DECODER_GRAPH)
    with pytest.raises(BundleError, match=r"the inputs of .*found no write_indices.*export"):
        OrtEngine(tmp_path, ort_manifest())


# What an earlier conversation about the image has computed already


def test_a_branch_goes_on_from_what_it_shares(engine: OrtEngine) -> None:
    first = engine.open(engine.encode(pixels()))
    engine.step(np.array([[1, 40, 41, 7, 7]]), first)
    second = engine.branch(first, 3)
    assert (second.length, second.image_slots, second.binding) == (SLOTS + 3, SLOTS, None)
    is_close(engine.step(np.array([[42, 2]]), second), pixels(), PROMPT)
    is_close(engine.step(np.array([[9]]), first), pixels(), [1, 40, 41, 7, 7, 9])
    is_close(engine.step(np.array([[9]]), second), pixels(), [*PROMPT, 9])


def test_it_goes_back_in_place(engine: OrtEngine) -> None:
    cache = engine.open(engine.encode(pixels()))
    engine.prefill(np.array([[1, 40, 41, 7, 7]]), cache)
    engine.step(np.array([[8]]), cache)
    tensors, binding = cache.tensors, cache.binding
    engine.rewind(cache, 3)
    assert (cache.length, cache.reusable) == (SLOTS + 3, 3)
    is_close(engine.prefill(np.array([[42, 2]]), cache), pixels(), PROMPT)
    is_close(engine.step(np.array([[9]]), cache), pixels(), [*PROMPT, 9])
    assert cache.tensors is tensors
    assert cache.binding is binding is not None


def test_questions_that_begin_alike_are_answered_as_if_alone(folder: Path) -> None:
    model = Model(
        ort_manifest(),
        tokenizer_at(folder / TOKENIZER, CHAT),
        CountingEngine(folder, ort_manifest(), threads=1),
    )
    assert isinstance(model.engine, CountingEngine)
    picture = np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    questions = ("what is it", "what was it", "who", "who", "what is it")
    alone = [model.generate(model.encode(picture), q, max_tokens=6).read() for q in questions]
    assert len(set(alone)) == 3
    image = model.encode(picture)
    model.engine.fed.clear()
    assert [model.generate(image, q, max_tokens=6).read() for q in questions] == alone
    # All; without "<user>what "; without "<user>wh"; two tokens; without "<user>wh".
    assert model.engine.fed == [12, 13 - 6, 5 - 3, 2, 12 - 3]


def test_a_conversation_is_not_disturbed_by_those_that_branch_off(folder: Path) -> None:
    description = ort_manifest()
    model = Model(
        description,
        tokenizer_at(folder / TOKENIZER, CHAT),
        OrtEngine(folder, description, threads=1),
    )
    picture = np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)

    def two_turns(*, disturbed: bool) -> tuple[str, str]:
        image = model.encode(picture)
        conversation = model.chat(image)
        first = conversation.ask("what", max_tokens=5)
        said = next(first)
        if disturbed:
            model.generate(image, "what", max_tokens=7).read()
            model.generate(image, "whatever", max_tokens=7).read()
        return said + first.read(), conversation.ask("who", max_tokens=5).read()

    assert two_turns(disturbed=True) == two_turns(disturbed=False)


class CountingEngine(OrtEngine):
    """How many tokens of prompts it was given at a time."""

    def __init__(self, *args: object, **options: int) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.fed: list[int] = []

    def prefill(self, input_ids: NDArray[np.int64], cache: Cache) -> Array:
        self.fed.append(input_ids.shape[1])
        return super().prefill(input_ids, cache)


# The graphs


def constant(name: str, values: NDArray[np.generic]) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(values), name)


def info(name: str, dtype: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, list(shape))


def saved(
    nodes: list[onnx.NodeProto],
    constants: dict[str, NDArray[np.generic]],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    initializers = [constant(name, values) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def vision_graph() -> onnx.ModelProto:
    """The means of the colours, times a matrix for each key and value."""
    node = helper.make_node
    nodes = [
        node("ReduceMean", [PIXEL_VALUES, "axes"], ["means"], keepdims=0),
    ]
    constants: dict[str, NDArray[np.generic]] = {
        "axes": np.array([2, 3]),
        "split": np.array([-1, KV_HEADS, SLOTS, HEAD_DIM]),
    }
    outputs = []
    for name, weights in zip(present_names(2), IMAGE, strict=True):
        constants[f"{name}.weight"] = weights
        nodes += [
            node("MatMul", ["means", f"{name}.weight"], [f"{name}.flat"]),
            node("Reshape", [f"{name}.flat", "split"], [name]),
        ]
        outputs.append(info(name, TensorProto.FLOAT, "B", KV_HEADS, SLOTS, HEAD_DIM))
    inputs = [info(PIXEL_VALUES, TensorProto.FLOAT, "B", 3, 24, 24)]
    return saved(nodes, constants, inputs, outputs)


def decoder_graph() -> onnx.ModelProto:
    node, past, present = helper.make_node, past_names(2), present_names(2)
    nodes = [
        node("Shape", [INPUT_IDS], ["count"], start=1, end=2),
        node("Add", [WRITE_INDICES, "count"], ["lengths"]),
        node("Sub", ["lengths", "one"], ["lasts"]),
        node("Cast", ["lasts"], ["seqlens_k"], to=TensorProto.INT32),
        node("ReduceMax", ["lengths"], ["longest"], keepdims=0),
        node("Cast", ["longest"], ["total"], to=TensorProto.INT32),
        node("Gather", ["table", INPUT_IDS], ["hidden.0"]),
    ]
    constants: dict[str, NDArray[np.generic]] = {
        "one": np.array([1]),
        "minus_one": np.array([-1]),
        "table": TABLE,
        "head": HEAD,
        "cos": np.cos(ANGLES).astype(np.float32),
        "sin": np.sin(ANGLES).astype(np.float32),
    }
    for i in range(2):
        for j, part in enumerate(("query", "key", "value")):
            constants[f"{part}.{i}.weight"] = PROJECTIONS[3 * i + j]
            nodes.append(node("MatMul", [f"hidden.{i}", f"{part}.{i}.weight"], [f"{part}.{i}"]))
        cache = past[2 * i : 2 * i + 2]
        inputs = [f"query.{i}", f"key.{i}", f"value.{i}", *cache, "seqlens_k", "total"]
        nodes += [
            node(
                "GroupQueryAttention",
                [*inputs, "cos", "sin", POSITION_IDS],
                [f"attended.{i}", *present[2 * i : 2 * i + 2]],
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                do_rotary=1,
            ),
            node("Add", [f"hidden.{i}", f"attended.{i}"], [f"hidden.{i + 1}"]),
        ]
    nodes += [
        node("Gather", ["hidden.2", "minus_one"], ["last"], axis=1),
        node("MatMul", ["last", "head"], [LOGITS]),
    ]
    cache_shape = ("B", KV_HEADS, "S", HEAD_DIM)
    inputs_info = [
        info(INPUT_IDS, TensorProto.INT64, "B", "M"),
        info(POSITION_IDS, TensorProto.INT64, "B", "M"),
        info(WRITE_INDICES, TensorProto.INT64, "B"),
        *(info(name, TensorProto.FLOAT, *cache_shape) for name in past),
    ]
    outputs = [
        info(LOGITS, TensorProto.FLOAT, "B", 1, VOCAB_SIZE),
        *(info(name, TensorProto.FLOAT, *cache_shape) for name in present),
    ]
    return saved(nodes, constants, inputs_info, outputs)
