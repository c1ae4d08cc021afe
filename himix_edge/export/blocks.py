"""A weight matrix in blocks of few bits, as ONNX Runtime's MatMulNBits and GatherBlockQuantized
read it: a block of consecutive weights of one output shares a scale and a zero point.

    weight = (code - zero_point) * scale        0 <= code, zero_point < 2 ** bits

Two ways to choose the codes: `rtn` rounds every weight to the nearest one (ONNX Runtime's own
kernels); `gptq` rounds so that the product with what really comes in changes least (Frantar et al.,
2022, arXiv 2210.17323). ONNX Runtime 1.32 has a `gptq` too, but it passes no error on from one row
to the next (it reads the empty half of a triangular matrix), so that what it gives equals rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from himix_edge.errors import ExportError
from himix_edge.runtimes.providers import import_onnxruntime

KERNELS = import_onnxruntime().capi._pybind_state

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
Bits = Literal[4, 8]

DAMPING = 0.01  # GPTQ's: of the mean diagonal, added to it; the paper's figure
_ROWS_AT_A_TIME = 128  # of GPTQ: how many rows' errors are passed on together
_PARTS_OF_THE_SPAN = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)  # that grids are tried with
_MIB_OF_COLUMNS = 64  # how much of a matrix is laid out anew at a time


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix [K, N] in J = ceil(K / block_size) blocks to an output.

    Attributes:
        rows: K; the last block of an output is padded.
        packed: [N, J, block_size * bits / 8], of two 4-bit codes in a byte the first one low.
        scales: [N, J]
        zero_points: [N, ceil(J * bits / 8)], packed likewise.
    """

    bits: Bits
    block_size: int
    rows: int
    packed: Codes
    scales: Floats
    zero_points: Codes

    @property
    def columns(self) -> int:
        """N, the outputs."""
        return int(self.packed.shape[0])

    @property
    def stored_bits(self) -> int:
        """Of codes, scales and zero points together."""
        return 8 * (self.packed.nbytes + self.scales.nbytes + self.zero_points.nbytes)

    def dequantized(self) -> Floats:
        """The matrix [K, N] that the codes stand for."""
        columns, blocks = self.scales.shape
        codes = _unpacked(self.packed, self.bits).reshape(columns, blocks, self.block_size)
        zeros = _unpacked(self.zero_points, self.bits)[:, :blocks]
        weights = (codes.astype(np.float32) - zeros[..., None]) * self.scales[..., None]
        return np.ascontiguousarray(weights.reshape(columns, -1)[:, : self.rows].T)


