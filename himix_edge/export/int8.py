"""A graph's products with weight matrices, as int8 products of ONNX Runtime's CPU.

Weights are 7-bit codes with a scale to each output; activations are rounded to 8 bits as they come,
with a scale s to each row x, which is a token or a patch of a picture:

    s = max(max(x) / 127, -min(x) / 128)        q = round(x / s) + 128        y = s ((q - 128) W)

So the numbers of a row depend on that row alone, never on those beside it: a prompt gives the same
in one step and in many, a picture alone and among others. ONNX Runtime's products take one scale to
a tensor; they get 1, and what comes out is multiplied by the rows'. Products that read the same
input share its rounding.

Why 7 bits: x86 without VNNI (AVX2, most of the small machines in the field) adds two products of an
activation (0 to 255) and a weight in 16 bits, and cuts off what doesn't fit. Two products with
weights from -64 to 63 always do, so that a graph gives the same numbers on every machine. (ONNX
Runtime's "session.x64quantprecision" draws the line there too, and falls back to a kernel that
takes twice the time.) The bit costs little: the activations' rounding errors outweigh the weights'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from himix_edge.export.blocks import Floats, gptq_codes, require_finite
from himix_edge.export.dialects import ORT_DOMAIN
from himix_edge.export.products import Product, initializer, named

LOWEST, HIGHEST = -64, 63
ZERO_POINT = 128
_LEAST_SCALE = np.float32(2.0**-100)  # of an output without weights, and of a row of zeros


def replace_products(
    graph: onnx_ir.Model,
    products: Sequence[Product],
    known: Mapping[str, NDArray[np.int8]] | None = None,
) -> None:
    """Puts int8 products in the place of float ones, in place; weights are read one at a time.

    Args:
        known: codes [K, N] that were found otherwise than by rounding, on the same scales, by the
            name of the weight.

    Raises:
        ExportError: a weight that is not finite.
    """
    graph.opset_imports[ORT_DOMAIN] = 1
    constants = _constants(graph)
    rounded: dict[str, _Rows] = {}
    for product in products:
        with named(product.weight):
            scales = scales_of(product.matrix())
        rows = rounded.get(product.source) or _rounded(graph, product, constants)
        rounded[product.source] = rows
        codes = known.get(str(product.weight.name)) if known else None
        weights = [_codes(graph, product, scales, codes), _scales(graph, product, scales)]
        _replace(graph, product, rows, weights, constants)


def scales_of(matrix: Floats) -> Floats:
    """For each output, the least scale that has codes for all of its weights: [N].

    Args:
        matrix: [K, N]

    Raises:
        ExportError: a weight that is not finite.
    """
    require_finite(matrix)
    least = np.maximum(matrix.max(0) / HIGHEST, matrix.min(0) / LOWEST)
    scales: Floats = np.maximum(least, _LEAST_SCALE)
    return scales


def codes_of(matrix: Floats, scales: Floats) -> NDArray[np.int8]:
    """Every weight's nearest code: [K, N]."""
    codes: NDArray[np.int8] = np.clip(np.rint(matrix / scales), LOWEST, HIGHEST).astype(np.int8)
    return codes


def gptq(matrix: Floats, hessian: Floats) -> NDArray[np.int8]:
    """Codes with which the product changes least on what comes in, see blocks.py: [K, N].

    Args:
        matrix: [K, N]
        hessian: [K, K], the sum of x x^T over inputs x.

    Raises:
        ExportError: a weight or an input that is not finite.
    """
    scales = scales_of(matrix)
    zeros = np.zeros_like(scales)
    codes, _, _ = gptq_codes(
        matrix, hessian, len(matrix), (LOWEST, HIGHEST), lambda _block, _weights: (scales, zeros)
    )
    found: NDArray[np.int8] = codes[0].astype(np.int8)
    return found


