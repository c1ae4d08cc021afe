"""Codes, scales and zero points against the formula, and as ONNX Runtime reads them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest

from himix_edge.errors import ExportError
from himix_edge.export.blocks import Bits, Blocks, Floats, gptq, grid_of, rtn
from tests import tolerances


def matrix(rows: int, columns: int, seed: int = 0) -> Floats:
    """Off centre, so that zero points matter; the columns are of very different size."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(1e-3, 1e2, columns)
    return ((rng.standard_normal((rows, columns)) + 0.3) * sizes).astype(np.float32)


def rounded_by_hand(weights: Floats, bits: int, block_size: int) -> tuple[Floats, Floats]:
    """Loop by loop: what rounding to nearest gives, and the step of each weight."""
    result, steps = np.zeros_like(weights), np.zeros_like(weights)
    for column in range(weights.shape[1]):
        for start in range(0, weights.shape[0], block_size):
            block = weights[start : start + block_size, column].astype(np.float64)
            low, high = min(block.min(), 0.0), max(block.max(), 0.0)
            step = (high - low) / (2**bits - 1) or 1.0
            zero = np.round(-low / step)
            codes = np.clip(np.round(block / step) + zero, 0, 2**bits - 1)
            result[start : start + block_size, column] = (codes - zero) * step
            steps[start : start + block_size, column] = step
    return result, steps


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("rows", [32, 128, 192, 200])  # 200: a last block that is padded
def test_rounding_is_the_formula(rows: int, block_size: int, bits: Bits) -> None:
    weights = matrix(rows, 12)
    blocks = rtn(weights, bits, block_size)
    found = blocks.dequantized()
    expected, steps = rounded_by_hand(weights, bits, block_size)
    difference = np.abs(found - expected) / steps
    # The kernel takes one reciprocal for a block: a weight between two codes may fall either way.
    assert (difference > tolerances.ROUNDING_STEPS).mean() < 0.01
    assert difference.max() < 1 + tolerances.ROUNDING_STEPS
    # half a step, and half a step of the zero point's own error, at the ends of a block
    assert np.all(np.abs(found - weights) <= (1 + tolerances.ROUNDING_STEPS) * steps)
    assert (np.abs(found - weights) <= (0.5 + tolerances.ROUNDING_STEPS) * steps).mean() > 0.97


@pytest.mark.parametrize("bits", [4, 8])
def test_the_layout(bits: Bits) -> None:
    blocks = rtn(matrix(96, 5), bits, 32)
    assert (blocks.rows, blocks.columns) == (96, 5)
    assert blocks.packed.shape == (5, 3, 32 * bits // 8)
    assert blocks.scales.shape == (5, 3)
    assert blocks.zero_points.shape == (5, 3 if bits == 8 else 2)
    assert {str(a.dtype) for a in (blocks.packed, blocks.zero_points)} == {"uint8"}


def test_nothing_is_lost_that_needs_no_rounding() -> None:
    codes = np.random.default_rng(1).integers(0, 16, (64, 6))
    codes[0::32], codes[1::32] = 0, 15  # every block spans all codes
    weights = ((codes - 5) * 0.25).astype(np.float32)
    np.testing.assert_allclose(rtn(weights, 4, 32).dequantized(), weights, rtol=0, atol=1e-6)


def test_zeros_stay_zeros() -> None:
    weights = matrix(64, 4)
    weights[:32, 1] = 0
    weights[5] = 0
    found = rtn(weights, 4, 32).dequantized()
    assert not found[:32, 1].any()
    assert not found[5].any()


def test_a_wide_matrix_is_quantized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = matrix(64, 50)
    whole = rtn(weights, 4, 32)
    monkeypatch.setattr("himix_edge.export.blocks._MIB_OF_COLUMNS", 0)  # a column at a time
    parts = rtn(weights, 4, 32)
    np.testing.assert_array_equal(whole.packed, parts.packed)
    np.testing.assert_array_equal(whole.scales, parts.scales)
    np.testing.assert_array_equal(whole.zero_points, parts.zero_points)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "block_size"), [(96, 32), (192, 128), (200, 64)])
def test_onnx_runtime_reads_the_same_matrix(
    rows: int, block_size: int, bits: Bits, method: str
) -> None:
    """MatMulNBits over unit vectors against `dequantized`."""
    weights = matrix(rows, 16)
    inputs = np.random.default_rng(2).standard_normal((300, rows)).astype(np.float32)
    blocks = (
        rtn(weights, bits, block_size)
        if method == "rtn"
        else gptq(weights, inputs.T @ inputs, bits, block_size)
    )
    read = matmul_nbits(np.eye(rows, dtype=np.float32), blocks)
    np.testing.assert_allclose(
        read / np.abs(weights).max(0),
        blocks.dequantized() / np.abs(weights).max(0),
        rtol=0,
        atol=tolerances.DEQUANTIZED_WEIGHTS,
    )


