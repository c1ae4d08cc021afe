"""A graph's products with weight matrices, as ONNX Runtime's products with blocks of few bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir

from himix_edge.export.blocks import Blocks
from himix_edge.export.dialects import ORT_DOMAIN
from himix_edge.export.products import Product, initializer

ACCURACY_LEVEL = 4  # int8 products: on a CPU twice as fast as others in int4, twenty times in int8


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
    counts = np.array([blocks.columns, -1])
    shape = initializer(graph, onnx_ir.tensor(counts, name=f"{codes.name}.rows"))
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
    new = onnx_ir.Node(ORT_DOMAIN, op_type, inputs, attribute_list, name=old.name)
    onnx_ir.convenience.replace_nodes_and_values(
        graph.graph, old, [old], [new], [old.outputs[0]], [new.outputs[0]]
    )


def initializers(graph: onnx_ir.Model, name: str, blocks: Blocks) -> list[onnx_ir.Value]:
    return [
        initializer(graph, onnx_ir.tensor(array, name=f"{name}.{part}"))
        for part, array in (
            ("codes", blocks.packed),
            ("scales", blocks.scales),
            ("zero_points", blocks.zero_points),
        )
    ]
