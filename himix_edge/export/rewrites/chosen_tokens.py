"""A decoder graph that gives the logits of chosen tokens of a step, not of the last one alone.

logits [B, 1, V] of the last token  ->  logits [K, 1, V] of the tokens at `chosen` [K], of one row

Everything else stays as it is, so that what a prompt is measured with are the kernels that read it
on a device.
"""

from __future__ import annotations

import onnx_ir
from onnx_ir.tape import Tape

from himix_edge.errors import ExportError
from himix_edge.export.rewrites.residual import LAST_TOKEN

CHOSEN = "chosen"  # int64: the tokens' places in the step


def choose_tokens(graph: onnx_ir.Model) -> None:
    """Adds the input `chosen`, in place; B is 1 from then on.

    Raises:
        ExportError: a graph that is built otherwise.
    """
    body = graph.graph
    chosen = onnx_ir.Value(
        name=CHOSEN, shape=onnx_ir.Shape(["K"]), type=onnx_ir.TensorType(onnx_ir.DataType.INT64)
    )
    body.inputs.append(chosen)
    early = [node for node in body if node.op_type == "Gather" and _index(node) == LAST_TOKEN]
    for node in early:  # see `keep_last_token`: from here on the last layer has K tokens
        node.replace_input_with(1, chosen)
    ends = [node for node in body if node.op_type == "Gather" and _takes_last(node)]
    if len(ends) != 1:
        raise ExportError(
            "the graph has no place where the last token is chosen",
            expected="one Gather of index -1 ahead of the logits",
            found=str(len(ends)),
            fix="export with the torch version that this release pins",
        )
    [end] = ends
    tape = Tape(body)
    hidden = end.inputs[0]  # [1, M, h], or [1, K, h]
    if not early:
        hidden = tape.op("Gather", [hidden, chosen], {"axis": 1})
    first_axis = tape.initializer(onnx_ir.tensor([0], name="first_axis"))
    rows = tape.op("Squeeze", [hidden, first_axis])  # [K, h], where there was [B, h]
    onnx_ir.convenience.replace_all_uses_with(end.outputs[0], rows)
    body.remove(end, safe=True)
    body.outputs[0].shape = None  # [K, 1, V]
    body.sort()


def _index(node: onnx_ir.Node) -> str | None:
    return node.inputs[1].name if node.inputs[1] is not None else None


def _takes_last(node: onnx_ir.Node) -> bool:
    """Whether it takes [B, h] of [B, M, h]: the last token's."""
    index = node.inputs[1].const_value if node.inputs[1] is not None else None
    axis = node.attributes.get("axis")
    if index is None or axis is None or axis.as_int() != 1 or index.shape.rank():
        return False
    return int(index.numpy()) == -1
