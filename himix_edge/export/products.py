"""A graph's products with weight matrices, and the weights themselves, read one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from himix_edge.contract import LOGITS
from himix_edge.errors import ExportError

FP32, FP16 = onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16


class Product(NamedTuple):
    """A node that multiplies by a weight matrix."""

    node: onnx_ir.Node
    weight: onnx_ir.Value
    transposed: bool  # whether the weight is stored as [N, K]

    @property
    def source(self) -> str:
        """The name of what comes in."""
        return str(self.node.inputs[0].name)  # type: ignore[union-attr]

    def matrix(self) -> NDArray[Any]:
        """[K, N], as stored in float32 or float16"""
        stored = floats_of(self.weight)
        return stored.T if self.transposed else stored

    @property
    def rows(self) -> int:
        """K"""
        return int(self.weight.shape[1 if self.transposed else 0])  # type: ignore[index,arg-type]


def weight_products(
    graph: onnx_ir.Model, dtypes: Collection[onnx_ir.DataType] = (FP32, FP16)
) -> list[Product]:
    """Every node that multiplies by a matrix of such numbers, in the order of the graph."""
    found = []
    for node in graph.graph:
        if node.domain or not (node.op_type == "MatMul" or _plain_gemm(node)):
            continue
        weight = node.inputs[1]
        if weight is not None and is_matrix(weight) and weight.dtype in dtypes:
            found.append(Product(node, weight, transposed=node.op_type == "Gemm"))
    return found


def head_product(graph: onnx_ir.Model, products: Sequence[Product]) -> Product | None:
    """The product that the logits come from, nothing but reshaping in between."""
    by_node = {id(product.node): product for product in products}
    value = next((output for output in graph.graph.outputs if output.name == LOGITS), None)
    while value is not None and (node := value.producer()) is not None:
        if id(node) in by_node:
            return by_node[id(node)]
        value = node.inputs[0]
    return None


def is_matrix(value: onnx_ir.Value) -> bool:
    return value.is_initializer() and value.shape is not None and len(value.shape) == 2


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


def floats_of(weight: onnx_ir.Value) -> NDArray[Any]:
    """As stored; read from the file, and not kept."""
    tensor = weight.const_value
    if tensor is None:
        raise ExportError(f"{weight.name} has no value", fix="export the graph again")
    array = np.array(tensor.numpy())
    if isinstance(tensor, onnx_ir.ExternalTensor):
        tensor.release()
    return array


def initializer(graph: onnx_ir.Model, tensor: onnx_ir.TensorProtocol) -> onnx_ir.Value:
    """A new constant of the graph, under the tensor's name."""
    value = onnx_ir.Value(
        name=tensor.name,
        type=onnx_ir.TensorType(tensor.dtype),
        shape=onnx_ir.Shape(tensor.shape),  # type: ignore[arg-type]
        const_value=tensor,
    )
    graph.graph.register_initializer(value)
    return value


def drop_unused_initializers(graph: onnx_ir.Model) -> None:
    initializers = graph.graph.initializers
    for name in [name for name, value in initializers.items() if not value.uses()]:
        del initializers[name]


@contextlib.contextmanager
def named(weight: onnx_ir.Value) -> Iterator[None]:
    """An error within says which weight it is about."""
    try:
        yield
    except ExportError as error:
        raise ExportError(
            f"{error.failed}, {weight.name}",
            expected=error.expected,
            found=error.found,
            fix=error.fix,
        ) from error
