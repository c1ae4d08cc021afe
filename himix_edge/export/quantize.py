"""A verified fp32 decoder graph in, the same graph with weights of 4 or 8 bits out.

int4    every weight matrix becomes a MatMulNBits, a scale to each block of weights. Activations
        stay fp32 in the graph; the kernels multiply in int8 (accuracy_level 4)
int8    products with a scale to each output, and one to a token's activations (int8.py), which are
        made to round well first (rotation.py, smooth.py): twice to three times as fast with many
        tokens at a time. The few products whose inputs round badly even so are in blocks

The head and the embedding, one matrix where they are tied, are stored once, in blocks: in int8, as
they bear most of the error, or in int4, as each token reads all of the head. Matrices are read and
quantized one at a time.

docs/measurements/quantization-real-weights.md has the figures that this was decided by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from himix_edge.errors import ConfigError, ExportError, closest
from himix_edge.export import int8
from himix_edge.export.blocks import Bits, Blocks, Floats, gptq, rtn
from himix_edge.export.calibration import Feeds, View, magnitudes, products_and_inflows
from himix_edge.export.dialects import ORT_DOMAIN
from himix_edge.export.int8 import replace_products
from himix_edge.export.nbits import initializers, replace_lookup, replace_product
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
from himix_edge.export.rotation import rotate
from himix_edge.export.smooth import Strength, is_normed, smooth, smoothed_inputs

WeightType = Literal["int8", "int4"]
Method = Literal["rtn", "gptq"]
BITS: dict[WeightType, Bits] = {"int8": 8, "int4": 4}
METHODS: tuple[Method, ...] = ("rtn", "gptq")
BLOCK_SIZES = (32, 64, 128)
FINE_BLOCKS = 32
GENTLE = Strength(0.3, 0.0)  # of channels before they are rounded to 4 bits
WORST_SHARE = 0.06  # of an int8 decoder's weights, that may be in blocks: 2.5 times as slow there
TOLERABLE_ROUNDING = 1e-4  # of a product's input in int8, squared: one percent

Progress: TypeAlias = Callable[[float], None]  # the part of the weights, 0..1, that is done


@dataclass(frozen=True)
class DecoderQuantization:
    """How the decoder's weights are stored.

    Attributes:
        weights: of the layers' matrices.
        block_size: how many weights share a scale and a zero point, where they are in blocks.
        method: of the layers: "rtn", rounding to nearest, or "gptq", which needs calibration
            inputs.
        head: of the head and the embedding.
        bits: a weight, scales and zero points counted, that int4 layers may take on average: what
            is left of them goes to the layers that lose most in 4 bits, which are in 8. None is
            4 bits for all.
    """

    weights: WeightType = "int4"
    block_size: int = 32
    method: Method = "rtn"
    head: WeightType = "int8"
    bits: float | None = None

    def __post_init__(self) -> None:
        for weights in (self.weights, self.head):
            if weights not in BITS:
                raise ConfigError(f"no weights of type {weights!r}", fix=closest(weights, BITS))
        if self.bits is not None and (self.weights, self.method) != ("int4", "gptq"):
            raise ConfigError(
                "bits means nothing here",
                expected="an int4 decoder by gptq, whose inputs say which layers lose most",
                found=f"{self.weights}, {self.method}",
                fix="leave it out",
            )
        if self.method not in METHODS:
            raise ConfigError(
                f"no quantization method {self.method!r}", fix=closest(str(self.method), METHODS)
            )
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise ConfigError(
                "block_size is invalid", expected="32, 64 or 128", found=repr(self.block_size)
            )

    @property
    def is_calibrated(self) -> bool:
        """Whether it reads calibration inputs."""
        return self.weights == "int8" or self.method == "gptq"


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
        calibration: inputs of the graph, for int8 and "gptq"; without them int8 is not smoothed.

    Raises:
        ConfigError: calibration inputs are missing, or fewer bits than 4-bit weights take.
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
    graph.opset_imports[ORT_DOMAIN] = 1
    quantize = _int8_layers if how.weights == "int8" else _int4_layers
    quantize(graph, source, layers, how, calibration, lambda done: progress(done / len(products)))
    if head:
        _quantize_ends(graph, head, BITS[how.head], how.block_size)
    drop_unused_initializers(graph)
    onnx_ir.save(graph, target, external_data=f"{target.name}.data", max_workers=1)
    progress(1.0)


def _int8_layers(
    graph: onnx_ir.Model,
    source: Path,
    layers: Sequence[Product],
    how: DecoderQuantization,
    calibration: Sequence[Feeds],
    progress: Progress,
) -> None:
    """Products in int8, but for the few whose inputs can't be rounded well even so."""
    views: dict[str, View] = {}
    if calibration:
        inputs = [name for name in smoothed_inputs(layers) if not is_normed(name, layers)]
        views |= smooth(layers, magnitudes(source, inputs, calibration))
    views |= rotate(graph, layers)
    if not calibration:
        replace_products(graph, layers)
        return
    codes: dict[str, NDArray[np.int8]] = {}
    errors: dict[str, float] = {}
    flows = products_and_inflows(source, layers, calibration, views)
    for done, (product, inflow) in enumerate(flows, 1):
        name = str(product.weight.name)
        errors[name] = inflow.rounding
        if how.method == "gptq":
            with named(product.weight):
                codes[name] = int8.gptq(product.matrix(), inflow.hessian)
        progress(done)
    worst = _worst(layers, errors)
    for product in worst:
        replace_product(graph, product, _rounded(product, 8, FINE_BLOCKS))
    replace_products(graph, [one for one in layers if one not in worst], codes)


