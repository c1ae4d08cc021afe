"""A decoder's residual stream in another basis, in which no channel stands out (QuaRot, Ashkboos et
al., 2024, arXiv 2404.00456; the part of it that costs nothing when it runs).

In a trained model a few channels of the residual stream are hundreds of times as large as the rest,
and whatever shares a scale with them is rounded to nothing. An orthogonal matrix R spreads them:

    x -> x R              after the embedding, by a small product of its own
    W -> W R              of products that add to the stream
    W -> R^T diag(g) W    of products that read it; the gain g of the norm between becomes 1
    x -> x R^T            in front of the last norm, by a small product of its own

A norm without a gain commutes with R, and so the graph computes what it did before. The embedding
and the head stay as they are: they may be one matrix. Keys and values stay as they are too: those
of an image come from the vision graph.

R = A (x) B with two small matrices of about sqrt(h) rows each, so that the two products that are
left cost next to nothing: x R is A^T X B of x as a matrix X.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir

from himix_edge.errors import ExportError
from himix_edge.export.blocks import Floats
from himix_edge.export.calibration import View
from himix_edge.export.products import Product, floats_of, initializer

_SEED = 0  # of the signs


class Rotation(NamedTuple):
    """R = A (x) B, [h, h]."""

    left: Floats  # A [m, m]
    right: Floats  # B [k, k]; m k = h

    @property
    def size(self) -> int:
        """h"""
        return len(self.left) * len(self.right)

    def inverse(self) -> Rotation:
        """R^T"""
        return Rotation(self.left.T.copy(), self.right.T.copy())

    def rows(self, x: Floats) -> Floats:
        """x R, of x [..., h]."""
        square = x.reshape(*x.shape[:-1], len(self.left), len(self.right))
        rotated = np.asarray(self.left.T @ square @ self.right, np.float32)
        return rotated.reshape(x.shape)

    def columns(self, x: Floats) -> Floats:
        """R^T x, of x [h, N]."""
        return self.rows(x.T).T


def rotation_of(size: int) -> Rotation:
    """Of so many channels, the same one whenever it is asked for.

    Every channel goes into all others in nearly equal parts: Hadamard's matrix where the size is a
    power of two, and Hartley's for what is left. Random signs keep what all channels have in
    common from becoming one large channel.
    """
    left = next(m for m in range(math.isqrt(size), 0, -1) if size % m == 0)
    rng = np.random.default_rng(_SEED)

    def signed(n: int) -> Floats:
        signs = rng.choice([-1.0, 1.0], size=n)
        return (signs[:, None] * spreading(n)).astype(np.float32)

    return Rotation(signed(left), signed(size // left))


def spreading(size: int) -> Floats:
    """An orthogonal matrix whose numbers are all of nearly the same size: [size, size]."""
    power = size & -size  # of two, the largest that divides it
    matrix = np.ones((1, 1))
    while len(matrix) < power:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    odd = np.arange(size // power)
    turns = 2 * np.pi * odd[:, None] * odd / len(odd)
    hartley = np.cos(turns) + np.sin(turns)
    return (np.kron(hartley, matrix) / math.sqrt(size)).astype(np.float32)


def rotate(graph: onnx_ir.Model, layers: Sequence[Product]) -> dict[str, View]:
    """Rotates the residual stream of a decoder in the ort dialect, in place.

    Weights are read when the graph is written, or they are asked for.

    Args:
        layers: the decoder's products but the head.

    Returns:
        by the name of what comes in at products that read the stream, what it is afterwards.

    Raises:
        ExportError: a graph that is built otherwise.
    """
    readers = [product for product in layers if _norm(product) is not None]
    writers = [product for product in layers if _adds_to_the_stream(product)]
    norms = [node for node in graph.graph if node.op_type == "RMSNormalization"]
    embedding = _embedding(norms)
    read = {id(_norm(product)) for product in readers}
    last = [norm for norm in norms if id(norm) not in read]
    if len(last) != 1 or len(writers) != len(readers) or embedding is None:
        raise ExportError(
            "the graph has no residual stream that can be rotated",
            expected="a norm in front of every product that reads it, and one at the end",
            found=f"{len(readers)} that read it, {len(writers)} that add to it, {len(last)} last",
            fix="quantize the graph of an export of this release",
        )
    rotation = rotation_of(readers[0].rows)
    turns = {}
    gains = {id(norm): floats_of(norm.inputs[1]) for norm in norms}  # type: ignore[arg-type]
    for product in readers:
        gain = gains[id(_norm(product))]
        _replace(product, _reading(rotation, gain))
        turns[product.source] = _turned(rotation, gain)
    for product in writers:
        _replace(product, rotation.rows)
    ones = initializer(
        graph, onnx_ir.tensor(np.ones(rotation.size, np.float32), name="rotated.gain")
    )
    for norm in norms:
        if norm is not last[0]:
            norm.replace_input_with(1, ones)
    _turn_after(graph, embedding, rotation, "rotation")
    _turn_before(graph, last[0], rotation.inverse(), "rotation.back")
    return turns


def _norm(product: Product) -> onnx_ir.Node | None:
    """The norm that a product's input comes from."""
    node = product.node.inputs[0].producer()  # type: ignore[union-attr]
    return node if node is not None and node.op_type == "RMSNormalization" else None


