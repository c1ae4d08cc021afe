"""A weight matrix of floats -> codes, and DequantizeLinear in front of the product.

    MatMul(x, W)  ->  MatMul(x, DequantizeLinear(codes, scales))

codes [K, N], scales [N] (axis 1), or in int4 [K / block_size, N] (axis 0), one to a block. A Gemm
keeps its weight transposed, and so codes and scales. There is no zero point, because TensorRT
takes none. This is what TensorRT stores as it is and multiplies by in float16: a constant of these
types may stand in front of a DequantizeLinear and nowhere else, so that a table to look rows up in
must stay in floats.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir

from himix_edge.export.products import Product, initializer
from himix_edge.export.symmetric import CODES, Codes, Scales, WeightType

# The first opset whose DequantizeLinear takes such codes with scales in float16.
OPSETS: dict[WeightType, int] = {"int8": 19, "fp8": 19, "int4": 21}


def dequantize(
    graph: onnx_ir.Model,
    product: Product,
    weights: WeightType,
    scales: Scales,
    read_codes: Callable[[], Codes],
) -> None:
    """Gives a product its weight in codes, in place; the floats stay for whoever else reads them.

    The graph's opset rises to one that knows these codes, if need be.

    Args:
        scales: [J, N], a row for each block, which is all of K except in int4.
        read_codes: gives the codes [K, N]; called when the graph is written.
    """
    name, turned = product.weight.name, product.transposed
    dtype = onnx_ir.DataType.from_numpy(CODES[weights])

    def read() -> onnx_ir.TensorProtocol:
        codes = read_codes()
        return onnx_ir.Tensor(np.ascontiguousarray(codes.T if turned else codes), dtype=dtype)

    shape = onnx_ir.Shape(product.weight.shape or ())
    codes = onnx_ir.LazyTensor(read, dtype=dtype, shape=shape, name=f"{name}.codes")
    if weights == "int4":  # in blocks, be there only one: TensorRT knows no other int4
        attributes = {"axis": 1 if turned else 0, "block_size": product.rows // len(scales)}
        laid_out = np.ascontiguousarray(scales.T) if turned else scales
    else:
        attributes = {"axis": 0 if turned else 1}
        laid_out = scales[0]
    inputs = [
        initializer(graph, codes),
        initializer(graph, onnx_ir.tensor(laid_out, name=f"{name}.scales")),
    ]
    node = onnx_ir.Node(
        "",
        "DequantizeLinear",
        inputs,
        [onnx_ir.AttrInt64(key, value) for key, value in attributes.items()],
        name=f"{product.node.name}.dequantized",
    )
    graph.graph.insert_before(product.node, node)
    product.node.replace_input_with(1, node.outputs[0])
    graph.opset_imports[""] = max(graph.opset_imports[""], OPSETS[weights])
