"""A vision graph in int8 against the formula of its products, and the inputs that fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from himix_edge.contract import PIXEL_VALUES, VISION_GRAPH, present_names
from himix_edge.errors import ExportError
from himix_edge.export.cost import vision_cost
from himix_edge.export.expected import trial_images
from himix_edge.export.int8 import codes_of, scales_of
from himix_edge.export.products import FP32, weight_products
from himix_edge.export.quantize_vision import quantized_vision
from himix_edge.export.sessions import packed_session
from tests import tolerances
from tests.export.int8_formula import follow_the_formula
from tests.tiny import tiny_config

CONFIG = tiny_config()


@pytest.fixture
def source(ort_bundle: Path) -> Path:
    return ort_bundle / VISION_GRAPH


def test_keys_and_values_stay_close(source: Path, tmp_path: Path) -> None:
    target = tmp_path / VISION_GRAPH
    quantized_vision(source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        VISION_GRAPH,
        f"{VISION_GRAPH}.data",
    ]
    tensors = vision_cost(source, target, CONFIG, trial_images(CONFIG.preprocess))
    assert list(tensors) == present_names(2)
    for closeness in tensors.values():
        assert 0.99 < closeness.cosine < 1 - 1e-7
    before, after = packed_session(source), packed_session(target)
    for side in ("get_inputs", "get_outputs"):
        assert [(v.name, v.type, v.shape) for v in getattr(before, side)()] == [
            (v.name, v.type, v.shape) for v in getattr(after, side)()
        ]


def test_every_product_is_quantized_and_no_input_twice(source: Path, tmp_path: Path) -> None:
    quantized_vision(source, tmp_path / VISION_GRAPH)
    graph = onnx_ir.load(tmp_path / VISION_GRAPH)
    found = [node.op_type for node in graph.graph]
    assert found.count("MatMulIntegerToFloat") == 6 * 2 + 1  # of two layers; the projections
    assert found.count("QuantizeLinear") == 4 * 2 + 1  # q, k and v share theirs
    assert not weight_products(graph, [FP32])
    matrices = [v for v in graph.graph.initializers.values() if len(v.shape or ()) == 2]
    assert {v.dtype for v in matrices} == {onnx_ir.DataType.INT8}


def test_each_product_follows_the_formula(source: Path, tmp_path: Path) -> None:
    quantized_vision(source, tmp_path / VISION_GRAPH)
    pixels = np.random.default_rng(3).standard_normal((2, 3, 28, 28)).astype(np.float32)
    checked = follow_the_formula(source, tmp_path / VISION_GRAPH, {PIXEL_VALUES: pixels})
    assert checked == 6 * 2 + 1


def test_codes_have_seven_bits_and_every_weight_is_within_half_a_step() -> None:
    matrix = np.random.default_rng(0).standard_t(3, (96, 40)).astype(np.float32)
    matrix[:, 7] = 0
    scales = scales_of(matrix)
    codes = codes_of(matrix, scales)
    assert codes.dtype == np.int8
    assert (codes.min(), codes.max()) == (-64, 63)
    assert not codes[:, 7].any()
    error = np.abs(codes * scales.astype(np.float64) - matrix) / scales
    assert error.max() <= 0.5 + tolerances.ROUNDING_STEPS


def test_two_products_fit_into_sixteen_bits() -> None:
    """As processors without VNNI add them: activations 0..255, weights of the largest codes."""
    codes = codes_of(np.array([[1.0, -1], [1, -1]], np.float32), np.full(2, 1e-3, np.float32))
    sums = 255 * codes.astype(np.int64).sum(0)
    assert sums.tolist() == [255 * 2 * 63, -255 * 2 * 64]
    assert np.iinfo(np.int16).min <= sums.min() <= sums.max() <= np.iinfo(np.int16).max


def test_what_stood_there_is_replaced(source: Path, tmp_path: Path) -> None:
    def written() -> dict[str, bytes]:
        quantized_vision(source, tmp_path / VISION_GRAPH)
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    assert written() == written()


def test_the_source_s_folder_stays_as_it_was(source: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in source.parent.iterdir())
    quantized_vision(source, tmp_path / VISION_GRAPH)
    assert sorted(path.name for path in source.parent.iterdir()) == before


def test_a_quantized_graph_is_not_quantized_again(source: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.onnx", tmp_path / "twice.onnx"
    quantized_vision(source, once)
    with pytest.raises(ExportError, match=r"^once\.onnx has nothing to quantize"):
        quantized_vision(once, twice)
    assert not twice.exists()


def test_the_weight_that_is_not_finite_is_named(source: Path, tmp_path: Path) -> None:
    graph = onnx_ir.load(source)
    name = "vision.model.encoder.layers.1.mlp.fc2.weight.T"
    values = graph.graph.initializers[name].const_value.numpy().copy()  # type: ignore[union-attr]
    values[2, 3] = np.nan
    graph.graph.initializers[name].const_value = onnx_ir.tensor(values, name=name)
    broken = tmp_path / "broken.onnx"
    onnx_ir.save(graph, broken, external_data="broken.onnx.data")
    with pytest.raises(ExportError, match=rf"cannot quantize.*{name}.*expected finite numbers"):
        quantized_vision(broken, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
