"""A graph's products with weight matrices, as int8 products of ONNX Runtime's CPU.

Weights are 7-bit codes with a scale to each output; activations are rounded to 8 bits as they come,
with one scale to a tensor. Products that read the same input share its rounding. Biases are added
by the products.

Why 7 bits: x86 without VNNI (AVX2, most of the small machines in the field) adds two products of an
activation (0 to 255) and a weight in 16 bits, and cuts off what doesn't fit. Two products with
weights from -64 to 63 always do, so that a graph gives the same numbers on every machine. (ONNX
Runtime's "session.x64quantprecision" draws the line there too, and falls back to a kernel that
takes twice the time.) The bit costs little: the activations' rounding errors outweigh the weights'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from himix_edge.export.blocks import Floats, require_finite
from himix_edge.export.dialects import ORT_DOMAIN
from himix_edge.export.products import Product, initializer, named

LOWEST, HIGHEST = -64, 63
_LEAST_SCALE = np.float32(2.0**-100)  # of an output without weights


def replace_products(graph: onnx_ir.Model, products: Sequence[Product]) -> None:
    """Puts int8 products in the place of float ones, in place; weights are read one at a time.

    Raises:
        ExportError: a weight that is not finite.
    """
    graph.opset_imports[ORT_DOMAIN] = 1
    readers = Counter(product.source for product in products)
    rounded: dict[str, onnx_ir.Node] = {}
    for product in products:
        with named(product.weight):
            scales = scales_of(product.matrix())
        weights = [_codes(graph, product, scales), _scales(graph, product, scales)]
        if readers[product.source] > 1:
            shared = rounded.get(product.source) or _rounded(graph, product)
            rounded[product.source] = shared
            codes, scale, zero_point = shared.outputs
            inputs = [codes, weights[0], scale, weights[1], zero_point, None]
            _replace(graph, product, "MatMulIntegerToFloat", inputs)
        else:
            inputs = [product.node.inputs[0], *weights, None]
            _replace(graph, product, "DynamicQuantizeMatMul", inputs)


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


def _codes(graph: onnx_ir.Model, product: Product, scales: Floats) -> onnx_ir.Value:
    """Read and rounded when the file is written."""
    name = f"{product.weight.name}.codes"

    def read() -> onnx_ir.TensorProtocol:
        return onnx_ir.tensor(codes_of(product.matrix(), scales), name=name)

    shape = onnx_ir.Shape([product.rows, len(scales)])
    tensor = onnx_ir.LazyTensor(read, dtype=onnx_ir.DataType.INT8, shape=shape, name=name)
    return initializer(graph, tensor)


def _scales(graph: onnx_ir.Model, product: Product, scales: Floats) -> onnx_ir.Value:
    return initializer(graph, onnx_ir.tensor(scales, name=f"{product.weight.name}.scales"))


def _rounded(graph: onnx_ir.Model, product: Product) -> onnx_ir.Node:
    """The input of several products as codes, their scale and their zero point."""
    node = onnx_ir.Node("", "DynamicQuantizeLinear", [product.node.inputs[0]], num_outputs=3)
    graph.graph.insert_before(product.node, node)
    return node


def _replace(
    graph: onnx_ir.Model, product: Product, op_type: str, inputs: list[onnx_ir.Value | None]
) -> None:
    """Puts a quantized product in the place of a product and, where one follows, of its bias."""
    last, bias = product.node, None
    if added := _bias(product.node.outputs[0]):
        last, bias = added
    new = onnx_ir.Node(ORT_DOMAIN, op_type, [*inputs, bias], name=product.node.name)
    old: list[Any] = [product.node, last] if bias is not None else [product.node]
    onnx_ir.convenience.replace_nodes_and_values(
        graph.graph, last, old, [new], [last.outputs[0]], [new.outputs[0]]
    )


def _bias(value: onnx_ir.Value) -> tuple[onnx_ir.Node, onnx_ir.Value] | None:
    """The Add that is all that reads a value, and the constant vector that it adds."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    [(node, index)] = uses
    other = node.inputs[1 - index] if node.op_type == "Add" else None
    if other is None or not other.is_initializer() or len(other.shape or ()) != 1:
        return None
    return node, other
