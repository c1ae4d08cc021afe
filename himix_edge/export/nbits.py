"""A graph's products with weight matrices, as ONNX Runtime's products with blocks of few bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from himix_edge.errors import ExportError
from himix_edge.export.blocks import Blocks, Floats

DOMAIN = "com.microsoft"
ACCURACY_LEVEL = 4  # int8 products: on a CPU twice as fast as others in int4, twenty times in int8


class Product(NamedTuple):
    """A node that multiplies by a weight matrix."""

    node: onnx_ir.Node
    weight: onnx_ir.Value
    transposed: bool  # whether the weight is stored as [N, K]

    @property
    def source(self) -> str:
        """The name of what comes in."""
        return str(self.node.inputs[0].name)  # type: ignore[union-attr]

    def matrix(self) -> Floats:
        """[K, N]"""
        stored = floats_of(self.weight)
        return stored.T if self.transposed else stored

    @property
    def rows(self) -> int:
        """K"""
        return int(self.weight.shape[1 if self.transposed else 0])  # type: ignore[index,arg-type]


def weight_products(graph: onnx_ir.Model) -> list[Product]:
    """Every node that multiplies by an fp32 weight matrix, in the order of the graph."""
    found = []
    for node in graph.graph:
        if node.domain or not (node.op_type == "MatMul" or _plain_gemm(node)):
            continue
        weight = node.inputs[1]
        if weight is not None and is_float_matrix(weight):
            found.append(Product(node, weight, transposed=node.op_type == "Gemm"))
    return found


def is_float_matrix(value: onnx_ir.Value) -> bool:
    return (
        value.is_initializer()
        and value.dtype is onnx_ir.DataType.FLOAT
        and value.shape is not None
        and len(value.shape) == 2
    )


def _plain_gemm(node: onnx_ir.Node) -> bool:
    """x W^T and nothing else."""
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    return (
        node.op_type == "Gemm"
        and len(node.inputs) == 2
        and options.get("transB", 0) == 1
        and options.get("transA", 0) == 0
        and options.get("alpha", 1.0) == 1.0
    )


def replace_product(graph: onnx_ir.Model, product: Product, blocks: Blocks) -> list[onnx_ir.Value]:
    """Puts a MatMulNBits in the place of a product; gives its codes, scales and zero points."""
    parts = initializers(graph, str(product.weight.name), blocks)
    attributes = {
        "K": blocks.rows,
        "N": blocks.columns,
        "bits": blocks.bits,
        "block_size": blocks.block_size,
        "accuracy_level": ACCURACY_LEVEL,
    }
    _swap(graph, product.node, "MatMulNBits", [product.node.inputs[0], *parts], attributes)
    return parts


def replace_lookup(
    graph: onnx_ir.Model, node: onnx_ir.Node, blocks: Blocks, parts: Sequence[onnx_ir.Value]
) -> None:
    """Puts a GatherBlockQuantized in the place of a lookup of rows."""
    codes, scales, zero_points = parts
    shape = _initializer(graph, f"{codes.name}.rows", np.array([blocks.columns, -1]))
    rows = onnx_ir.Node("", "Reshape", [codes, shape], name=f"{node.name}.rows")
    graph.graph.insert_before(node, rows)
    attributes = {
        "bits": blocks.bits,
        "block_size": blocks.block_size,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    inputs = [rows.outputs[0], node.inputs[1], scales, zero_points]
    _swap(graph, node, "GatherBlockQuantized", inputs, attributes)


def _swap(
    graph: onnx_ir.Model,
    old: onnx_ir.Node,
    op_type: str,
    inputs: Sequence[onnx_ir.Value | None],
    attributes: dict[str, int],
) -> None:
    attribute_list = [onnx_ir.AttrInt64(name, value) for name, value in attributes.items()]
    new = onnx_ir.Node(DOMAIN, op_type, inputs, attribute_list, name=old.name)
    onnx_ir.convenience.replace_nodes_and_values(
        graph.graph, old, [old], [new], [old.outputs[0]], [new.outputs[0]]
    )


def initializers(graph: onnx_ir.Model, name: str, blocks: Blocks) -> list[onnx_ir.Value]:
    return [
        _initializer(graph, f"{name}.{part}", array)
        for part, array in (
            ("codes", blocks.packed),
            ("scales", blocks.scales),
            ("zero_points", blocks.zero_points),
        )
    ]


def _initializer(graph: onnx_ir.Model, name: str, array: NDArray[Any]) -> onnx_ir.Value:
    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(
        name=name,
        type=onnx_ir.TensorType(tensor.dtype),
        shape=onnx_ir.Shape(array.shape),
        const_value=tensor,
    )
    graph.graph.register_initializer(value)
    return value


def floats_of(weight: onnx_ir.Value) -> Floats:
    """As stored; read from the file, and not kept."""
    tensor = weight.const_value
    if tensor is None:
        raise ExportError(f"{weight.name} has no value", fix="export the fp32 graph again")
    array: Floats = np.array(tensor.numpy())
    if isinstance(tensor, onnx_ir.ExternalTensor):
        tensor.release()
    return array
