"""The formula of int8 products, node by node, for whoever quantizes a graph with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir

from himix_edge.export.calibration import Feeds
from himix_edge.export.products import FP32, weight_products
from himix_edge.export.sessions import packed_session


def follow_the_formula(source: Path, target: Path, feeds: Feeds) -> list[str]:
    """Checks what each int8 product gives, of what it is given; says of which kind they are.

    Activations are round(x / s + z), from 0 to 255, with one s and one z to a tensor; weights are
    whole numbers with a scale to each output, within half a step of the float graph's.

    Args:
        source, target: the float graph, and the same in int8; a graph is written beside it.
    """
    graph = onnx_ir.load(target)
    matrices = {f"{p.weight.name}.codes": p.matrix() for p in weight_products(onnx_ir.load(source))}
    checked = [
        (_input(node), node.outputs[0], node)
        for node in graph.graph
        if node.op_type in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
    ]
    for value in {value.name: value for x, y, _ in checked for value in (x, y)}.values():
        value.type = onnx_ir.TensorType(FP32)
        graph.graph.outputs.append(value)
    watched = target.with_name("watched.onnx")
    onnx_ir.save(graph, watched)
    session = packed_session(watched)
    names = [output.name for output in session.get_outputs()]
    seen = dict(zip(names, session.run(names, dict(feeds)), strict=True))
    for x_value, y_value, node in checked:
        x = seen[x_value.name].astype(np.float64)
        values = [v for v in node.inputs if v is not None and v.is_initializer()]
        codes, scales, *biases = [np.array(v.const_value.numpy()) for v in values]  # type: ignore[union-attr]
        step = (max(x.max(), 0) - min(x.min(), 0)) / 255
        zero = np.rint(-min(x.min(), 0) / step)
        rounded = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
        weights = (codes * scales).astype(np.float64)
        wanted = rounded @ weights + (biases[0] if biases else 0)
        halfway = np.abs(weights).max() * step * 2  # such values may go either way
        np.testing.assert_allclose(seen[y_value.name], wanted, rtol=0, atol=halfway)
        np.testing.assert_allclose(
            weights, matrices[str(values[0].name)], rtol=0, atol=scales.max() * (0.5 + 1e-6)
        )
    return [node.op_type for _, _, node in checked]


def _input(node: onnx_ir.Node) -> onnx_ir.Value:
    """In floats."""
    value = node.inputs[0]
    rounded = value.producer() if value is not None else None
    if node.op_type == "MatMulIntegerToFloat" and rounded is not None:
        value = rounded.inputs[0]
    assert value is not None
    return value
