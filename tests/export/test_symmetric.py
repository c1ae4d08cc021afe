"""Codes and scales against the formula, computed without the package and without onnx."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from himix_edge.errors import ExportError
from himix_edge.export import symmetric
from himix_edge.export.symmetric import WeightType, codes_of, dequantized, gptq, scales_of
from tests import tolerances

Array = NDArray[Any]
INTEGERS: list[tuple[WeightType, int | None, int, int]] = [
    ("int8", None, -128, 127),
    ("int4", 64, -8, 7),
    ("int4", 128, -8, 7),
]


def matrix(rows: int, columns: int, dtype: str = "float16") -> Array:
    """Off centre; the columns are of very different size, the least of float16 among them."""
    rng = np.random.default_rng(0)
    sizes = np.geomspace(2.0**-23, 1e2, columns)
    return ((rng.standard_normal((rows, columns)) + 0.3) * sizes).astype(dtype)


def steps(scales: Array, rows: int) -> Array:
    """The scale of each weight, in float64."""
    return np.repeat(scales.astype(np.float64), rows // len(scales), axis=0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("weights", "block_size", "low", "high"), INTEGERS)
def test_codes_are_the_nearest_and_reach_every_weight(
    weights: WeightType, block_size: int | None, low: int, high: int, dtype: str
) -> None:
    floats = matrix(256, 20, dtype)
    scales = scales_of(floats, weights, block_size)
    codes = codes_of(floats, weights, scales)
    assert scales.dtype == floats.dtype
    assert scales.shape == (256 // (block_size or 256), 20)
    assert (scales > 0).all()
    exact = floats.astype(np.float64) / steps(scales, 256)
    found = codes.astype(np.float64)
    np.testing.assert_array_equal(found, np.round(found))
    assert np.abs(found - exact).max() <= 0.5 + tolerances.ROUNDING_STEPS  # in steps
    assert found.min() >= low
    assert found.max() <= high
    np.testing.assert_array_equal(
        dequantized(codes, scales), (found * steps(scales, 256)).astype(np.float32)
    )


@pytest.mark.parametrize(("weights", "block_size", "low", "high"), INTEGERS)
def test_scales_are_no_larger_than_they_must_be(
    weights: WeightType, block_size: int | None, low: int, high: int
) -> None:
    floats = matrix(256, 20)
    scales = scales_of(floats, weights, block_size)
    for j, blocks in enumerate(np.split(floats.astype(np.float64), len(scales))):
        least = np.maximum(blocks.max(0) / high, blocks.min(0) / low)
        representable = np.maximum(least, 2.0**-24)
        gap = scales[j] - representable
        assert (gap >= 0).all()
        assert (gap <= np.spacing(scales[j]).astype(np.float64)).all()


def test_nothing_is_lost_that_needs_no_rounding() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(-8, 8, (128, 6))
    codes[0::64], codes[1::64] = 7, -8  # every block spans all codes
    floats = (codes * 0.25).astype(np.float16)
    scales = scales_of(floats, "int4", 64)
    np.testing.assert_array_equal(codes_of(floats, "int4", scales).astype(int), codes)
    np.testing.assert_array_equal(dequantized(codes_of(floats, "int4", scales), scales), floats)


def e4m3(code: int) -> float:
    """A byte's value by the format's definition: no infinities, NaN where all other bits are 1."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, fraction = code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    if exponent == 0:
        return sign * fraction / 8 * 2.0**-6
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


def test_fp8_is_the_nearest_of_all_bytes() -> None:
    floats = matrix(64, 20)
    scales = scales_of(floats, "fp8")
    codes = codes_of(floats, "fp8", scales)
    values = np.array([e4m3(code) for code in range(256)])
    finite = np.isfinite(values)
    wanted = floats.astype(np.float64) / steps(scales, 64)
    best = np.abs(wanted[..., None] - values[finite]).min(-1)
    found = values[codes.view(np.uint8)]
    np.testing.assert_array_equal(found, codes.astype(np.float64))
    np.testing.assert_allclose(np.abs(wanted - found), best, rtol=0, atol=448 * 1e-7)
    normal = np.abs(wanted) > 2.0**-6
    away = np.abs(found[normal] / wanted[normal] - 1)
    assert away.max() <= 2.0**-4 + 1e-6  # three bits of fraction
    assert np.abs(found).max() > 400


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_a_column_of_zeros(weights: WeightType) -> None:
    floats = matrix(64, 6)
    floats[:, 2] = 0
    scales = scales_of(floats, weights)
    assert (scales > 0).all()  # TensorRT refuses zero
    assert not dequantized(codes_of(floats, weights, scales), scales)[:, 2].any()


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_a_wide_matrix_is_rounded_in_parts(
    weights: WeightType, monkeypatch: pytest.MonkeyPatch
) -> None:
    floats = matrix(128, 50)
    block_size = 64 if weights == "int4" else None
    scales = scales_of(floats, weights, block_size)
    codes = codes_of(floats, weights, scales)
    monkeypatch.setattr(symmetric, "_MIB_OF_COLUMNS", 0)  # a column at a time
    np.testing.assert_array_equal(scales_of(floats, weights, block_size), scales)
    parts = codes_of(floats, weights, scales)
    np.testing.assert_array_equal(parts.astype(np.float32), codes.astype(np.float32))