def _worst(layers: Sequence[Product], errors: Mapping[str, float]) -> list[Product]:
    """Those whose inputs lose most when they are rounded, few enough to cost little time."""
    room = WORST_SHARE * sum(_size(product) for product in layers)
    worst = []
    for product in sorted(layers, key=lambda one: -errors[str(one.weight.name)]):
        if _size(product) <= room and errors[str(product.weight.name)] > TOLERABLE_ROUNDING:
            worst.append(product)
            room -= _size(product)
    return worst


def _size(product: Product) -> int:
    """How many weights."""
    rows, columns = product.weight.shape  # type: ignore[misc]
    return int(rows) * int(columns)  # type: ignore[arg-type]


def _int4_layers(
    graph: onnx_ir.Model,
    source: Path,
    layers: Sequence[Product],
    how: DecoderQuantization,
    calibration: Sequence[Feeds],
    progress: Progress,
) -> None:
    """Products in blocks; for GPTQ's, channels that matter more are made a little larger first."""
    if how.method == "rtn":
        for done, product in enumerate(layers, 1):
            replace_product(graph, product, _rounded(product, 4, how.block_size))
            progress(done)
        return
    sizes = magnitudes(source, list(smoothed_inputs(layers)), calibration)
    views = smooth(layers, sizes, GENTLE)
    blocks: dict[str, Blocks] = {}
    lost: dict[str, float] = {}
    flows = products_and_inflows(source, layers, calibration, views)
    for done, (product, inflow) in enumerate(flows, 1):
        name, matrix = str(product.weight.name), product.matrix()
        with named(product.weight):
            blocks[name] = gptq(matrix, inflow.hessian, 4, how.block_size)
        if how.bits is not None:
            lost[name] = _lost(matrix, blocks[name], inflow.hessian)
        progress(done)
    wide = _widened(layers, blocks, lost, how.bits) if how.bits is not None else []
    for product in layers:
        name = str(product.weight.name)
        found = _rounded(product, 8, how.block_size) if product in wide else blocks[name]
        replace_product(graph, product, found)


def _lost(matrix: Floats, blocks: Blocks, hessian: Floats) -> float:
    """The squared error of a product over its square, on what came in."""
    error = blocks.dequantized() - matrix
    return float(np.vdot(error, hessian @ error) / max(np.vdot(matrix, hessian @ matrix), 1e-30))


def _widened(
    layers: Sequence[Product],
    blocks: Mapping[str, Blocks],
    lost: Mapping[str, float],
    bits: float,
) -> list[Product]:
    """Those that 8 bits help most for the room they take, as many as there is room for."""
    taken = sum(one.stored_bits for one in blocks.values())
    weights = sum(map(_size, layers))
    room = bits * weights - taken
    if room < 0:
        raise ConfigError(
            "bits is too small",
            expected=f"{taken / weights:.2f} or more, which 4-bit weights take with their scales",
            found=f"{bits:g}",
            fix="allow more bits, or use larger blocks: --block-size 64",
        )
    wide = []
    for product in sorted(layers, key=lambda p: -lost[str(p.weight.name)] / _size(p)):
        four = blocks[str(product.weight.name)]
        more = 8 * (four.packed.nbytes + four.zero_points.nbytes)  # both twice as large
        if more <= room:
            wide.append(product)
            room -= more
    return wide


def _rounded(product: Product, bits: Bits, block_size: int) -> Blocks:
    with named(product.weight):
        return rtn(product.matrix(), bits, block_size)


def _nothing_to_quantize(source: Path) -> ExportError:
    return ExportError(
        f"{source.name} has nothing to quantize",
        expected="products with fp32 weight matrices",
        found="none",
        fix="quantize the fp32 graph of an export",
    )


def _quantize_ends(graph: onnx_ir.Model, head: Product, bits: Bits, block_size: int) -> None:
    """Head and embedding in blocks, from the same codes where they are the same matrix.

    The blocks are smaller where these divide their width and larger ones don't.

    The embedding stays as it is where the blocks don't divide its width: a lookup knows no padding.
    """
    divisors = [size for size in BLOCK_SIZES if size <= block_size and head.rows % size == 0]
    block_size = max(divisors, default=block_size)
    with named(head.weight):
        blocks = rtn(head.matrix(), bits, block_size)
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
                own = rtn(floats_of(table).T, bits, block_size)
            replace_lookup(graph, node, own, initializers(graph, str(table.name), own))
