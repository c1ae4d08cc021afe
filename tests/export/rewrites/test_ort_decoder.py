"""The decoder graph in ONNX Runtime's own operators against the portable one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime  # type: ignore[import-untyped]
import pytest

from himix_edge.contract import (
    DECODER_GRAPH,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    WRITE_INDICES,
    past_names,
    present_names,
)
from himix_edge.errors import ExportError
from himix_edge.export.products import weight_products
from himix_edge.export.rewrites import ort_decoder
from himix_edge.export.rewrites.group_query_attention import SLOTS
from himix_edge.export.rewrites.packed import joined_initializer
from himix_edge.export.rewrites.residual import join_gate_and_up, keep_every_token, keep_last_token
from himix_edge.export.sessions import decoder_feeds, lean_session
from tests.export.conftest import Traced
from tests.export.rewrites.conftest import (
    CONFIG,
    FILLED,
    HEAD_DIM,
    LAYERS,
    TOKENS,
    Array,
    Subject,
    operators,
)

PAST, PRESENT = past_names(LAYERS), present_names(LAYERS)
PROMPT, NEXT = np.array([[5, 77, 123]]), np.array([[9]])
ROOM = 5  # slots beyond the last token


def rewritten(graph: onnx_ir.Model) -> onnx_ir.Model:
    ort_decoder(graph, CONFIG)
    return graph


def ort_feeds(ids: Array, past: list[Array], unused: float = np.nan) -> dict[str, Array]:
    """As the portable graph's, and a cache with room, whose unused slots hold anything."""
    end = past[0].shape[2] + ids.shape[1] + ROOM
    feeds = decoder_feeds(CONFIG, ids, past, end)
    for name, part in zip(PAST, past, strict=True):
        feeds[name][:, :, part.shape[2] :] = unused
    return feeds


def two_steps(subject: Subject, graph: onnx_ir.Model, *, ort: bool) -> list[Array]:
    """Three tokens over a cache that has some, then one: all that both steps give."""
    feeds_of = ort_feeds if ort else lambda ids, past: decoder_feeds(CONFIG, ids, past)
    logits, *cache = subject.run(graph, feeds_of(PROMPT, subject.past(batch=1)))
    cache = [part[:, :, : FILLED + TOKENS] for part in cache]
    last, *grown = subject.run(graph, feeds_of(NEXT, cache))
    return [logits, last, *(part[:, :, : FILLED + TOKENS + 1] for part in grown)]


def test_the_numbers_of_a_prompt_and_of_the_next_token(subject: Subject) -> None:
    before = two_steps(subject, subject.decoder(), ort=False)
    after = two_steps(subject, rewritten(subject.decoder()), ort=True)
    assert np.abs(before[0] - before[1]).max() > 10 * subject.tolerance
    subject.same(before, after)


@pytest.mark.parametrize("subject", ["float32"], indirect=True)
def test_the_numbers_with_biases_and_a_head_of_its_own(subject: Subject, qwen2: Traced) -> None:
    before = two_steps(subject, onnx_ir.load(qwen2.decoder), ort=False)
    graph = onnx_ir.load(qwen2.decoder)
    ort_decoder(graph, qwen2.model.config)
    subject.same(before, two_steps(subject, graph, ort=True))


@pytest.mark.parametrize("subject", ["float32"], indirect=True)
def test_what_stands_in_unused_slots_does_not_matter(subject: Subject) -> None:
    graph, past = rewritten(subject.decoder()), subject.past(batch=1)
    logits, *cache = subject.run(graph, ort_feeds(PROMPT, past, unused=0.0))
    found, *other = subject.run(graph, ort_feeds(PROMPT, past, unused=np.inf))
    np.testing.assert_array_equal(found, logits)
    for part, same in zip(cache, other, strict=True):
        written = part[:, :, : FILLED + TOKENS]
        np.testing.assert_array_equal(same[:, :, : FILLED + TOKENS], written)


@pytest.mark.parametrize("subject", ["float32"], indirect=True)
def test_in_place_only_the_new_slots_change(ort_bundle: Path, subject: Subject) -> None:
    """Past and present are one buffer, with more room than the tokens need."""
    session = lean_session(ort_bundle / DECODER_GRAPH)
    feeds = ort_feeds(PROMPT, subject.past(batch=1), unused=7.0)
    expected = session.run([LOGITS, *PRESENT], feeds)
    buffers = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(feeds[name].copy(), "cpu", 0)
        for name in PAST
    }
    binding = session.io_binding()
    binding.bind_output(LOGITS, "cpu")
    for name in (INPUT_IDS, POSITION_IDS, WRITE_INDICES):
        binding.bind_cpu_input(name, feeds[name])
    for name, present in zip(PAST, PRESENT, strict=True):
        binding.bind_ortvalue_input(name, buffers[name])
        binding.bind_ortvalue_output(present, buffers[name])
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], expected[0])
    new = slice(FILLED, FILLED + TOKENS)
    for name, present in zip(PAST, expected[1:], strict=True):
        found = buffers[name].numpy()
        np.testing.assert_array_equal(found[:, :, :FILLED], feeds[name][:, :, :FILLED])
        np.testing.assert_array_equal(found[:, :, new], present[:, :, new])
        assert not np.any(found[:, :, new] == 7)
        assert np.all(found[:, :, FILLED + TOKENS :] == 7)


