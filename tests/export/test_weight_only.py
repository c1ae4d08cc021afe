"""Whole graphs with codes for TensorRT against the same graphs over the weights these stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest

from himix_edge.contract import DECODER_GRAPH, LOGITS, VISION_GRAPH, Manifest
from himix_edge.errors import ConfigError, ExportError
from himix_edge.export.calibration import Feeds
from himix_edge.export.cost import CalibrationFeeds, Exchange, exchanges_from_graphs
from himix_edge.export.expected import Array, trial_images
from himix_edge.export.onnx import write_graph
from himix_edge.export.products import head_product, weight_products
from himix_edge.export.sessions import lean_session
from himix_edge.export.symmetric import WeightType, codes_of, dequantized, scales_of
from himix_edge.export.weight_only import WeightOnly, quantize_weights
from tests import tolerances
from tests.export.decoder_cost import decoder_cost

PROMPTS = [[1, 40, 41, 42, 2], [1, 50, 2]]
TYPES: list[WeightType] = ["int8", "int4", "fp8"]
INT4 = ("o_proj", "down_proj")  # the tiny decoder's matrices whose rows, 64, a block divides


@pytest.fixture(scope="module")
def exchanges(half_bundle: Path) -> list[Exchange]:
    config = Manifest.read(half_bundle).config
    return exchanges_from_graphs(
        half_bundle, config, trial_images(config.preprocess)[:1], PROMPTS, 6
    )


@pytest.fixture(scope="module")
def feeds(half_bundle: Path, exchanges: list[Exchange]) -> Sequence[Feeds]:
    return CalibrationFeeds(Manifest.read(half_bundle).config, exchanges)


def stored_as(rows: int, weights: WeightType, is_head: bool) -> tuple[WeightType, int | None]:
    if weights != "int4":
        return weights, None
    return ("int8", None) if is_head or rows % 64 else ("int4", 64)


def with_dequantized_weights(source: Path, target: Path, weights: WeightType) -> None:
    """The float16 graph, each weight replaced by what its codes stand for, in float16."""
    graph = onnx_ir.load(source)
    products = weight_products(graph)
    head = head_product(graph, products)
    for product in products:
        matrix = product.matrix()
        kind, block = stored_as(product.rows, weights, product is head)
        scales = scales_of(matrix, kind, block)
        values = dequantized(codes_of(matrix, kind, scales), scales).astype(np.float16)
        values = np.ascontiguousarray(values.T if product.transposed else values)
        name = f"{product.weight.name}.dequantized"
        tensor = onnx_ir.tensor(values, name=name)
        value = onnx_ir.Value(
            name=name, type=product.weight.type, shape=product.weight.shape, const_value=tensor
        )
        graph.graph.register_initializer(value)
        product.node.replace_input_with(1, value)
    write_graph(graph, target)


def run(path: Path, feeds: Feeds) -> dict[str, Array]:
    session = lean_session(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def largest_error(found: dict[str, Array], expected: dict[str, Array]) -> float:
    assert list(found) == list(expected)
    return max(
        float(
            np.abs(found[name].astype(np.float64) - expected[name]).max()
            / np.abs(expected[name]).max()
        )
        for name in expected
    )


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("name", [DECODER_GRAPH, VISION_GRAPH])
def test_the_graph_is_that_of_the_dequantized_weights(
    half_bundle: Path,
    feeds: Sequence[Feeds],
    exchanges: list[Exchange],
    tmp_path: Path,
    name: str,
    weights: WeightType,
) -> None:
    source, target, plain = half_bundle / name, tmp_path / name, tmp_path / "plain.onnx"
    quantize_weights(source, target, WeightOnly(weights))
    with_dequantized_weights(source, plain, weights)
    given = feeds[0] if name == DECODER_GRAPH else {"pixel_values": exchanges[0].pixels}
    found, expected = run(target, given), run(plain, given)
    away = largest_error(expected, run(source, given))
    assert largest_error(found, expected) < tolerances.DEQUANTIZED_GRAPH
    assert away > 2 * tolerances.DEQUANTIZED_GRAPH  # the reference itself is quantized


@pytest.mark.parametrize("weights", TYPES)
def test_what_is_in_the_decoder(half_bundle: Path, tmp_path: Path, weights: WeightType) -> None:
    source, target = half_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH
    quantize_weights(source, target, WeightOnly(weights))
    graph = onnx_ir.load(target)
    assert not weight_products(graph)
    nodes = [node for node in graph.graph if node.op_type == "DequantizeLinear"]
    types: dict[str, str] = {
        str(node.inputs[0].name): node.inputs[0].dtype.name  # type: ignore[union-attr]
        for node in nodes
    }
    assert len(types) == 7 * 2 + 1  # q, k, v, o, gate, up, down of two layers, and the head
    plain = "FLOAT8E4M3FN" if weights == "fp8" else "INT8"
    for name, found in types.items():
        assert found == (
            "INT4" if weights == "int4" and any(part in name for part in INT4) else plain
        ), name
    [table] = [node.inputs[0] for node in graph.graph if node.name == "node_embedding"]
    assert table is not None
    assert table.dtype is onnx_ir.DataType.FLOAT16
    for node in nodes:  # nothing else may read a quantized constant: TensorRT refuses it
        assert [user for user, _ in node.inputs[0].uses()] == [node]  # type: ignore[union-attr]
    # q, o, gate, up, down, and k, v of two layers; what is small stays in the graph
    layers, halved, vocabulary = 2 * (5 * 32 * 64 + 2 * 32 * 32), 2 * 2 * 64 * 32, 300 * 32
    codes = layers + vocabulary - (halved // 2 if weights == "int4" else 0)
    floats = 2 * 300 * 32 + 2 * 300  # the embedding, and the head's scales
    assert target.with_name(f"{DECODER_GRAPH}.data").stat().st_size == codes + floats


def test_an_untied_head_leaves_no_floats_behind(half_bundle: Path, tmp_path: Path) -> None:
    """The tied one, given a matrix of its own."""
    graph = onnx_ir.load(half_bundle / DECODER_GRAPH)
    head = head_product(graph, weight_products(graph))
    assert head is not None
    own = onnx_ir.tensor(np.array(head.weight.const_value.numpy()), name="head")  # type: ignore[union-attr]
    value = onnx_ir.Value(
        name="head", type=head.weight.type, shape=head.weight.shape, const_value=own
    )
    graph.graph.register_initializer(value)
    head.node.replace_input_with(1, value)
    write_graph(graph, tmp_path / "untied.onnx")
    quantize_weights(tmp_path / "untied.onnx", tmp_path / "out.onnx", WeightOnly("int8"))
    names = set(onnx_ir.load(tmp_path / "out.onnx").graph.initializers)
    assert "head" not in names
    assert {"head.codes", "head.scales"} <= names


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_gptq_keeps_closer(
    half_bundle: Path,
    exchanges: list[Exchange],
    feeds: Sequence[Feeds],
    tmp_path: Path,
    weights: WeightType,
) -> None:
    config = Manifest.read(half_bundle).config
    source, target = half_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH
    error = {}
    for how in (WeightOnly(weights), WeightOnly(weights, method="gptq")):
        quantize_weights(source, target, how, feeds)
        cost = decoder_cost(source, target, config, exchanges, lean_session)
        keys_and_values = [c for name, c in cost.tensors.items() if name != LOGITS]
        error[how.method] = np.mean([1 - closeness.cosine for closeness in keys_and_values])
    assert error["gptq"] < 0.9 * error["rtn"]


def test_progress_ends_with_the_last_weight(half_bundle: Path, tmp_path: Path) -> None:
    told: list[float] = []
    quantize_weights(
        half_bundle / DECODER_GRAPH, tmp_path / "out.onnx", WeightOnly("int4"), progress=told.append
    )
    assert told == sorted(told)
    assert told[0] > 0
    assert told[-1] == 1


def test_the_same_graph_gives_the_same_bytes(half_bundle: Path, tmp_path: Path) -> None:
    def written() -> dict[str, bytes]:
        quantize_weights(half_bundle / VISION_GRAPH, tmp_path / VISION_GRAPH, WeightOnly("int4"))
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    assert written() == written()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int5",), "'int5'.*did you mean 'int"),
        (("int4", 32), "block_size is invalid: expected 64 or 128.*found 32"),
        (("int4", True), "block_size is invalid.*found True"),
        (("int4", 64, "gtpq"), "'gtpq'.*did you mean 'gptq'"),
        (("fp8", 64, "gptq"), "gptq has no fp8"),
    ],
)
def test_what_is_no_quantization(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightOnly(*arguments)


def test_gptq_without_calibration(half_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gptq has nothing to calibrate with"):
        quantize_weights(
            half_bundle / DECODER_GRAPH, tmp_path / "out.onnx", WeightOnly("int4", method="gptq")
        )
    assert not list(tmp_path.iterdir())


def test_a_quantized_graph_is_not_quantized_again(half_bundle: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.onnx", tmp_path / "twice.onnx"
    quantize_weights(half_bundle / VISION_GRAPH, once, WeightOnly("int8"))
    with pytest.raises(ExportError, match=r"^once\.onnx has nothing to quantize"):
        quantize_weights(once, twice, WeightOnly("int8"))
    assert not twice.exists()


def test_the_weight_that_is_not_finite_is_named(half_bundle: Path, tmp_path: Path) -> None:
    graph = onnx_ir.load(half_bundle / DECODER_GRAPH)
    product = weight_products(graph)[4]
    broken = product.matrix().copy()
    broken[2, 3] = np.inf
    product.weight.const_value = onnx_ir.tensor(broken, name=product.weight.name)
    source = tmp_path / "broken.onnx"
    write_graph(graph, source)
    with pytest.raises(
        ExportError, match=rf"cannot quantize a weight, {product.weight.name}.*1 that"
    ):
        quantize_weights(source, tmp_path / "out.onnx", WeightOnly("int8"))
    assert not (tmp_path / "out.onnx").exists()
