"""A verified fp32 vision graph in, the same graph with int8 products out, for ONNX Runtime's CPU.

Attention, norms and activations stay in fp32; int8.py has the rest.
docs/measurements/quantization.md has the figures that this was decided by.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir

from himix_edge.errors import ExportError
from himix_edge.export.int8 import replace_products
from himix_edge.export.products import FP32, drop_unused_initializers, weight_products


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
    replace_products(graph, products)
    drop_unused_initializers(graph)
    onnx_ir.save(graph, target, external_data=f"{target.name}.data", max_workers=1)
