"""Weights that are multiplied with the same input, as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir


def joined_initializer(
    body: onnx_ir.Graph, parts: Sequence[onnx_ir.Value], first: str, joined: str
) -> onnx_ir.Value:
    """A new constant: its parts beside each other along their last dimension.

    The parts are read, one after the other, whenever the new one is.

    Args:
        parts: constants whose other dimensions agree.
        first, joined: the new name is that of the first part with `joined` for `first` in it.
    """
    tensors = [part.const_value for part in parts]
    *rows, _ = shape_of(parts[0])
    columns = sum(shape_of(part)[-1] for part in parts)
    name, dtype = str(parts[0].name).replace(first, joined), parts[0].dtype
    shape = onnx_ir.Shape([*rows, columns])

    def read() -> onnx_ir.TensorProtocol:
        arrays = [np.array(tensor.numpy()) for tensor in tensors]  # type: ignore[union-attr]
        return onnx_ir.tensor(np.concatenate(arrays, axis=-1), name=name)

    value = onnx_ir.Value(
        name=name,
        type=onnx_ir.TensorType(dtype or onnx_ir.DataType.UNDEFINED),
        shape=shape,
        const_value=onnx_ir.LazyTensor(
            read, dtype=dtype or onnx_ir.DataType.UNDEFINED, shape=shape, name=name
        ),
    )
    body.register_initializer(value)
    return value


def shape_of(constant: onnx_ir.Value) -> tuple[int, ...]:
    """Of a constant, whose dimensions are all known."""
    return tuple(int(size) for size in constant.shape or ())  # type: ignore[arg-type]
