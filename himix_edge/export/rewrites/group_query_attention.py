"""Attention over a cache that grows -> GroupQueryAttention over one that is written in place.

    query, key, value = x Wq + bq, x Wk + bk, x Wv + bv     one product: x [Wq Wk Wv] + [bq bk bv]
    Attention(Rotary(query), Concat(past, Rotary(key)), Concat(past, value), mask)
        ->  GroupQueryAttention(packed, past, position_ids, write_indices)

One node of ONNX Runtime's turns queries and keys to their positions, writes the new keys and values
into the slots from write_indices on, and lets every token see all slots up to its own. Bound to one
buffer, past and present are the same memory, and no slot is ever copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from himix_edge.config import HiMixConfig
from himix_edge.contract import INPUT_IDS, POSITION_IDS, WRITE_INDICES, past_names
from himix_edge.export.dialects import ORT_DOMAIN
from himix_edge.export.rewrites.packed import joined_initializer
from himix_edge.export.rewrites.rule import made_by
from himix_edge.models.decoder import inverse_frequencies

SLOTS = "slots"  # the name of the dimension S, which is for the runtime to choose


class Projection(NamedTuple):
    """x W + b"""

    x: onnx_ir.Value
    weight: onnx_ir.Value  # [h, N]
    bias: onnx_ir.Value | None  # [N]


def fuse_attention(graph: onnx_ir.Model, config: HiMixConfig) -> None:
    """Rewrites every `Attention` of a decoder graph, in place, and its cache with it.

    Raises:
        ExportError: a graph that is built otherwise.
    """
    body, tape = graph.graph, Tape(graph.graph)
    inputs = {str(value.name): value for value in body.inputs}
    layers = config.decoder.num_hidden_layers
    for name in past_names(layers):
        _free_slots(inputs[name])
    write_indices = onnx_ir.Value(
        name=WRITE_INDICES,
        type=onnx_ir.TensorType(onnx_ir.DataType.INT64),
        shape=onnx_ir.Shape([inputs[INPUT_IDS].shape[0]]),  # type: ignore[index]
    )
    body.inputs.insert(2, write_indices)
    shared = [
        *_lengths(tape, inputs[INPUT_IDS], write_indices),
        *_rotary_tables(tape, config, inputs[past_names(layers)[0]].dtype),
        inputs[POSITION_IDS],
    ]
    attributes = {
        "num_heads": config.decoder.num_attention_heads,
        "kv_num_heads": config.decoder.num_key_value_heads,
        "scale": config.decoder.head_dim**-0.5,
        "do_rotary": 1,
    }
    for node in [node for node in body if node.op_type == "Attention"]:
        _fuse(tape, node, shared, attributes)
    body.sort()
    RemoveUnusedNodesPass()(graph)


def _fuse(
    tape: Tape, attention: onnx_ir.Node, shared: list[onnx_ir.Value], attributes: dict[str, Any]
) -> None:
    query, present_key, present_value, _ = attention.inputs
    past_key, key = made_by(present_key, "Concat").inputs
    past_value, value = made_by(present_value, "Concat").inputs
    parts = [
        _projection(made_by(query, "RotaryEmbedding").inputs[0]),
        _projection(made_by(key, "RotaryEmbedding").inputs[0]),
        _projection(value),
    ]
    attended, *present = tape.op_multi_out(
        "GroupQueryAttention",
        [_packed(tape, parts), None, None, past_key, past_value, *shared],
        attributes,
        num_outputs=3,
        domain=ORT_DOMAIN,
    )
    (turned,) = attention.outputs[0].consumers()  # [B, H, M, D] -> [B, M, H, D]
    (joined,) = turned.outputs[0].consumers()  # -> [B, M, H * D]
    onnx_ir.convenience.replace_all_uses_with(joined.outputs[0], attended)
    for before, after, past in zip(
        (present_key, present_value), present, (past_key, past_value), strict=True
    ):
        _become_output(tape.graph_like, before, after, past)  # type: ignore[arg-type]


def _projection(heads: onnx_ir.Value | None) -> Projection:
    """What is split into heads [B, heads, M, D]."""
    flat = made_by(made_by(heads, "Transpose").inputs[0], "Reshape").inputs[0]
    node, bias = made_by(flat, "Add", "MatMul"), None
    if node.op_type == "Add":
        flat, bias = node.inputs
        node = made_by(flat, "MatMul")
    x, weight = node.inputs
    return Projection(x, weight, bias)  # type: ignore[arg-type]


def _packed(tape: Tape, parts: list[Projection]) -> onnx_ir.Value:
    """All three as one product: [B, M, (H + 2 Hkv) * D]"""
    body = tape.graph_like
    weight = joined_initializer(body, [part.weight for part in parts], "q_proj", "qkv_proj")  # type: ignore[arg-type]
    product = tape.op("MatMul", [parts[0].x, weight])
    biases = [part.bias for part in parts if part.bias is not None]
    if not biases:
        return product
    return tape.op("Add", [product, joined_initializer(body, biases, "q_proj", "qkv_proj")])  # type: ignore[arg-type]


def _lengths(
    tape: Tape, input_ids: onnx_ir.Value, write_indices: onnx_ir.Value
) -> list[onnx_ir.Value]:
    """Of the cache with the new tokens: less one [B], and the longest of the batch; both int32."""

    def constant(name: str, number: int) -> onnx_ir.Value:
        return tape.initializer(onnx_ir.tensor(np.array(number), name=f"lengths.{name}"))

    count = tape.op("Squeeze", [tape.op("Shape", [input_ids], {"start": 1, "end": 2})])  # M
    lengths = tape.op("Add", [write_indices, count])
    last = tape.op("Sub", [lengths, constant("one", 1)])
    longest = tape.op("ReduceMax", [lengths], {"keepdims": 0})
    to = {"to": onnx_ir.DataType.INT32}
    return [tape.op("Cast", [last], to), tape.op("Cast", [longest], to)]


def _rotary_tables(
    tape: Tape, config: HiMixConfig, dtype: onnx_ir.DataType | None
) -> list[onnx_ir.Value]:
    """cos and sin [slots, D / 2]: the operator wants a row a slot, though text begins at 0."""
    slots = config.decoder.max_position_embeddings + config.image_slots
    positions = np.arange(slots, dtype=np.float32)
    angles = positions[:, None] * inverse_frequencies(config.decoder).numpy()  # as the model does
    numbers = (dtype or onnx_ir.DataType.FLOAT).numpy()
    tables = (("cos", np.cos(angles)), ("sin", np.sin(angles)))
    return [
        tape.initializer(onnx_ir.tensor(table.astype(numbers), name=f"rotary.{name}"))
        for name, table in tables
    ]


def _free_slots(value: onnx_ir.Value) -> None:
    batch, heads, _, head_dim = value.shape  # type: ignore[misc]
    value.shape = onnx_ir.Shape([batch, heads, SLOTS, head_dim])


def _become_output(
    body: onnx_ir.Graph, before: onnx_ir.Value, after: onnx_ir.Value, past: onnx_ir.Value
) -> None:
    """`after` is from now on the output that `before` was, under its name, as long as its past."""
    after.name, before.name = before.name, f"{before.name}.grown"
    after.type, after.shape = past.type, past.shape
    body.outputs[body.outputs.index(before)] = after
