"""Rotary embedding written out in primitives -> RotaryEmbedding."""

from __future__ import annotations

from typing import Any

from onnxscript.rewriter import pattern

from himix_edge.export.rewrites.rule import Rule


class RotaryEmbedding(Rule):
    """x * cos + Concat(-right, left) * sin  ->  RotaryEmbedding(x, cos, sin)

    x [B, H, M, D]; the angles [B, 1, M, D / 2] stand twice beside each other in the primitives, and
    once, as [B, M, D / 2], in the operator. cos and sin are computed in fp32 in both.
    """

    def pattern(self, op: Any, x: Any, angles: Any) -> Any:
        twice = op.Concat(angles, angles, axis=-1)
        cos, sin = op.Cos(twice), op.Sin(twice)
        left, right = op.Split(x, axis=3, num_outputs=2, _outputs=2)
        turned = op.Concat(op.Neg(right), left, axis=-1)
        cos = pattern.OrValue([op.Cast(cos, to=pattern.AttrVar("dtype")), cos])
        sin = pattern.OrValue([op.Cast(sin), sin])
        return op.Add(op.Mul(x, cos), op.Mul(turned, sin))

    def rewrite(self, op: Any, x: Any, angles: Any, dtype: Any = None) -> Any:
        once = op.Squeeze(angles, op.Constant(value_ints=[1]))  # [B, M, D / 2]
        cos, sin = op.Cos(once), op.Sin(once)
        if dtype is not None:
            cos, sin = op.Cast(cos, to=dtype.as_int()), op.Cast(sin, to=dtype.as_int())
        return op.RotaryEmbedding(x, cos, sin)