def rtn(matrix: Floats, bits: Bits, block_size: int) -> Blocks:
    """Rounds to the nearest code; a block's codes span its weights and zero.

    Args:
        matrix: [K, N]

    Raises:
        ExportError: a weight that is not finite.
    """
    require_finite(matrix)
    kernel = KERNELS.quantize_matmul_4bits if bits == 4 else KERNELS.quantize_matmul_8bits
    rows, columns = matrix.shape
    blocks = -(-rows // block_size)
    packed = np.zeros((columns, blocks, block_size * bits // 8), np.uint8)
    scales = np.zeros((columns, blocks), np.float32)
    zero_points = np.zeros((columns, -(-blocks * bits // 8)), np.uint8)
    width = max(1, (_MIB_OF_COLUMNS << 20) // (4 * rows))
    for first in range(0, columns, width):
        some = slice(first, first + width)
        part = np.zeros((blocks * block_size, min(width, columns - first)), np.float32)
        part[:rows] = matrix[:, some]
        kernel(
            packed[some],
            part,
            scales[some],
            zero_points[some],
            block_size,
            part.shape[1],
            rows,
            False,
        )
    return Blocks(bits, block_size, rows, packed, scales, zero_points)


def gptq(matrix: Floats, hessian: Floats, bits: Bits, block_size: int) -> Blocks:
    """Rounds row by row, each row's error made good by the rows that are still to come.

    Args:
        matrix: [K, N]
        hessian: [K, K], the sum of x x^T over inputs x.

    Raises:
        ExportError: a weight or an input that is not finite.
    """
    top = 2**bits - 1
    codes, scales, zeros = gptq_codes(
        matrix, hessian, block_size, (0, top), lambda block, weights: grid_of(block, weights, top)
    )
    return Blocks(
        bits,
        block_size,
        len(matrix),
        _packed(np.ascontiguousarray(codes.astype(np.uint8).transpose(2, 0, 1)), bits),
        np.ascontiguousarray(scales.T),
        _packed(zeros.T.astype(np.uint8), bits),
    )


def gptq_codes(
    matrix: Floats,
    hessian: Floats,
    block_size: int,
    limits: tuple[int, int],
    grid: Callable[[Floats, Floats], tuple[Floats, Floats]],
) -> tuple[NDArray[np.int16], Floats, Floats]:
    """GPTQ on any grid: codes [J, block_size, N], scales [J, N], zero points [J, N].

    Grids are made beforehand, and rows are rounded in the order in which they matter, those with
    the largest inputs first, so that what is left over at the end weighs little.

    Args:
        matrix: [K, N]; its last block is padded with zeros.
        hessian: [K, K], the sum of x x^T over inputs x.
        limits: the least code and the greatest.
        grid: from a block [block_size, N] and its rows' weights [block_size], scale and zero
            point, each [N].

    Raises:
        ExportError: a weight or an input that is not finite.
    """
    require_finite(matrix)
    if not np.isfinite(hessian).all():
        raise ExportError(
            "cannot quantize with these calibration inputs",
            expected="finite numbers at every layer's input",
            found="others",
            fix="calibrate with inputs like those the model was trained on",
        )
    rows, columns = matrix.shape
    blocks = -(-rows // block_size)
    padded = np.zeros((blocks * block_size, columns), np.float32)
    padded[:rows] = matrix
    damped = _damped(hessian)
    weights = np.zeros(len(padded), np.float32)
    weights[:rows] = np.diag(damped)
    grids = [
        grid(padded[start : start + block_size], weights[start : start + block_size])
        for start in range(0, len(padded), block_size)
    ]
    scales, zeros = (np.stack(parts).astype(np.float32) for parts in zip(*grids, strict=True))
    order = np.argsort(-weights[:rows], kind="stable")
    chain = _error_chain(damped[np.ix_(order, order)])
    left = padded[order]  # what is still to be rounded
    codes = np.repeat(np.clip(np.round(zeros), *limits)[:, None], block_size, 1).astype(np.int16)
    for start in range(0, rows, _ROWS_AT_A_TIME):
        end = min(start + _ROWS_AT_A_TIME, rows)
        errors = np.empty((end - start, columns), np.float32)
        for i, row in enumerate(range(start, end)):
            block, place = divmod(int(order[row]), block_size)
            scale, zero = scales[block], zeros[block]
            codes[block, place] = code = np.clip(np.round(left[row] / scale) + zero, *limits)
            errors[i] = (left[row] - (code - zero) * scale) / chain[row, row]
            left[row + 1 : end] -= chain[row, row + 1 : end, None] * errors[i]
        left[end:] -= chain[start:end, end:].T @ errors
    return codes, scales, zeros


def grid_of(block: Floats, weights: Floats, top: int) -> tuple[Floats, Floats]:
    """The scale [N] and the zero point [N] with which a block loses least when it is rounded.

    The widest grid spans the block and zero; narrower ones cut off its largest weights, and have
    smaller steps for all the others.

    Args:
        block: [block_size, N]
        weights: [block_size], of the rows' squared errors.
        top: the greatest code; the least is 0.
    """
    low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
    best = np.full(block.shape[1], np.inf, np.float32)
    scale, zero = np.ones_like(best), np.zeros_like(best)
    for part in _PARTS_OF_THE_SPAN:
        step = (high - low) * np.float32(part / top)
        step[step == 0] = 1
        start = np.clip(np.round(-low * np.float32(part) / step), 0, top)
        codes = np.clip(np.round(block / step) + start, 0, top)
        lost = weights @ np.square((codes - start) * step - block)
        better = lost < best
        best[better], scale[better], zero[better] = lost[better], step[better], start[better]
    return scale, zero


def _damped(hessian: Floats) -> NDArray[np.float64]:
    """The Hessian [K, K] with a little more on its diagonal, so that it has an inverse."""
    damped = hessian.astype(np.float64)
    diagonal = np.einsum("ii->i", damped)
    mean = diagonal.mean() or 1.0
    diagonal[diagonal == 0] = mean  # an input that never fires has no error to pass on
    diagonal += DAMPING * mean
    return damped


def _error_chain(damped: NDArray[np.float64]) -> Floats:
    """[K, K], upper triangular: the Cholesky factor of the damped Hessian's inverse."""
    chain: Floats = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    return chain


def _packed(codes: Codes, bits: Bits) -> Codes:
    """Along the last axis, two 4-bit codes into a byte, the first one low."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., ::2] | (codes[..., 1::2] << np.uint8(4))


def _unpacked(packed: Codes, bits: Bits) -> Codes:
    """The inverse of `_packed`, with its padding."""
    if bits == 8:
        return packed
    codes: Codes = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
    return codes.reshape(*packed.shape[:-1], -1)


def require_finite(matrix: NDArray[Any]) -> None:
    if not np.isfinite(matrix).all():
        raise ExportError(
            "cannot quantize a weight",
            expected="finite numbers",
            found=f"{int((~np.isfinite(matrix)).sum())} that are not",
            fix="export from a sound checkpoint",
        )