def inputs(rows: int, seed: int) -> Array:
    """As a network has them: few directions bear most of it."""
    mixing = np.random.default_rng(5).standard_normal((8, rows))
    rng = np.random.default_rng(seed)
    return rng.standard_normal((500, 8)) @ mixing + 0.1 * rng.standard_normal((500, rows))


def test_gptq_is_its_paper_row_by_row() -> None:
    """Equation 3 of arXiv 2210.17323 without the Cholesky factor, on blocks of 64 rows.

    The rows with the largest inputs come first.
    """
    floats = np.random.default_rng(3).standard_normal((128, 5)).astype(np.float16)
    x = inputs(128, 1)
    hessian = x.T @ x
    inverse = np.linalg.inv(hessian + 0.01 * np.diag(hessian).mean() * np.eye(128))
    left = floats.astype(np.float64)
    expected = np.zeros_like(left)
    blocks = floats.astype(np.float64).reshape(2, 64, 5)
    scales_by_block = np.maximum(blocks.max(1) / 7, blocks.min(1) / -8)
    for row in np.argsort(-np.diag(hessian)):
        scale = scales_by_block[row // 64]
        expected[row] = np.clip(np.round(left[row] / scale), -8, 7) * scale
        error = (left[row] - expected[row]) / inverse[row, row]
        left -= np.outer(inverse[:, row], error)
        inverse -= np.outer(inverse[:, row], inverse[row]) / inverse[row, row]
    codes, scales = gptq(floats, hessian.astype(np.float32), "int4", 64)
    assert scales.shape == (2, 5)
    # Scales in float16 are larger by up to a thousandth, which may turn a weight between two codes.
    off = np.abs(dequantized(codes, scales) - expected) / scale
    assert (off < 0.05).mean() > 0.9
    product = np.linalg.norm(x @ (dequantized(codes, scales) - floats.astype(np.float64)))
    assert product == pytest.approx(np.linalg.norm(x @ (expected - floats)), rel=0.1)


@pytest.mark.parametrize(("weights", "block_size"), [("int4", 64), ("int8", None)])
@pytest.mark.parametrize("rows", [64, 192])  # 192: not all of the 128 rows at a time are there
def test_gptq_errs_less_than_rounding_on_inputs_it_has_not_seen(
    weights: WeightType, block_size: int | None, rows: int
) -> None:
    floats = np.random.default_rng(3).standard_normal((rows, 16)).astype(np.float16)
    seen, unseen = inputs(rows, 1), inputs(rows, 2)
    scales = scales_of(floats, weights, block_size)
    rounded = dequantized(codes_of(floats, weights, scales), scales)
    found = dequantized(*gptq(floats, (seen.T @ seen).astype(np.float32), weights, block_size))

    def error(quantized: Array) -> float:
        return float(
            np.linalg.norm(unseen @ (quantized - floats)) / np.linalg.norm(unseen @ floats)
        )

    assert error(found) < error(rounded) / 2


def test_int8_by_gptq_keeps_the_scales_of_whole_columns() -> None:
    floats = matrix(200, 6)
    x = inputs(200, 1)
    codes, scales = gptq(floats, (x.T @ x).astype(np.float32), "int8")
    assert codes.shape == (200, 6)
    np.testing.assert_array_equal(scales, scales_of(floats, "int8"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers(bad: float) -> None:
    floats = matrix(64, 6)
    floats[3, 4] = bad
    with pytest.raises(ExportError, match="expected finite numbers, found 1 that are not"):
        scales_of(floats, "int8")
    with pytest.raises(ExportError, match="expected finite numbers, found 1 that are not"):
        gptq(floats, np.eye(64, dtype=np.float32), "int4", 64)
