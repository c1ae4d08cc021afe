"""Smoothing changes no number of a float graph, and lets int8 activations hold outliers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir

from himix_edge.contract import DECODER_GRAPH, LOGITS
from himix_edge.export.calibration import Feeds, magnitudes
from himix_edge.export.int8 import replace_products
from himix_edge.export.onnx import write_graph
from himix_edge.export.products import Product, weight_products
from himix_edge.export.smooth import smooth, smoothed_inputs
from tests import tolerances
from tests.export.conftest import run
from tests.export.massive import with_massive_activations

LAYERS = 2


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
    largest = magnitudes(source, list(inputs), feeds)
    smooth(products, largest)
    write_graph(graph, target)
    for before, after in zip(run(source, *feeds[:3]), run(target, *feeds[:3]), strict=True):
        for name, value in before.items():
            np.testing.assert_allclose(after[name], value, rtol=0, atol=tolerances.REWRITE)
    # what was difficult is shared: both sides of a product are of the geometric mean now
    after = magnitudes(target, list(inputs), feeds)
    for name, channels in after.items():
        mean = np.sqrt(largest[name] * largest_weights[name])
        np.testing.assert_allclose(channels, mean, rtol=1e-4)
        assert np.abs(mean / largest[name] - 1).max() > 0.2


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
    smooth(products, magnitudes(source, list(smoothed_inputs(products)), feeds))
    write_graph(graph, target)
    [before], [after] = run(source, feeds[0]), run(target, feeds[0])
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=0, atol=tolerances.REWRITE)


def test_outliers_cost_little_where_they_are_smoothed(
    ort_bundle: Path, tmp_path: Path, feeds: Sequence[Feeds]
) -> None:
    source = tmp_path / "outliers.onnx"
    with_massive_activations(ort_bundle / DECODER_GRAPH, source)
    fp32 = [said[LOGITS] for said in run(source, *feeds)]
    for logits, said in zip(fp32, run(ort_bundle / DECODER_GRAPH, *feeds), strict=True):
        np.testing.assert_allclose(logits, said[LOGITS], rtol=0, atol=1e-4)  # the same model
    errors = {}
    for name in ("plain", "smoothed"):
        target = tmp_path / f"{name}.onnx"
        graph = onnx_ir.load(source)
        products = layers_of(graph)
        if name == "smoothed":
            smooth(products, magnitudes(source, list(smoothed_inputs(products)), feeds))
        replace_products(graph, products)
        onnx_ir.save(graph, target, external_data=f"{target.name}.data")
        errors[name] = max(
            float(np.abs(said[LOGITS] - logits).max() / np.abs(logits).max())
            for said, logits in zip(run(target, *feeds), fp32, strict=True)
        )
    assert errors["plain"] > 8 * tolerances.INT8_ACTIVATIONS
    assert errors["smoothed"] < tolerances.INT8_ACTIVATIONS
