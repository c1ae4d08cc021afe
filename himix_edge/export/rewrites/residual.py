"""What stands between a decoder's products, in fewer nodes of ONNX Runtime's own.

RMSNormalization(x + skip)  ->  SkipSimplifiedLayerNormalization(x, skip), which gives the sum too
x * Sigmoid(x)              ->  QuickGelu(x) with alpha 1, which is SiLU
the last layer              ->  of its last token alone, from the attention's output on
"""

from __future__ import annotations

from typing import Any

import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from himix_edge.errors import ExportError
from himix_edge.export.dialects import ORT_DOMAIN
from himix_edge.export.rewrites.packed import joined_initializer
from himix_edge.export.rewrites.rule import Rule, made_by

LAST_TOKEN = "last_token"  # the index by which the last layer's tokens are chosen


class SiLU(Rule):
    """x * Sigmoid(x)  ->  QuickGelu(x), alpha 1"""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Mul(x, op.Sigmoid(x))

    def rewrite(self, op: Any, x: Any) -> Any:
        return op.QuickGelu(x, alpha=1.0, _domain=ORT_DOMAIN)


def join_gate_and_up(graph: onnx_ir.Model, times: int) -> None:
    """Multiplies by the gate's weights and the other factor's at once, in place.

    Args:
        times: how often there must be a place for it.

    Raises:
        ExportError: another number of places.
    """
    body, tape = graph.graph, Tape(graph.graph)
    activations = [node for node in body if node.op_type == "QuickGelu"]
    if len(activations) != times:
        raise ExportError(
            "the graph has no place for one product of gate and factor",
            expected=f"{times} gates",
            found=str(len(activations)),
            fix="export with the torch version that this release pins",
        )
    for activation in activations:
        gate = made_by(activation.inputs[0], "MatMul")
        (product,) = activation.outputs[0].consumers()
        [other] = [value for value in product.inputs if value is not activation.outputs[0]]
        factor = made_by(other, "MatMul")
        weights = [gate.inputs[1], factor.inputs[1]]
        joined = joined_initializer(body, weights, "gate_proj", "gate_up_proj")  # type: ignore[arg-type]
        both = tape.op("MatMul", [gate.inputs[0], joined])  # [B, M, 2I]
        halves = tape.op_multi_out("Split", [both], {"axis": -1, "num_outputs": 2}, num_outputs=2)
        for node, half in zip((gate, factor), halves, strict=True):
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], half)
    body.sort()
    RemoveUnusedNodesPass()(graph)


def keep_last_token(graph: onnx_ir.Model) -> None:
    """Computes the last layer, once its keys and values are there, for the last token alone.

    Only its logits are asked for, and no later layer looks at the other tokens.

    Raises:
        ExportError: a graph that is built otherwise.
    """
    body, tape = graph.graph, Tape(graph.graph)
    attention = [node for node in body if node.op_type == "GroupQueryAttention"][-1]
    (product,) = attention.outputs[0].consumers()
    (add,) = product.outputs[0].consumers()
    made_by(add.outputs[0], "Add")
    last = tape.initializer(onnx_ir.tensor([-1], name=LAST_TOKEN))
    residual = add.inputs[1 - add.inputs.index(product.outputs[0])]
    for node, value in ((product, attention.outputs[0]), (add, residual)):
        kept = tape.op("Gather", [value, last], {"axis": 1})  # [B, 1, ...]
        node.replace_input_with(node.inputs.index(value), kept)
    body.sort()


def keep_every_token(graph: onnx_ir.Model) -> None:
    """The inverse of `keep_last_token`, for who wants to see what the last layer is fed.

    Every value keeps its name. A graph that was never rewritten so stays as it is.
    """
    for node in list(graph.graph):
        index = node.inputs[1] if node.op_type == "Gather" else None
        if index is not None and index.name == LAST_TOKEN:
            every = onnx_ir.Node("", "Identity", [node.inputs[0]])
            onnx_ir.convenience.replace_nodes_and_values(
                graph.graph, node, [node], [every], [node.outputs[0]], [every.outputs[0]]
            )
