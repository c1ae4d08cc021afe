"""A cache that grows -> a cache of fixed size, written in place: TensorScatter.

    decoder    Concat(past, new)  ->  TensorScatter(past, new, write_indices)
    vision     image              ->  TensorScatter(past, image), from the first slot on

past [B, Hkv, S, D]; new [B, Hkv, M, D]; image [B, Hkv, P + N, D]. An engine may let the result
share the buffer of its past, and then writes the new slots and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from himix_edge.contract import INPUT_IDS, WRITE_INDICES
from himix_edge.errors import ExportError

_SLOTS_AXIS = 2


def fix_decoder_cache(graph: onnx_ir.Model, past: Sequence[str], slots: int) -> None:
    """Gives a decoder graph with `Attention` nodes a cache of S slots, and `write_indices`.

    Its mask [M, P + M] becomes [B, 1, M, S]: a token sees all slots up to its own.

    Args:
        past: the names of the inputs that are the cache.
        slots: S.

    Raises:
        ExportError: a cache that is not concatenated once.
    """
    body = graph.graph
    inputs = {str(value.name): value for value in body.inputs}
    tape = Tape(body)
    batch = inputs[past[0]].shape[0]  # type: ignore[index]
    write_indices = _input(WRITE_INDICES, onnx_ir.DataType.INT64, [batch])
    body.inputs.insert(body.inputs.index(inputs[past[0]]), write_indices)
    for name in past:
        concat = _concat_of(inputs[name])
        _fix_slots(inputs[name], slots)
        written = [inputs[name], concat.inputs[1], write_indices]
        scattered = tape.op("TensorScatter", written, {"axis": _SLOTS_AXIS})
        _take_place(body, concat.outputs[0], scattered)
    mask = _mask(tape, inputs[INPUT_IDS], write_indices, slots)
    for node in body:
        if node.op_type == "Attention":
            node.replace_input_with(3, mask)
    body.sort()
    RemoveUnusedNodesPass()(graph)


def fix_vision_cache(graph: onnx_ir.Model, past: Sequence[str], slots: int) -> None:
    """Makes a vision graph write into a cache of S slots that it is given.

    Args:
        past: the names of its new inputs, in the order of its outputs.
        slots: S.
    """
    body = graph.graph
    tape = Tape(body)
    for name, image in zip(past, list(body.outputs), strict=True):
        cache = _input(name, image.dtype, image.shape)
        _fix_slots(cache, slots)
        body.inputs.append(cache)
        scattered = tape.op("TensorScatter", [cache, image], {"axis": _SLOTS_AXIS})
        _take_place(body, image, scattered)


def _mask(
    tape: Tape, input_ids: onnx_ir.Value, write_indices: onnx_ir.Value, slots: int
) -> onnx_ir.Value:
    """[B, 1, M, S]: slot s is seen by token t where s <= write_indices + t."""

    def constant(name: str, numbers: Any) -> onnx_ir.Value:
        return tape.initializer(onnx_ir.tensor(np.asarray(numbers, np.int64), name=f"mask.{name}"))

    count = tape.op("Squeeze", [tape.op("Shape", [input_ids], {"start": 1, "end": 2})])  # M
    tokens = tape.op("Range", [constant("first", 0), count, constant("step", 1)])  # [M]
    first = tape.op("Unsqueeze", [write_indices, constant("axis", [1])])  # [B, 1]
    own = tape.op("Add", [first, tokens])  # [B, M]
    own = tape.op("Unsqueeze", [own, constant("axes", [1, 3])])  # [B, 1, M, 1]
    return tape.op("LessOrEqual", [constant("slots", np.arange(slots)), own])


def _input(name: str, dtype: onnx_ir.DataType | None, shape: object) -> onnx_ir.Value:
    element = onnx_ir.TensorType(dtype or onnx_ir.DataType.UNDEFINED)
    return onnx_ir.Value(name=name, type=element, shape=onnx_ir.Shape(shape))  # type: ignore[arg-type]


def _fix_slots(value: onnx_ir.Value, slots: int) -> None:
    sizes = list(value.shape or ())
    sizes[_SLOTS_AXIS] = slots
    value.shape = onnx_ir.Shape(sizes)


def _take_place(body: onnx_ir.Graph, before: onnx_ir.Value, after: onnx_ir.Value) -> None:
    """A TensorScatter's result is from now on the output that `before` was, under its name."""
    cache = after.producer().inputs[0]  # type: ignore[union-attr]
    after.name, before.name = before.name, f"{before.name}.new"
    after.type, after.shape = cache.type, cache.shape  # type: ignore[union-attr]
    before.type = before.shape = None  # it can be inferred, like that of any value within
    body.outputs[body.outputs.index(before)] = after
    for node, position in list(before.uses()):
        if node is not after.producer():
            node.replace_input_with(position, after)


def _concat_of(past: onnx_ir.Value) -> onnx_ir.Node:
    concats = [node for node in past.consumers() if node.op_type == "Concat"]
    if len(concats) != 1:
        raise ExportError(
            f"{past.name} is no cache that grows", expected="one Concat", found=str(len(concats))
        )
    return concats[0]
