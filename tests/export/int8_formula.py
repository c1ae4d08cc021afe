"""The formula of int8 products, node by node, for whoever quantizes a graph with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir

from himix_edge.export.calibration import Feeds
from himix_edge.export.products import FP32, weight_products
from himix_edge.export.sessions import packed_session


def follow_the_formula(source: Path, target: Path, feeds: Feeds) -> int:
    """Checks what each int8 product gives, of what it is given; says how many there are.

    Each row x of what comes in is round(x / s) + 128, from 0 to 255, with an s of its own; weights
    are whole numbers with a scale to each output, within half a step of the float graph's.

    Args:
        source, target: the float graph, and the same in int8; a graph is written beside it.
    """
    graph = onnx_ir.load(target)
    matrices = {f"{p.weight.name}.codes": p.matrix() for p in weight_products(onnx_ir.load(source))}
    products = [node for node in graph.graph if node.op_type == "MatMulIntegerToFloat"]
    ends = [(_input(node), _output(node)) for node in products]
    for value in {value.name: value for pair in ends for value in pair}.values():
        value.type = onnx_ir.TensorType(FP32)
        graph.graph.outputs.append(value)
    watched = target.with_name("watched.onnx")
    onnx_ir.save(graph, watched)
    session = packed_session(watched)
    names = [output.name for output in session.get_outputs()]
    seen = dict(zip(names, session.run(names, dict(feeds)), strict=True))
    for node, (x_value, y_value) in zip(products, ends, strict=True):
        x = seen[x_value.name].astype(np.float64)
        codes, scales = (np.array(node.inputs[i].const_value.numpy()) for i in (1, 3))  # type: ignore[union-attr]
        steps = np.maximum(x.max(-1) / 127, x.min(-1) / -128)[..., None]
        rounded = np.clip(np.rint(x / steps), -128, 127) * steps
        weights = (codes * scales).astype(np.float64)
        halfway = np.abs(weights).max() * steps.max() * 2  # such values may go either way
        np.testing.assert_allclose(seen[y_value.name], rounded @ weights, rtol=0, atol=halfway)
        name = str(node.inputs[1].name)  # type: ignore[union-attr]
        np.testing.assert_allclose(
            weights, matrices[name], rtol=0, atol=scales.max() * (0.5 + 1e-6)
        )
    return len(products)


def _input(product: onnx_ir.Node) -> onnx_ir.Value:
    """In floats."""
    value = product.inputs[0]
    for expected in ("Reshape", "QuantizeLinear", "Reshape"):
        node = value.producer() if value is not None else None
        assert node is not None
        assert node.op_type == expected
        value = node.inputs[0]
    assert value is not None
    return value


def _output(product: onnx_ir.Node) -> onnx_ir.Value:
    """Times the scales of its rows."""
    (scaled,) = product.outputs[0].consumers()
    assert scaled.op_type == "Mul"
    return scaled.outputs[0]
