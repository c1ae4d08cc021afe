"""RMSNorm written out in primitives -> RMSNormalization."""

from __future__ import annotations

from typing import Any

import onnx_ir
from onnxscript.rewriter import pattern

from himix_edge.export.rewrites.rule import Rule, constant


class RMSNormalization(Rule):
    """[Cast(] x / Sqrt(ReduceMean(x^2) + epsilon) [)] * weight  ->  RMSNormalization(x, weight)

    In half precision the model goes to fp32 and back, which is what stash_type 1 says.
    """

    def pattern(self, op: Any, x: Any, weight: Any, epsilon: Any) -> Any:
        wide = pattern.OrValue([op.Cast(x, to=onnx_ir.DataType.FLOAT), x])
        mean = op.ReduceMean(op.Pow(wide, 2.0), [-1], keepdims=1)
        normal = op.Mul(wide, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon))))
        return op.Mul(weight, pattern.OrValue([op.Cast(normal), normal]))

    def rewrite(self, op: Any, x: Any, weight: Any, epsilon: Any) -> Any:
        return op.RMSNormalization(x, weight, axis=-1, epsilon=constant(epsilon), stash_type=1)