def _codes(
    graph: onnx_ir.Model, product: Product, scales: Floats, known: NDArray[np.int8] | None
) -> onnx_ir.Value:
    """Read and rounded when the file is written, unless they are known."""
    name = f"{product.weight.name}.codes"
    if known is not None:
        return initializer(graph, onnx_ir.tensor(known, name=name))

    def read() -> onnx_ir.TensorProtocol:
        return onnx_ir.tensor(codes_of(product.matrix(), scales), name=name)

    shape = onnx_ir.Shape([product.rows, len(scales)])
    tensor = onnx_ir.LazyTensor(read, dtype=onnx_ir.DataType.INT8, shape=shape, name=name)
    return initializer(graph, tensor)


def _scales(graph: onnx_ir.Model, product: Product, scales: Floats) -> onnx_ir.Value:
    return initializer(graph, onnx_ir.tensor(scales, name=f"{product.weight.name}.scales"))


class _Constants(NamedTuple):
    """What every rounding needs."""

    one: onnx_ir.Value
    zero_point: onnx_ir.Value
    steps_above: onnx_ir.Value
    steps_below: onnx_ir.Value
    least_scale: onnx_ir.Value
    last_axis: onnx_ir.Value
    flat: onnx_ir.Value


def _constants(graph: onnx_ir.Model) -> _Constants:
    arrays: dict[str, NDArray[Any]] = {
        "one": np.array(1, np.float32),
        "zero_point": np.array(ZERO_POINT, np.uint8),
        "steps_above": np.array(1 / (255 - ZERO_POINT), np.float32),
        "steps_below": np.array(-1 / ZERO_POINT, np.float32),
        "least_scale": np.array(_LEAST_SCALE),
        "last_axis": np.array([-1]),
        "flat": np.array([-1]),
    }
    return _Constants(
        *(
            initializer(graph, onnx_ir.tensor(array, name=f"int8.{name}"))
            for name, array in arrays.items()
        )
    )


class _Rows(NamedTuple):
    """Rows [..., K] as codes, and their scales [..., 1]."""

    codes: onnx_ir.Value
    scales: onnx_ir.Value


def _rounded(graph: onnx_ir.Model, product: Product, constants: _Constants) -> _Rows:
    """What comes in at a product, in front of it.

    ONNX Runtime rounds fast with a scale to each index of one axis, hence the flat rows [R, K].
    """

    def put(op_type: str, *inputs: onnx_ir.Value, **attributes: Any) -> onnx_ir.Value:
        node = onnx_ir.node(op_type, inputs, attributes)
        graph.graph.insert_before(product.node, node)
        return node.outputs[0]

    x: onnx_ir.Value = product.node.inputs[0]  # type: ignore[assignment]
    above = put("Mul", put("ReduceMax", x, constants.last_axis), constants.steps_above)
    below = put("Mul", put("ReduceMin", x, constants.last_axis), constants.steps_below)
    scales = put("Max", above, below, constants.least_scale)  # [..., 1]
    flat_scales = put("Reshape", scales, constants.flat)  # [R]
    zero_point = onnx_ir.tensor(np.array([ZERO_POINT], np.uint8))
    zero_points = put("ConstantOfShape", put("Shape", flat_scales), value=zero_point)
    rows = initializer(
        graph, onnx_ir.tensor(np.array([-1, product.rows]), name=f"{product.weight.name}.rows")
    )
    flat = put("Reshape", x, rows)
    codes = put("QuantizeLinear", flat, flat_scales, zero_points, axis=0)
    return _Rows(put("Reshape", codes, put("Shape", x)), scales)


def _replace(
    graph: onnx_ir.Model,
    product: Product,
    rows: _Rows,
    weights: Sequence[onnx_ir.Value],
    constants: _Constants,
) -> None:
    """Puts a quantized product in the place of a product."""
    codes, scales = weights
    inputs = [rows.codes, codes, constants.one, scales, constants.zero_point]
    new = onnx_ir.Node(ORT_DOMAIN, "MatMulIntegerToFloat", inputs, name=product.node.name)
    scaled = onnx_ir.Node("", "Mul", [new.outputs[0], rows.scales])
    old = product.node
    onnx_ir.convenience.replace_nodes_and_values(
        graph.graph, old, [old], [new, scaled], [old.outputs[0]], [scaled.outputs[0]]
    )
