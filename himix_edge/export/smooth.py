"""SmoothQuant (Xiao et al., 2022, arXiv 2211.10438): activations that round well.

A few channels of what comes in at a decoder's products are up to a thousand times as large as the
others, and would leave these no codes where all of a token shares one scale. Before rounding, every
channel j of an input x is divided by s_j, and the weights that it meets are multiplied by it:

    x W = (x / s) (s W)        s_j = max|x_j|^a / max|W_j|^(1 - a)

The division costs nothing: it goes into the gain of the norm that x comes from, or into the columns
of the product that x is a factor of. The attention's output has neither, and stays as it is: its
keys and values are the image's too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir

from himix_edge.export.blocks import Floats
from himix_edge.export.calibration import View
from himix_edge.export.products import Product, floats_of


class Strength(NamedTuple):
    """a and b: how much a channel's scale hangs on its inputs, and on its weights."""

    inputs: float
    weights: float


EVEN = Strength(0.5, 0.5)  # SmoothQuant's figures: half of the difficulty goes to the weights
_LEAST = np.float32(1e-5)  # of a channel that never fires, or has no weights


def smoothed_inputs(products: Sequence[Product]) -> dict[str, list[Product]]:
    """What comes in at products and can be divided for free: name -> the products that read it."""
    readers: dict[str, list[Product]] = {}
    for product in products:
        readers.setdefault(product.source, []).append(product)
    by_output = _by_output(products)
    return {
        name: fed
        for name, fed in readers.items()
        if _norm(fed[0]) is not None or _factor(fed[0], by_output) is not None
    }


def smooth(
    products: Sequence[Product], magnitudes: Mapping[str, Floats], strength: Strength = EVEN
) -> dict[str, View]:
    """Shifts scale from activations to weights, in place; the graph computes what it did before.

    Weights are read when the graph is written, or they are asked for.

    Args:
        products: the decoder's layers.
        magnitudes: how large the channels are [K] of the inputs to smooth, which are among those
            that `smoothed_inputs` names.

    Returns:
        by an input's name, what it is afterwards.
    """
    by_output = _by_output(products)
    readers = smoothed_inputs(products)
    views: dict[str, View] = {}
    for name, sizes in magnitudes.items():
        fed = readers[name]
        largest = np.max([np.abs(product.matrix()).max(1) for product in fed], axis=0)  # [K]
        scales = np.maximum(sizes, _LEAST) ** strength.inputs
        scales = scales / np.maximum(largest, _LEAST) ** strength.weights
        for product in fed:
            _scale(product.weight, scales[:, None])
        norm, factor = _norm(fed[0]), _factor(fed[0], by_output)
        if norm is not None:
            _scale(_own_gain(norm), 1 / scales)
        elif factor is not None:
            _scale(factor.weight, factor.spread(1 / scales))
        views[name] = _divided_by(scales)
    return views


def _divided_by(scales: Floats) -> View:
    return lambda rows: rows / scales


def is_normed(name: str, products: Sequence[Product]) -> bool:
    """Whether an input of products comes from a norm."""
    return any(product.source == name and _norm(product) is not None for product in products)


def _by_output(products: Sequence[Product]) -> dict[str | None, Product]:
    return {product.node.outputs[0].name: product for product in products}


def _norm(product: Product) -> onnx_ir.Node | None:
    """The norm that a product's input comes from."""
    node = product.node.inputs[0].producer()  # type: ignore[union-attr]
    return node if node is not None and node.op_type == "RMSNormalization" else None


def _own_gain(norm: onnx_ir.Node) -> onnx_ir.Value:
    """The gain [K] of a norm, for it alone: norms with equal gains may share one constant."""
    gain: onnx_ir.Value = norm.inputs[1]  # type: ignore[assignment]
    if len(gain.uses()) == 1:
        return gain
    own = onnx_ir.Value(
        name=f"{norm.outputs[0].name}.gain",
        type=gain.type,
        shape=gain.shape,
        const_value=gain.const_value,
    )
    norm.graph.register_initializer(own)  # type: ignore[union-attr]
    norm.replace_input_with(1, own)
    return own


class _Factor(NamedTuple):
    """Columns of a product's weight [h, columns]: K of them from `first` on."""

    weight: onnx_ir.Value
    first: int

    def spread(self, scales: Floats) -> Floats:
        """The scales [K] in their columns, all others being one."""
        all_of_them = np.ones(int(self.weight.shape[1]), np.float32)  # type: ignore[index,arg-type]
        all_of_them[self.first : self.first + len(scales)] = scales
        return all_of_them


def _factor(product: Product, by_output: Mapping[str | None, Product]) -> _Factor | None:
    """What a product's input [..., K] is a multiple of: a product, or the half of one."""
    node = product.node.inputs[0].producer()  # type: ignore[union-attr]
    if node is None or node.op_type != "Mul":
        return None
    for value in node.inputs:
        made, half = value, 0
        split = value.producer() if value is not None else None
        if split is not None and split.op_type == "Split":
            made, half = split.inputs[0], split.outputs.index(value)
        if made is not None and made.name in by_output:
            return _Factor(by_output[made.name].weight, half * product.rows)
    return None


def _scale(weight: onnx_ir.Value, scales: Floats) -> None:
    """Multiplies a constant, which is read when it is needed."""
    before, shape = weight.const_value, onnx_ir.Shape(weight.shape or ())
    plain = onnx_ir.Value(name=weight.name, const_value=before)

    def read() -> onnx_ir.TensorProtocol:
        return onnx_ir.tensor((floats_of(plain) * scales).astype(np.float32), name=weight.name)

    weight.const_value = onnx_ir.LazyTensor(
        read, dtype=onnx_ir.DataType.FLOAT, shape=shape, name=weight.name
    )
