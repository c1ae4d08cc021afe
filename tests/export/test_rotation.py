"""A rotated decoder computes what it did before, and no channel of it stands out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from himix_edge.contract import DECODER_GRAPH
from himix_edge.errors import ExportError
from himix_edge.export.calibration import Feeds, inflows, magnitudes
from himix_edge.export.onnx import write_graph
from himix_edge.export.products import Product, head_product, weight_products
from himix_edge.export.rewrites import ort_decoder
from himix_edge.export.rotation import rotate, rotation_of, spreading
from tests import tolerances
from tests.export.conftest import Traced, run
from tests.export.massive import with_massive_activations


def layers_of(graph: onnx_ir.Model) -> list[Product]:
    products = weight_products(graph)
    head = head_product(graph, products)
    return [product for product in products if product is not head]


@pytest.mark.parametrize("size", [1, 2, 7, 13, 32, 192, 576, 896, 2048])
def test_a_rotation_is_an_orthogonal_matrix_of_nearly_equal_numbers(size: int) -> None:
    small = spreading(size)
    np.testing.assert_allclose(small @ small.T, np.eye(size), rtol=0, atol=1e-5)
    assert np.abs(small).max() <= np.sqrt(2 / size) + 1e-6
    rotation = rotation_of(size)
    assert rotation.size == size
    whole = np.kron(rotation.left, rotation.right)
    assert np.abs(whole).max() <= 2 / np.sqrt(size) + 1e-6
    rng = np.random.default_rng(1)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, size), (size, 4)))
    np.testing.assert_allclose(rotation.rows(x), x @ whole, rtol=0, atol=1e-4)
    np.testing.assert_allclose(rotation.columns(w), whole.T @ w, rtol=0, atol=1e-4)
    np.testing.assert_allclose(rotation.inverse().rows(x @ whole), x, rtol=0, atol=1e-4)


def test_what_all_channels_share_becomes_no_large_one() -> None:
    shared = rotation_of(576).rows(np.ones((1, 576), np.float32))
    assert np.abs(shared).max() < 8  # without signs: 24


@pytest.mark.parametrize("tied", [True, False])
def test_the_rotated_decoder_computes_what_it_did_before(
    ort_bundle: Path, qwen2: Traced, tmp_path: Path, feeds: Sequence[Feeds], tied: bool
) -> None:
    """Tied, and untied with biases."""
    source, target = ort_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH
    if not tied:
        graph = onnx_ir.load(qwen2.decoder)
        ort_decoder(graph, qwen2.model.config)
        source = tmp_path / "untied.onnx"
        write_graph(graph, source)
    graph = onnx_ir.load(source)
    layers = layers_of(graph)
    views = rotate(graph, layers)
    write_graph(graph, target)
    for before, after in zip(run(source, *feeds[:4]), run(target, *feeds[:4]), strict=True):
        for name, value in before.items():
            np.testing.assert_allclose(after[name], value, rtol=0, atol=tolerances.REWRITE)
    # and what it says of inputs is what comes in there
    widths = {product.source: product.rows for product in layers}
    told = dict(inflows(source, widths, feeds[:4], views))
    for name, found in inflows(target, widths, feeds[:4]):
        largest = np.abs(found.hessian).max()
        np.testing.assert_allclose(
            told[name].hessian / largest, found.hessian / largest, rtol=0, atol=1e-4
        )
        assert told[name].rounding == pytest.approx(found.rounding, rel=0.05)


def test_large_channels_are_spread(
    ort_bundle: Path, tmp_path: Path, feeds: Sequence[Feeds]
) -> None:
    source, target = tmp_path / "massive.onnx", tmp_path / DECODER_GRAPH
    with_massive_activations(ort_bundle / DECODER_GRAPH, source)
    graph = onnx_ir.load(source)
    layers = layers_of(graph)
    normed = list(rotate(graph, layers))
    write_graph(graph, target)
    before, after = (magnitudes(path, normed, feeds) for path in (source, target))
    stands_out = [
        {name: sizes.max() / np.median(sizes) for name, sizes in found.items()}
        for found in (before, after)
    ]
    assert min(stands_out[0].values()) > 20
    assert max(stands_out[1].values()) < 5


def test_graphs_without_a_stream(qwen2: Traced) -> None:
    """A portable graph, whose norms are in pieces."""
    graph = onnx_ir.load(qwen2.decoder)
    with pytest.raises(ExportError, match="no residual stream that can be rotated"):
        rotate(graph, layers_of(graph))
