"""Attention written out in primitives -> Attention, in the decoder and in the encoder."""

from __future__ import annotations

from typing import Any

from onnxscript.rewriter import pattern

from himix_edge.export.rewrites.rule import Rule, constant


class DecoderAttention(Rule):
    """Softmax(Where(mask, q * scale @ k^T, -inf)) @ v  ->  Attention(q, k, v, mask)

    q [B, H, M, D]; k, v [B, Hkv, S, D]; mask [M, S], true where a token may look. In the primitives
    the queries that share a key head stand below each other: [B, Hkv, G * M, D]; the operator
    knows of grouped queries by itself.
    """

    def pattern(self, op: Any, q: Any, k: Any, v: Any, mask: Any, scale: Any) -> Any:
        grouped = op.Reshape(op.Mul(q, scale), pattern.ANY_VALUE)
        scores = op.MatMul(grouped, op.Transpose(k, perm=[0, 1, 3, 2]))
        scores = op.Reshape(scores, pattern.ANY_VALUE)  # [B, H, M, S]
        scores = op.Where(op.Not(mask), pattern.ANY_VALUE, scores)
        weights = _softmax(op, scores)
        attended = op.MatMul(op.Reshape(weights, pattern.ANY_VALUE), v)
        return op.Reshape(attended, pattern.ANY_VALUE)  # [B, H, M, D]

    def rewrite(self, op: Any, q: Any, k: Any, v: Any, mask: Any, scale: Any) -> Any:
        return op.Attention(q, k, v, mask, scale=constant(scale))


class EncoderAttention(Rule):
    """Softmax(q * scale @ k^T) @ v  ->  Attention(q, k, v)

    q, v [B, H, N, D]; the primitives take k [B, N, H, D] and turn it all the way at once.
    """

    def pattern(self, op: Any, q: Any, k: Any, v: Any, scale: Any) -> Any:
        scores = op.MatMul(op.Mul(q, scale), op.Transpose(k, perm=[0, 2, 3, 1]))
        return op.MatMul(_softmax(op, scores), v)

    def rewrite(self, op: Any, q: Any, k: Any, v: Any, scale: Any) -> Any:
        return op.Attention(q, op.Transpose(k, perm=[0, 2, 1, 3]), v, scale=constant(scale))


def _softmax(op: Any, scores: Any) -> Any:
    """Along the last axis, in fp32."""
    weights = op.Softmax(pattern.OrValue([op.Cast(scores), scores]), axis=-1)
    return pattern.OrValue([op.Cast(weights), weights])