def test_names_and_sizes_are_the_contract_s(subject: Subject) -> None:
    graph = rewritten(subject.decoder()).graph

    def sizes(values: list[onnx_ir.Value]) -> dict[str | None, list[object]]:
        return {
            value.name: [size if isinstance(size, int) else size.value for size in value.shape]  # type: ignore[union-attr]
            for value in values
        }

    cache, tokens = ["batch", 2, SLOTS, HEAD_DIM], ["batch", "tokens"]
    assert sizes(list(graph.inputs)) == {
        INPUT_IDS: tokens,
        POSITION_IDS: tokens,
        WRITE_INDICES: ["batch"],
        **dict.fromkeys(PAST, cache),
    }
    assert sizes(list(graph.outputs)) == {
        LOGITS: ["batch", 1, 300],
        **dict.fromkeys(PRESENT, cache),
    }


@pytest.mark.parametrize("subject", ["float32"], indirect=True)
def test_what_takes_the_place_of_primitives(subject: Subject) -> None:
    before = operators(subject.decoder())
    found = operators(rewritten(subject.decoder()))
    assert found["GroupQueryAttention"] == found["QuickGelu"] == LAYERS
    assert found["RMSNormalization"] == 2 * LAYERS + 1
    assert found["MatMul"] == 4 * LAYERS  # q, k and v; o; gate and up; down. The head is a Gemm
    assert before["Softmax"] == LAYERS
    assert before["Concat"] >= 2 * LAYERS
    assert not found.keys() & {"Softmax", "Concat", "Sin", "Transpose", "Sigmoid", "Pow"}


@pytest.mark.parametrize("subject", ["float32"], indirect=True)
def test_the_last_layer_computes_one_token_or_all(subject: Subject) -> None:
    """What it is fed, layer by layer, against the graph in which nothing was left out."""
    ort = rewritten(subject.decoder())
    every = ort.clone()
    keep_every_token(every)
    feeds = ort_feeds(PROMPT, subject.past(batch=1))
    portable = watched(subject, subject.decoder(), decoder_feeds(CONFIG, PROMPT, subject.past(1)))
    few, all_of_them = watched(subject, ort, feeds), watched(subject, every, feeds)
    assert list(few) == list(all_of_them)
    for name, expected in portable.items():
        in_last = f"layers.{LAYERS - 1}" in name
        assert expected.shape[:2] == all_of_them[name].shape[:2] == (1, TOKENS)
        assert few[name].shape[1] == (1 if in_last else TOKENS)
        subject.same([expected], [all_of_them[name]])
        subject.same([expected[:, -few[name].shape[1] :]], [few[name]])
    subject.same(subject.run(ort, feeds)[:1], subject.run(every, feeds)[:1])
    again = operators(every)
    keep_every_token(every)  # which has none left
    assert operators(every) == again


def watched(subject: Subject, graph: onnx_ir.Model, feeds: dict[str, Array]) -> dict[str, Array]:
    """What comes in at the two products of each layer that read no norm, by their weights."""
    graph = graph.clone()
    products = [
        product
        for product in weight_products(graph)
        if any(part in str(product.weight.name) for part in ("o_proj", "down_proj"))
    ]
    assert len(products) == 2 * LAYERS
    count = len(graph.graph.outputs)
    for product in products:
        value = product.node.inputs[0]
        assert value is not None
        value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        value.shape = onnx_ir.Shape(["batch", "some", "features"])
        graph.graph.outputs.append(value)
    names = [str(product.weight.name) for product in products]
    return dict(zip(names, subject.run(graph, feeds)[count:], strict=True))


def test_another_number_of_gates_is_an_error(tiny_bundle: Path) -> None:
    graph = onnx_ir.load(tiny_bundle / DECODER_GRAPH)
    with pytest.raises(ExportError, match=r"gate and factor: expected 2 gates, found 0"):
        join_gate_and_up(graph, times=LAYERS)


def test_a_graph_that_is_rewritten_already(tiny_bundle: Path) -> None:
    graph = rewritten(onnx_ir.load(tiny_bundle / DECODER_GRAPH))
    with pytest.raises(ExportError, match=r"no place for RMSNormalization: expected 5.*found 0"):
        ort_decoder(graph, CONFIG)
    with pytest.raises(ExportError, match=r"is made otherwise than expected"):
        keep_last_token(graph)


def test_joined_weights_are_read_when_they_are_asked_for() -> None:
    read: list[str] = []

    def part(name: str, first: int, columns: int) -> onnx_ir.Value:
        array = np.arange(first, first + 3 * columns, dtype=np.float32).reshape(3, columns)

        def value() -> onnx_ir.TensorProtocol:
            read.append(name)
            return onnx_ir.tensor(array, name=name)

        shape = onnx_ir.Shape(array.shape)
        tensor = onnx_ir.LazyTensor(value, dtype=onnx_ir.DataType.FLOAT, shape=shape, name=name)
        kind = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        return onnx_ir.Value(name=name, type=kind, shape=shape, const_value=tensor)

    graph = onnx_ir.Graph([], [], nodes=[])
    parts = [part("0.q_proj.weight", 0, 4), part("0.k_proj.weight", 100, 2)]
    joined = joined_initializer(graph, parts, "q_proj", "qkv_proj")
    assert not read
    assert graph.initializers["0.qkv_proj.weight"] is joined
    assert joined.const_value is not None
    np.testing.assert_array_equal(
        joined.const_value.numpy(),
        [[0, 1, 2, 3, 100, 101], [4, 5, 6, 7, 102, 103], [8, 9, 10, 11, 104, 105]],
    )
    assert read == ["0.q_proj.weight", "0.k_proj.weight"]
