"""A float16 graph file in, the same graph with weights of 4 or 8 bits for TensorRT out.

Every weight matrix becomes codes and a DequantizeLinear; activations stay as they are. In int4, two
things are int8: the head, which bears most of the error, and a matrix whose rows the blocks don't
divide (SigLIP's fc2: 4304). The embedding stays in floats, because TensorRT looks up nothing in
codes. Where the head is tied to it, the head gets codes of its own: a lookup reads one row for a
token, the head reads them all, so that for half a table more on disk half as much is read.

Weights are read and rounded one by one while the file is written; GPTQ's codes are made before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir

from himix_edge.errors import ConfigError, ExportError, closest
from himix_edge.export.blocks import Floats
from himix_edge.export.calibration import Feeds, products_and_hessians
from himix_edge.export.onnx import write_graph
from himix_edge.export.products import (
    Product,
    drop_unused_initializers,
    head_product,
    named,
    weight_products,
)
from himix_edge.export.rewrites.dequantize_linear import dequantize
from himix_edge.export.symmetric import LIMITS, Codes, WeightType, codes_of, gptq, scales_of

BLOCK_SIZES = (64, 128)  # TensorRT's, for int4
Method = Literal["rtn", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "gptq")


@dataclass(frozen=True)
class WeightOnly:
    """How the weights of a graph are stored.

    Attributes:
        weights: "int8", "fp8" or "int4".
        block_size: how many weights share a scale in int4.
        method: "rtn", rounding to nearest, or "gptq", which needs calibration inputs, and integers.
    """

    weights: WeightType
    block_size: int = 64
    method: Method = "rtn"

    def __post_init__(self) -> None:
        if self.weights not in LIMITS:
            raise ConfigError(
                f"no weights of type {self.weights!r}", fix=closest(str(self.weights), LIMITS)
            )
        if self.method not in METHODS:
            raise ConfigError(
                f"no quantization method {self.method!r}", fix=closest(str(self.method), METHODS)
            )
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise ConfigError(
                "block_size is invalid",
                expected="64 or 128, TensorRT's for int4",
                found=repr(self.block_size),
            )
        if self.weights == "fp8" and self.method == "gptq":
            raise ConfigError(
                "gptq has no fp8", expected="int4 or int8", found="fp8", fix="use --method rtn"
            )


def quantize_weights(
    source: Path,
    target: Path,
    how: WeightOnly,
    calibration: Sequence[Feeds] = (),
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Writes the graph `source`, vision or decoder, with quantized weights as `target`.

    The weights go beside it; the two are different files.

    Args:
        calibration: inputs of the graph; only "gptq" reads them.
        progress: called with the part of the weights, 0..1, that is done.

    Raises:
        ConfigError: calibration inputs are missing.
        ExportError: a graph without weight matrices, a weight that is not finite.
        OSError: the files can't be written.
    """
    if how.method == "gptq" and not calibration:
        raise ConfigError(
            "gptq has nothing to calibrate with", fix="give the inputs of a few prompts, or use rtn"
        )
    graph = onnx_ir.load(source)
    products = weight_products(graph)
    if not products:
        raise ExportError(
            f"{source.name} has nothing to quantize",
            expected="products with weight matrices in float16",
            found="none",
            fix="quantize the float16 graph of an export",
        )
    head = head_product(graph, products)
    layers = [product for product in products if product is not head]
    inputs = calibration if how.method == "gptq" else ()
    for done, (product, hessian) in enumerate(products_and_hessians(source, layers, inputs), 1):
        weights, block_size = _stored(product, how)
        with named(product.weight):
            if hessian is None:
                _round(graph, product, weights, block_size)
            else:
                _round_together(graph, product, hessian, weights, block_size)
        progress(0.5 * done / len(products))
    if head:
        with named(head.weight):
            _round(graph, head, "fp8" if how.weights == "fp8" else "int8", None)
    drop_unused_initializers(graph)
    write_graph(graph, target, lambda part: progress(0.5 + 0.5 * part))


def _stored(product: Product, how: WeightOnly) -> tuple[WeightType, int | None]:
    """In what, and in blocks of how many rows."""
    if how.weights != "int4":
        return how.weights, None
    if product.rows % how.block_size:
        return "int8", None
    return "int4", how.block_size


def _round(
    graph: onnx_ir.Model, product: Product, weights: WeightType, block_size: int | None
) -> None:
    scales = scales_of(product.matrix(), weights, block_size)

    def read() -> Codes:
        return codes_of(product.matrix(), weights, scales)

    dequantize(graph, product, weights, scales, read)


def _round_together(
    graph: onnx_ir.Model,
    product: Product,
    hessian: Floats,
    weights: WeightType,
    block_size: int | None,
) -> None:
    codes, scales = gptq(product.matrix(), hessian, weights, block_size)
    dequantize(graph, product, weights, scales, lambda: codes)
