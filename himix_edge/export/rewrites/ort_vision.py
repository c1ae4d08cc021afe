"""From the portable dialect's vision graph to the ort dialect's: fewer passes over the activations.

Only what ONNX Runtime 1.32 does faster on a CPU in one node, as measured; what it loses time by
stays in primitives. SkipLayerNormalization takes 7 times as long as an Add and a
LayerNormalization; one product for queries, keys and values takes as long as three, and then has to
be split; the patches' Conv is no slower than a product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
from onnxscript.rewriter import pattern

from himix_edge.analysis.costs import connectors
from himix_edge.config import HiMixConfig
from himix_edge.export.dialects import ORT_DOMAIN, ORT_OPSET
from himix_edge.export.products import FP32
from himix_edge.export.rewrites.rule import Rule, constant

FLASH_TOKENS = 512  # from how many on attention in tiles is faster than in whole matrices


def ort_vision(graph: onnx_ir.Model, config: HiMixConfig) -> None:
    """Rewrites a portable vision graph, in place; its inputs and outputs stay as they are.

    In half precision attention and activations stay in primitives: a CPU has no kernels for them.

    Raises:
        ExportError: a graph that is not what `vision_onnx_from_weights` makes.
    """
    vision = config.vision
    layers = vision.num_hidden_layers + 1 + vision.feature_layer
    if graph.graph.outputs[0].dtype is FP32:
        tokens = vision.num_patches
        attention = FlashAttention if tokens >= FLASH_TOKENS else WholeAttention
        attention.apply(graph, times=layers)
        activation = vision.hidden_act
        Gelu.apply(graph, times=layers * (activation == "gelu") + connectors(config))
        TanhGelu.apply(graph, times=layers * (activation == "gelu_pytorch_tanh"))
    graph.opset_imports.update({"": ORT_OPSET, ORT_DOMAIN: 1})


class WholeAttention(Rule):
    """Softmax(q * scale @ k^T) @ v  ->  Attention(q, k, v)

    q, k, v [B, N, H * D]. The primitives turn each to [B, H, N, D], and what comes out back again.
    """

    def pattern(self, op: Any, q: Any, k: Any, v: Any, shape: Any, scale: Any) -> Any:
        query = op.Transpose(op.Reshape(q, shape), perm=[0, 2, 1, 3])
        key = op.Transpose(op.Reshape(k, shape), perm=[0, 2, 3, 1])
        value = op.Transpose(op.Reshape(v, shape), perm=[0, 2, 1, 3])
        weights = op.Softmax(op.MatMul(op.Mul(query, scale), key), axis=-1)  # [B, H, N, N]
        attended = op.Transpose(op.MatMul(weights, value), perm=[0, 2, 1, 3])
        return op.Reshape(attended, pattern.ANY_VALUE)

    def rewrite(self, op: Any, q: Any, k: Any, v: Any, shape: Any, scale: Any) -> Any:
        heads = _heads(shape)
        return op.Attention(q, k, v, q_num_heads=heads, kv_num_heads=heads, scale=constant(scale))


class FlashAttention(WholeAttention):
    """Softmax(q * scale @ k^T) @ v  ->  MultiHeadAttention(q, k, v)

    Which ONNX Runtime computes in tiles that fit into the cache: the scores are never whole.
    """

    def rewrite(self, op: Any, q: Any, k: Any, v: Any, shape: Any, scale: Any) -> Any:
        return op.MultiHeadAttention(
            q, k, v, num_heads=_heads(shape), scale=constant(scale), _domain=ORT_DOMAIN
        )


class Gelu(Rule):
    """y * (0.5 * (1 + erf(y / sqrt(2))))  ->  Gelu(y)"""

    def pattern(self, op: Any, y: Any) -> Any:
        return op.Mul(y, op.Mul(0.5, op.Add(op.Erf(op.Div(y, 2**0.5)), 1.0)))

    def rewrite(self, op: Any, y: Any) -> Any:
        return op.Gelu(y)


class TanhGelu(Rule):
    """y * (0.5 * (1 + tanh(sqrt(2 / pi) * (y + 0.044715 * y^3))))  ->  Gelu(y, "tanh")"""

    def pattern(self, op: Any, y: Any) -> Any:
        inner = op.Mul((2 / np.pi) ** 0.5, op.Add(y, op.Mul(0.044715, op.Pow(y, 3.0))))
        return op.Mul(y, op.Mul(0.5, op.Add(op.Tanh(inner), 1.0)))

    def rewrite(self, op: Any, y: Any) -> Any:
        return op.Gelu(y, approximate="tanh")


def _heads(shape: onnx_ir.Value) -> int:
    """H, of [-1, N, H, D]"""
    return int(shape.const_value.numpy()[2])  # type: ignore[union-attr]
