"""A bfloat16 graph in float32: the same nodes, the same rounded weights, wider arithmetic."""

from __future__ import annotations

from pathlib import Path

import onnx_ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

NARROW, WIDE = onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT


def write_widened(source: Path, target: Path) -> None:
    """Writes `target`, and its weights beside it.

    Raises:
        OSError: it can't be written.
    """
    graph = onnx_ir.load(source)
    weights = graph.graph.initializers.values()
    for value in (*graph.graph.inputs, *graph.graph.outputs, *weights):
        if value.dtype == NARROW:
            value.dtype = WIDE
    for weight in weights:
        tensor = weight.const_value
        if tensor is not None and tensor.dtype == NARROW:
            weight.const_value = _widened(tensor)
    for node in graph.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if attribute.type == onnx_ir.AttributeType.TENSOR:
                if attribute.value.dtype == NARROW:
                    node.attributes[name] = onnx_ir.AttrTensor(name, _widened(attribute.value))
            elif name == "to" and attribute.value == NARROW:
                node.attributes[name] = onnx_ir.AttrInt64(name, WIDE)
    onnx_ir.save(graph, target, external_data=f"{target.name}.data", max_workers=1)


def _widened(tensor: onnx_ir.TensorProtocol) -> onnx_ir.LazyTensor:
    shape = onnx_ir.Shape(tensor.shape.numpy())

    def read() -> onnx_ir.TensorProtocol:
        bits = torch.frombuffer(bytearray(tensor.tobytes()), dtype=torch.bfloat16)
        return TorchTensor(bits.float().reshape(shape.numpy()), name=tensor.name)

    return onnx_ir.LazyTensor(read, dtype=WIDE, shape=shape, name=tensor.name)