def matmul_nbits(x: Floats, blocks: Blocks) -> Floats:
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales", "zero_points"],
        ["y"],
        domain="com.microsoft",
        K=blocks.rows,
        N=blocks.columns,
        bits=blocks.bits,
        block_size=blocks.block_size,
    )
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [value("x", onnx.TensorProto.FLOAT, ["m", blocks.rows])],
        [value("y", onnx.TensorProto.FLOAT, ["m", blocks.columns])],
        [
            onnx.numpy_helper.from_array(blocks.packed, "codes"),
            onnx.numpy_helper.from_array(blocks.scales, "scales"),
            onnx.numpy_helper.from_array(blocks.zero_points, "zero_points"),
        ],
    )
    model = onnx.helper.make_model(
        graph,
        ir_version=10,
        opset_imports=[onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(node.domain, 1)],
    )
    session = onnxruntime.InferenceSession(model.SerializeToString())
    y: Floats = session.run(None, {"x": x})[0]
    return y


def correlated(rows: int, count: int, seed: int) -> Floats:
    """Inputs as a network has them: few directions bear most of it."""
    mixing = np.random.default_rng(5).standard_normal((8, rows))
    rng = np.random.default_rng(seed)
    noise = 0.1 * rng.standard_normal((count, rows))
    return (rng.standard_normal((count, 8)) @ mixing + noise).astype(np.float32)


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_gptq_errs_less_than_rounding_on_inputs_it_has_not_seen(block_size: int) -> None:
    weights = np.random.default_rng(3).standard_normal((192, 64)).astype(np.float32)
    seen, unseen = correlated(192, 500, 1), correlated(192, 500, 2)
    rounded = rtn(weights, 4, block_size).dequantized()
    found = gptq(weights, seen.T @ seen, 4, block_size).dequantized()

    def error(quantized: Floats) -> float:
        return float(
            np.linalg.norm(unseen @ (quantized - weights)) / np.linalg.norm(unseen @ weights)
        )

    assert error(found) < error(rounded) / 3
    assert error(found) < 0.03


def test_gptq_is_its_paper_row_by_row() -> None:
    """Algorithm 1 of arXiv 2210.17323 as equation 3 states it, without the Cholesky factor.

    After a row is rounded, it leaves the problem: the inverse Hessian loses its row and column.
    The rows with the largest inputs come first.
    """
    weights = matrix(32, 3)
    inputs = correlated(32, 200, 1).astype(np.float64)
    hessian = inputs.T @ inputs
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(32)
    inverse = np.linalg.inv(damped)
    left = weights.astype(np.float64)
    scale, zero = grid_of(weights, np.diag(damped).astype(np.float32), 15)
    expected = np.zeros_like(left)
    for row in np.argsort(-np.diag(hessian)):
        codes = np.clip(np.round(left[row] / scale) + zero, 0, 15)
        expected[row] = (codes - zero) * scale
        error = (left[row] - expected[row]) / inverse[row, row]
        left -= np.outer(inverse[:, row], error)
        inverse -= np.outer(inverse[:, row], inverse[row]) / inverse[row, row]
    found = gptq(weights, hessian.astype(np.float32), 4, 32).dequantized()
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=1e-3)


def test_gptq_with_inputs_all_alike_or_absent() -> None:
    """Without correlation there is nothing to make good: rounding to the same grid."""
    weights = matrix(64, 6)
    expected = np.empty_like(weights)
    for some in (slice(0, 32), slice(32, 64)):
        scale, zero = grid_of(weights[some], np.ones(32, np.float32), 15)
        codes = np.clip(np.round(weights[some] / scale) + zero, 0, 15)
        expected[some] = (codes - zero) * scale
    for hessian in (np.eye(64, dtype=np.float32), np.zeros((64, 64), np.float32)):
        found = gptq(weights, hessian, 4, 32).dequantized()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_grids_that_cut_off_the_largest_weights_where_that_loses_less() -> None:
    """Against every part of the span, weight by weight."""
    block = np.random.default_rng(4).standard_t(3, (32, 5)).astype(np.float32)
    block[:, 4] = 0
    weights = np.random.default_rng(5).uniform(0.1, 10, 32).astype(np.float32)
    scale, zero = grid_of(block, weights, 15)
    parts = []
    for column in range(4):
        low, high = min(block[:, column].min(), 0), max(block[:, column].max(), 0)
        losses = {}
        for part in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65):
            step = part * (high - low) / 15
            first = min(max(round(-low * part / step), 0), 15)
            codes = [min(max(round(w / step) + first, 0), 15) for w in block[:, column]]
            errors = [(c - first) * step - w for c, w in zip(codes, block[:, column], strict=True)]
            losses[part] = sum(w * e * e for w, e in zip(weights, errors, strict=True))
        best = min(losses, key=lambda part: losses[part])
        assert scale[column] == pytest.approx(best * (high - low) / 15, rel=1e-5)
        parts.append(best)
    assert min(parts) < 1
    assert (scale[4], zero[4]) == (1, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(bad: float) -> None:
    weights = matrix(64, 6)
    weights[3, 4] = bad
    with pytest.raises(ExportError, match=r"expected finite numbers, found 1 that are not"):
        rtn(weights, 4, 32)
    with pytest.raises(ExportError, match=r"expected finite numbers, found 1 that are not"):
        gptq(weights, np.eye(64, dtype=np.float32), 4, 32)


def test_inputs_that_are_no_numbers() -> None:
    hessian = np.full((64, 64), np.nan, np.float32)
    with pytest.raises(ExportError, match="calibration inputs"):
        gptq(matrix(64, 6), hessian, 4, 32)
