"""A weight matrix [K, N] as TensorRT's DequantizeLinear reads it: codes, and scales above zero.

    weight = code * scale                no zero points: TensorRT knows none

    int8    -128..127    a scale to each output
    fp8     e4m3fn, to 448    a scale to each output
    int4    -8..7        a scale to each block of 64 or 128 weights of an output

Scales are in the type of the weights, rounded up, so that no weight is out of the codes' reach and
the error of each is half a step at most. https://docs.nvidia.com/deeplearning/tensorrt/latest/
inference-library/quantized-types-schemes.html has TensorRT's side of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from himix_edge.export.blocks import Floats, gptq_codes, require_finite

WeightType = Literal["int8", "int4", "fp8"]
Codes: TypeAlias = NDArray[Any]  # [K, N] of int8, int4 or float8_e4m3fn
Scales: TypeAlias = NDArray[Any]  # [J, N] of float16 or float32; J blocks of rows, or 1

LIMITS: dict[WeightType, tuple[int, int]] = {
    "int8": (-128, 127),
    "int4": (-8, 7),
    "fp8": (-448, 448),
}
CODES = {
    "int8": np.dtype(np.int8),
    "int4": np.dtype(ml_dtypes.int4),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}

_LEAST_SCALE = 2.0**-24  # of float16, and its least step: what it can hold, such codes can
_GPTQ_ROWS = 128  # how many rows' errors are passed on at a time where blocks don't say
_MIB_OF_COLUMNS = 64  # how much of a matrix is in fp32 at a time


def scales_of(matrix: NDArray[Any], weights: WeightType, block_size: int | None = None) -> Scales:
    """For each block of rows of each column, the least scale that has codes for all of it.

    Args:
        matrix: [K, N]
        block_size: divides K; None is K.

    Raises:
        ExportError: a weight that is not finite.
    """
    require_finite(matrix)
    rows, columns = matrix.shape
    low, high = LIMITS[weights]
    blocks = rows // (block_size or rows)
    scales = np.empty((blocks, columns), matrix.dtype)
    for some in _parts(matrix):
        part = matrix[:, some].astype(np.float32)
        part = part.reshape(blocks, -1, part.shape[1])
        least = np.maximum(part.max(1) / high, part.min(1) / low)
        scales[:, some] = _rounded_up(least, matrix.dtype)
    return scales


def codes_of(matrix: NDArray[Any], weights: WeightType, scales: Scales) -> Codes:
    """Every weight's nearest code, ties to even, laid out in memory as the matrix is."""
    codes = np.empty_like(matrix, CODES[weights])
    for some in _parts(matrix):
        steps = np.repeat(scales[:, some].astype(np.float32), len(matrix) // len(scales), axis=0)
        wide = matrix[:, some].astype(np.float32) / steps
        codes[:, some] = wide if weights == "fp8" else np.clip(np.rint(wide), *LIMITS[weights])
    return codes


def gptq(
    matrix: NDArray[Any], hessian: Floats, weights: WeightType, block_size: int | None = None
) -> tuple[Codes, Scales]:
    """Integers chosen as `blocks.gptq` chooses them.

    Args:
        matrix: [K, N]
        hessian: [K, K], the sum of x x^T over inputs x.
        block_size: divides K; None is K.

    Raises:
        ExportError: a weight or an input that is not finite.
    """
    whole = scales_of(matrix, weights)
    rows, columns = matrix.shape

    def grid(block: Floats, _weights: Floats) -> tuple[Floats, Floats]:
        scales = whole if block_size is None else scales_of(block.astype(matrix.dtype), weights)
        return scales[0].astype(np.float32), np.zeros(columns, np.float32)

    blocks, scales, _ = gptq_codes(
        matrix.astype(np.float32), hessian, block_size or _GPTQ_ROWS, LIMITS[weights], grid
    )
    codes = blocks.reshape(-1, columns)[:rows].astype(CODES[weights])
    return codes, scales.astype(matrix.dtype) if block_size else whole


def dequantized(codes: Codes, scales: Scales) -> Floats:
    """The matrix [K, N] that codes and scales stand for."""
    steps = np.repeat(scales.astype(np.float32), len(codes) // len(scales), axis=0)
    weights: Floats = codes.astype(np.float32) * steps
    return weights


def _rounded_up(scales: Floats, dtype: np.dtype[Any]) -> Scales:
    """In a narrower type, and above zero."""
    narrow: Scales = scales.astype(dtype)
    narrow = np.where(narrow < scales, np.nextafter(narrow, np.inf, dtype=dtype), narrow)
    narrow[narrow < _LEAST_SCALE] = _LEAST_SCALE
    return narrow


def _parts(matrix: NDArray[Any]) -> Iterator[slice]:
    """Columns, so many at a time that they may be in fp32."""
    width = max(1, (_MIB_OF_COLUMNS << 20) // (4 * len(matrix)))
    for first in range(0, matrix.shape[1], width):
        yield slice(first, first + width)
