"""A verified fp32 vision graph in, the same graph with int8 products out, for ONNX Runtime's CPU.

Attention, norms and activations stay in fp32; int8.py has the rest. A product of values that were
joined, such as a converted model's projections, stays as well: int8 has one scale for all of a
patch, and parts of different sizes don't fit one. Behind a connector the least cosine of keys and
values was 0.93 with them in int8 (and one scale for all patches), 0.9995 without.
docs/measurements/quantization.md has the figures that all else was decided by.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir

from himix_edge.errors import ExportError
from himix_edge.export.int8 import replace_products
from himix_edge.export.products import FP32, Product, drop_unused_initializers, weight_products

SAME_VALUES = ("Slice", "Reshape", "Transpose")  # what comes out of these is what went in


def quantized_vision(source: Path, target: Path) -> None:
    """Writes the vision graph `source` in int8 as `target`, weights beside it.

    The two are different files. Weights are read one at a time.

    Raises:
        ExportError: a graph without weight matrices, a weight that is not finite.
        OSError: the files can't be written.
    """
    graph = onnx_ir.load(source)
    products = weight_products(graph, [FP32])
    if not products:
        raise ExportError(
            f"{source.name} has nothing to quantize",
            expected="products with fp32 weight matrices",
            found="none",
            fix="quantize the fp32 graph of an export",
        )
    replace_products(graph, [product for product in products if not _is_of_joined(product)])
    drop_unused_initializers(graph)
    onnx_ir.save(graph, target, external_data=f"{target.name}.data", max_workers=1)


def _is_of_joined(product: Product) -> bool:
    """Whether what comes in was put together from several values."""
    value = product.node.inputs[0]
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in SAME_VALUES:
            return node.op_type == "Concat"
        value = node.inputs[0]
    return False