def _adds_to_the_stream(product: Product) -> bool:
    """Whether a product is added to something that is no constant."""
    consumers = product.node.outputs[0].consumers()
    return any(
        node.op_type == "Add"
        and not any(value is None or value.is_initializer() for value in node.inputs)
        for node in consumers
    )


def _embedding(norms: Sequence[onnx_ir.Node]) -> onnx_ir.Value | None:
    """The stream's beginning: what the first norm reads."""
    first = norms[0].inputs[0] if norms else None
    node = first.producer() if first is not None else None
    return first if node is not None and node.op_type == "Gather" else None


def _reading(rotation: Rotation, gain: Floats) -> Callable[[Floats], Floats]:
    """From a matrix behind a norm with a gain to the one behind a norm without, rotated."""

    def change(matrix: Floats) -> Floats:
        return rotation.columns(gain[:, None] * matrix)

    return change


def _turned(rotation: Rotation, gain: Floats) -> View:
    """From rows of a norm's output to what they are without its gain, rotated."""
    inverse = np.where(gain == 0, 0, 1 / np.where(gain == 0, 1, gain)).astype(np.float32)

    def turned(rows: Floats) -> Floats:
        return rotation.rows(rows * inverse)

    return turned


def _replace(product: Product, change: Callable[[Floats], Floats]) -> None:
    """Another matrix [K, N] in a product, which is made when it is needed."""
    before, name = product.weight.const_value, product.weight.name
    plain = onnx_ir.Value(name=name, const_value=before)

    def read() -> onnx_ir.TensorProtocol:
        stored = floats_of(plain)
        matrix = change(stored.T if product.transposed else stored).astype(np.float32)
        laid_out = np.ascontiguousarray(matrix.T if product.transposed else matrix)
        return onnx_ir.tensor(laid_out, name=name)

    shape = onnx_ir.Shape(product.weight.shape or ())
    product.weight.const_value = onnx_ir.LazyTensor(
        read, dtype=onnx_ir.DataType.FLOAT, shape=shape, name=name
    )


def _turn_after(graph: onnx_ir.Model, value: onnx_ir.Value, rotation: Rotation, name: str) -> None:
    """value R for all that read it."""
    readers = list(value.uses())
    turned, nodes = _product(graph, value, rotation, name)
    for node, index in readers:
        node.replace_input_with(index, turned)
    graph.graph.insert_after(value.producer(), nodes)  # type: ignore[arg-type]


def _turn_before(graph: onnx_ir.Model, node: onnx_ir.Node, rotation: Rotation, name: str) -> None:
    """What a node reads, times R."""
    turned, nodes = _product(graph, node.inputs[0], rotation, name)  # type: ignore[arg-type]
    node.replace_input_with(0, turned)
    graph.graph.insert_before(node, nodes)


def _product(
    graph: onnx_ir.Model, x: onnx_ir.Value, rotation: Rotation, name: str
) -> tuple[onnx_ir.Value, list[onnx_ir.Node]]:
    """x R of x [B, M, h], as A^T X B."""

    def constant(array: Floats, part: str) -> onnx_ir.Value:
        return initializer(graph, onnx_ir.tensor(array, name=f"{name}.{part}"))

    left, right = rotation
    square = constant(np.array([0, 0, len(left), len(right)]), "square")
    flat = constant(np.array([0, 0, rotation.size]), "flat")
    nodes = [onnx_ir.node("Reshape", [x, square])]
    nodes += [onnx_ir.node("MatMul", [constant(left.T.copy(), "left"), nodes[-1].outputs[0]])]
    nodes += [onnx_ir.node("MatMul", [nodes[-1].outputs[0], constant(right, "right")])]
    nodes += [onnx_ir.node("Reshape", [nodes[-1].outputs[0], flat])]
    return nodes[-1].outputs[0], nodes
