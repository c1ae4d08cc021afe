"""Smoothing changes no number of a float graph, and lets int8 activations hold outliers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir

from himix_edge.contract import DECODER_GRAPH, LOGITS
from himix_edge.export.calibration import Feeds, maxima
from himix_edge.export.onnx import write_graph
from himix_edge.export.products import Product, weight_products
from himix_edge.export.quantize import DecoderQuantization, quantized_decoder
from himix_edge.export.smooth import smooth, smoothed_inputs
from tests import tolerances
from tests.export.conftest import run

LAYERS = 2
OUTLIERS, FACTOR = [3, 17, 30], 100.0


def layers_of(graph: onnx_ir.Model) -> list[Product]:
    *layers, _head = weight_products(graph)
    return layers


def test_the_float_graph_computes_what_it_did_before(
    ort_bundle: Path, tmp_path: Path, feeds: Sequence[Feeds]
) -> None:
    source, target = ort_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH
    graph = onnx_ir.load(source)
    products = layers_of(graph)
    largest_weights = {p.source: np.abs(p.matrix()).max(1) for p in products}
    inputs = smoothed_inputs(products)
    smoothed = {str(p.weight.name).split(".")[-3] for fed in inputs.values() for p in fed}
    assert smoothed == {"qkv_proj", "gate_up_proj", "down_proj"}  # o has nothing to divide by
    assert len(inputs) == 3 * LAYERS
    largest = maxima(source, list(inputs), feeds)
    smooth(products, largest)
    write_graph(graph, target)
    for before, after in zip(run(source, *feeds[:3]), run(target, *feeds[:3]), strict=True):
        for name, value in before.items():
            np.testing.assert_allclose(after[name], value, rtol=0, atol=tolerances.REWRITE)
    # what was difficult is shared: both sides of a product are of the geometric mean now
    after = maxima(target, list(inputs), feeds)
    for name, channels in after.items():
        mean = np.sqrt(largest[name] * largest_weights[name])
        np.testing.assert_allclose(channels, mean, rtol=1e-4)
        assert np.abs(mean / largest[name] - 1).max() > 0.5


def test_norms_that_share_a_gain_are_smoothed_each_for_itself(
    ort_bundle: Path, tmp_path: Path, feeds: Sequence[Feeds]
) -> None:
    source, target = tmp_path / "shared.onnx", tmp_path / DECODER_GRAPH
    graph = onnx_ir.load(ort_bundle / DECODER_GRAPH)
    first, *others = [node for node in graph.graph if node.op_type == "RMSNormalization"]
    for norm in others:  # as where all gains are one, and equal constants have been merged
        norm.replace_input_with(1, first.inputs[1])
    write_graph(graph, source)
    graph = onnx_ir.load(source)
    products = layers_of(graph)
    smooth(products, maxima(source, list(smoothed_inputs(products)), feeds))
    write_graph(graph, target)
    [before], [after] = run(source, feeds[0]), run(target, feeds[0])
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=0, atol=tolerances.REWRITE)


def with_outliers(source: Path, target: Path) -> None:
    """A few channels of every norm's output a hundred times as large, their weights as small."""
    graph = onnx_ir.load(source)
    factors = np.ones(32, np.float32)
    factors[OUTLIERS] = FACTOR
    for product in layers_of(graph):
        norm = product.node.inputs[0].producer()  # type: ignore[union-attr]
        if norm is None or norm.op_type != "RMSNormalization":
            continue
        gain = norm.inputs[1]
        assert gain is not None
        for value, change in ((gain, factors), (product.weight, 1 / factors[:, None])):
            changed = np.array(value.const_value.numpy()) * change  # type: ignore[union-attr]
            value.const_value = onnx_ir.tensor(changed.astype(np.float32), name=value.name)
    write_graph(graph, target)


def test_outliers_cost_little_where_the_decoder_is_smoothed(
    ort_bundle: Path, tmp_path: Path, feeds: Sequence[Feeds]
) -> None:
    source = tmp_path / "outliers.onnx"
    with_outliers(ort_bundle / DECODER_GRAPH, source)
    fp32 = [said[LOGITS] for said in run(source, *feeds)]
    for logits, said in zip(fp32, run(ort_bundle / DECODER_GRAPH, *feeds), strict=True):
        np.testing.assert_allclose(logits, said[LOGITS], rtol=0, atol=1e-4)  # the same model
    errors = {}
    for name, calibration in (("plain", ()), ("smoothed", feeds)):
        target = tmp_path / f"{name}.onnx"
        quantized_decoder(source, target, DecoderQuantization("int8", 32), calibration)
        errors[name] = max(
            float(np.abs(said[LOGITS] - logits).max() / np.abs(logits).max())
            for said, logits in zip(run(target, *feeds), fp32, strict=True)
        )
    assert errors["plain"] > 8 * tolerances.INT8_ACTIVATIONS
    assert errors["smoothed"] < tolerances.INT8_ACTIVATIONS
