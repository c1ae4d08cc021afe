"""Decoders with channels as large as those of trained ones, which random weights never have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir

from himix_edge.export.onnx import write_graph
from himix_edge.export.products import Product, weight_products

OUTLIERS, FACTOR = [3, 17, 30], 100.0  # of the 32 channels of the stream
MASSIVE, MASSIVE_FACTOR = 5, 1000.0  # of the 64 channels in between gate and down


def with_massive_activations(source: Path, target: Path) -> None:
    """The same decoder with a few large channels, whose weights are small in return.

    Behind every norm some channels are a hundred times as large as before, and in front of every
    `down_proj` one is a thousand times as large.
    """
    graph = onnx_ir.load(source)
    *layers, _head = weight_products(graph)
    factors = np.ones(32, np.float32)
    factors[OUTLIERS] = FACTOR
    for product in layers:
        norm = product.node.inputs[0].producer()  # type: ignore[union-attr]
        if norm is not None and norm.op_type == "RMSNormalization":
            _multiply(norm.inputs[1], factors)
            _multiply(product.weight, 1 / factors[:, None])
    for gate_up, down in zip(_named(layers, "gate_up"), _named(layers, "down"), strict=True):
        columns = np.ones(2 * down.rows, np.float32)
        columns[down.rows + MASSIVE] = MASSIVE_FACTOR
        _multiply(gate_up.weight, columns)
        _multiply(down.weight, 1 / columns[down.rows :, None])
    write_graph(graph, target)


def _named(layers: list[Product], kind: str) -> list[Product]:
    return [product for product in layers if kind in str(product.weight.name)]


def _multiply(value: onnx_ir.Value | None, factors: object) -> None:
    assert value is not None
    changed = np.array(value.const_value.numpy()) * factors  # type: ignore[union-attr]
    value.const_value = onnx_ir.tensor(changed.astype(np.float32), name=value.name)
