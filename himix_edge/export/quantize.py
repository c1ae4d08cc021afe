"""A verified fp32 graph file in, the same graph with weights of 4 or 8 bits out.

The decoder: every weight matrix becomes a MatMulNBits, and the embedding a GatherBlockQuantized;
matrices are read and quantized one at a time. The head and the embedding, which bear most of the
error and are one matrix where they are tied, are kept in int8 even where the layers are int4, and
stored once. Activations stay fp32 in the graph; the kernels multiply in int8 (accuracy_level 4).

The vision encoder: ONNX Runtime's dynamic quantization, int8 weights by output channel, int8
activations with a scale found as they come. Inputs and outputs keep their names and types.

docs/measurements/quantization.md has the figures that this was decided by.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir

from himix_edge.errors import ConfigError, ExportError, closest
from himix_edge.export.blocks import Bits, gptq, rtn
from himix_edge.export.calibration import Feeds, products_and_hessians
from himix_edge.export.nbits import DOMAIN, initializers, replace_lookup, replace_product
from himix_edge.export.products import (
    FP32,
    Product,
    drop_unused_initializers,
    floats_of,
    head_product,
    is_matrix,
    named,
    weight_products,
)

WeightType = Literal["int8", "int4"]
Method = Literal["rtn", "gptq"]
BITS: dict[WeightType, Bits] = {"int8": 8, "int4": 4}
METHODS: tuple[Method, ...] = ("rtn", "gptq")
BLOCK_SIZES = (32, 64, 128)

Progress: TypeAlias = Callable[[float], None]  # the part of the weights, 0..1, that is done


@dataclass(frozen=True)
class DecoderQuantization:
    """How the decoder's weights are stored.

    Attributes:
        weights: of the layers' matrices; the head and the embedding are int8 either way.
        block_size: how many weights share a scale and a zero point.
        method: "rtn", rounding to nearest, or "gptq", which needs calibration inputs.
    """

    weights: WeightType = "int4"
    block_size: int = 32
    method: Method = "rtn"

    def __post_init__(self) -> None:
        if self.weights not in BITS:
            raise ConfigError(
                f"no weights of type {self.weights!r}", fix=closest(str(self.weights), BITS)
            )
        if self.method not in METHODS:
            raise ConfigError(
                f"no quantization method {self.method!r}", fix=closest(str(self.method), METHODS)
            )
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise ConfigError(
                "block_size is off", expected="32, 64 or 128", found=repr(self.block_size)
            )


def quantized_decoder(
    source: Path,
    target: Path,
    how: DecoderQuantization,
    calibration: Sequence[Feeds] = (),
    progress: Progress = lambda _: None,
) -> None:
    """Writes the decoder graph `source` with quantized weights as `target`, weights beside it.

    The two are different files.

    Args:
        calibration: inputs of the graph; only "gptq" reads them.

    Raises:
        ConfigError: calibration inputs are missing.
        ExportError: a graph without weight matrices or not in fp32, a weight that is not finite.
        OSError: the files can't be written.
    """
    if how.method == "gptq" and not calibration:
        raise ConfigError(
            "gptq has nothing to calibrate with",
            expected="the inputs of a few prompts",
            found="none",
            fix="give some, or use rtn",
        )
    graph = onnx_ir.load(source)
    products = weight_products(graph, [FP32])
    if not products:
        raise _nothing_to_quantize(source)
    head = head_product(graph, products)
    layers = [product for product in products if product is not head]
    bits = BITS[how.weights]
    inputs = calibration if how.method == "gptq" else ()
    graph.opset_imports[DOMAIN] = 1
    for done, (product, hessian) in enumerate(products_and_hessians(source, layers, inputs), 1):
        with named(product.weight):
            blocks = (
                rtn(product.matrix(), bits, how.block_size)
                if hessian is None
                else gptq(product.matrix(), hessian, bits, how.block_size)
            )
        replace_product(graph, product, blocks)
        progress(done / len(products))
    if head:
        _quantize_ends(graph, head, how.block_size)
        progress(1.0)
    drop_unused_initializers(graph)
    onnx_ir.save(graph, target, external_data=f"{target.name}.data", max_workers=1)


def quantized_vision(source: Path, target: Path) -> None:
    """Writes the vision graph `source` in int8 as `target`, weights beside it.

    The two are different files; one of a few MB stands beside `source` meanwhile.

    Raises:
        ExportError: a graph without weight matrices, a weight that is not finite.
        OSError: the files can't be written.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-untyped]

    products = weight_products(onnx_ir.load(source), [FP32])
    if not products:
        raise _nothing_to_quantize(source)
    for product in products:
        if not np.isfinite(floats_of(product.weight)).all():
            raise ExportError(
                f"cannot quantize {product.weight.name}", expected="finite numbers", found="others"
            )
    data = target.with_name(f"{target.name}.data")
    data.unlink(missing_ok=True)  # what stands there would be appended to
    with _quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )


def _nothing_to_quantize(source: Path) -> ExportError:
    return ExportError(
        f"{source.name} has nothing to quantize",
        expected="products with fp32 weight matrices",
        found="none",
        fix="quantize the fp32 graph of an export",
    )


def _quantize_ends(graph: onnx_ir.Model, head: Product, block_size: int) -> None:
    """Head and embedding in int8, from the same codes where they are the same matrix.

    The embedding stays as it is where the blocks don't divide its width: a lookup knows no padding.
    """
    with named(head.weight):
        blocks = rtn(head.matrix(), 8, block_size)
    lookups = [
        (node, table)
        for node in graph.graph
        if node.op_type == "Gather"
        and (table := node.inputs[0]) is not None
        and is_matrix(table)
        and table.dtype is FP32
        and table.shape[1] == head.rows  # type: ignore[index]
        and head.rows % block_size == 0
    ]
    tied = [
        table is head.weight or np.array_equal(floats_of(table).T, head.matrix())
        for _, table in lookups
    ]
    parts = replace_product(graph, head, blocks)
    for (node, table), is_head in zip(lookups, tied, strict=True):
        if is_head:
            replace_lookup(graph, node, blocks, parts)
        else:
            with named(table):
                own = rtn(floats_of(table).T, 8, block_size)
            replace_lookup(graph, node, own, initializers(graph, str(table.name), own))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice to infer shapes and fold constants first: both is done."""
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(before)
