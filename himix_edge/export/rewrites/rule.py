"""What the rewrites have in common: each is a pattern of nodes and what takes its place."""

from __future__ import annotations

import onnx_ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnxscript.rewriter import pattern

from himix_edge.errors import ExportError


class Rule(pattern.RewriteRuleClassBase):
    """A rewrite; its docstring says which. Patterns may share nodes with each other.

    What is left without use is removed, and what then stands in the graph twice is merged.
    """

    def __init__(self) -> None:
        super().__init__(type(self).__name__, remove_nodes=False, as_function=False)

    @classmethod
    def apply(cls, graph: onnx_ir.Model, times: int) -> None:
        """Rewrites every place of the graph, in place.

        Args:
            times: how many places there must be.

        Raises:
            ExportError: another number of places.
        """
        rules = pattern.RewriteRuleSet([cls.rule()])  # type: ignore[no-untyped-call]
        found = rules.apply_to_model(graph)
        if found != times:
            raise ExportError(
                f"the graph has no place for {cls.__name__}",
                expected=f"{times} of its pattern",
                found=str(found),
                fix="export with the torch version that this release pins",
            )
        RemoveUnusedNodesPass()(graph)
        CommonSubexpressionEliminationPass()(graph)


def constant(value: onnx_ir.Value) -> float:
    """The number that an initializer of one element holds."""
    tensor = value.const_value
    if tensor is None or tensor.size != 1:
        raise ExportError(
            f"{value.name} is no constant", expected="one number", found=str(value.shape)
        )
    return float(tensor.numpy().reshape(()))


def made_by(value: onnx_ir.Value | None, *op_types: str) -> onnx_ir.Node:
    """The node that a value comes from.

    Raises:
        ExportError: it is of none of these types.
    """
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in op_types:
        raise ExportError(
            f"{value.name if value is not None else 'a value'} is made otherwise than expected",
            expected=" or ".join(op_types),
            found=node.op_type if node else "an input or a constant",
            fix="export with the torch version that this release pins",
        )
    return node
