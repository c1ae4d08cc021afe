"""The two modules that become graphs: the model cut where the runtime cuts it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from himix_edge.config import HiMixConfig
from himix_edge.export.wide import NOTHING_WIDE, WideParts, dtype_of, is_wide, widen_encoder
from himix_edge.models.decoder import KV, Decoder
from himix_edge.models.himix import HiMix
from himix_edge.models.injection import HiMixInjection
from himix_edge.models.weights import StackedWeight, Weights

PLAIN = "himix_edge_plain"  # our attention's name among transformers'


class VisionGraph(nn.Module):
    """pixel_values [B, 3, H, W] in fp32 -> key and value of every layer, each [B, Hkv, N, D].

    The model becomes part of it, and is no longer of use by itself.

    Args:
        wide: what is in fp32 although the model is in float16.
    """

    def __init__(self, model: HiMix, wide: WideParts = NOTHING_WIDE) -> None:
        super().__init__()
        self.vision = model.vision
        self.decoder = model.decoder
        self.dtype = dtype_of(model.decoder)
        if self.dtype != torch.float32:
            widen_encoder(self.vision.model, wide)
        self.injection = model.injection
        if isinstance(model.injection, HiMixInjection):
            self.injection = StackedProjections(model.injection, model.decoder)
        if wide.projections:
            self.injection.float()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        with plain_attention(self.vision.model):
            features = self.vision(pixel_values.to(dtype_of(self.vision)))
        kv = self.injection(features.to(dtype_of(self.injection)), self.decoder)
        return tuple(part.to(self.dtype) for part in flat(kv))


class StackedProjections(nn.Module):
    """All layers' W_v^K and W_v^V as one matrix: one product reads the features once.

    Equal to `HiMixInjection`, whose weights it stacks in the order of the outputs.
    """

    weight: Tensor  # [L * 2 * Hkv * D, d_v]

    def __init__(self, injection: HiMixInjection, decoder: Decoder) -> None:
        super().__init__()
        self.heads = decoder.config.num_key_value_heads
        self.head_dim = decoder.config.head_dim
        self.parts = 2 * decoder.config.num_hidden_layers
        self.register_buffer("weight", torch.cat([p.detach() for p in injection.parameters()]))

    def forward(self, features: Tensor, decoder: Decoder) -> list[KV]:
        projected = F.linear(features, self.weight)  # [B, N, L * 2 * Hkv * D]
        shape = (*features.shape[:2], self.parts, self.heads, self.head_dim)
        return layered(projected.reshape(shape).permute(2, 0, 3, 1, 4).unbind(0))


def vision_graph_weights(config: HiMixConfig, weights: Weights) -> Weights:
    """The weights of `VisionGraph` by its own names, from those of the model."""
    if config.design != "himix":
        return weights
    names = [
        f"injection.layers.{i}.{part}_proj.weight"
        for i in range(config.decoder.num_hidden_layers)
        for part in ("k", "v")
    ]
    return {**weights, "injection.weight": StackedWeight(tuple(weights[name] for name in names))}


class DecoderGraph(nn.Module):
    """M tokens over a cache of P slots, P >= 1 -> logits [B, 1, V] of the last, and the cache.

    Whatever the weights and the cache are in, the logits are in fp32.
    """

    def __init__(self, model: HiMix) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        hidden, present = self.decoder(input_ids, position_ids, layered(past))
        logits = self.decoder.logits(hidden[:, -1]).float()  # [B, V]
        return logits[:, None], *flat(present)


def flat(cache: Sequence[KV]) -> tuple[Tensor, ...]:
    """Key 0, value 0, key 1, value 1, ...: the order of the contract's names."""
    return tuple(part for kv in cache for part in kv)


def layered(parts: Sequence[Tensor]) -> list[KV]:
    """The inverse of `flat`."""
    return [KV(key, value) for key, value in zip(parts[::2], parts[1::2], strict=True)]


@contextlib.contextmanager
def plain_attention(
    model: PreTrainedModel, look: Callable[[nn.Module, Tensor], None] | None = None
) -> Iterator[None]:
    """transformers' attention as two products and a softmax: in a graph, no shape arithmetic.

    Not its own "eager", whose products overflow float16 before they are scaled, and whose softmax
    torch's exporter leaves in float16.

    Args:
        look: called with every attention module and its scores [B, H, N, N] before the softmax.
    """

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return _two_products_and_a_softmax(module, *args, **kwargs, look=look)

    before = model.config._attn_implementation
    AttentionInterface.register(PLAIN, attention)
    model.set_attn_implementation(PLAIN)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _two_products_and_a_softmax(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: None,
    *,
    scaling: float,
    look: Callable[[nn.Module, Tensor], None] | None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Every patch sees every other: query, key, value [B, H, N, D] -> [B, N, H, D], and weights."""
    if is_wide(module):  # what looks otherwise is never made an `Attention`: there is none in fp32
        scores = (query @ key.transpose(2, 3)) * scaling
    else:
        scores = (query * scaling) @ key.transpose(2, 3)  # [B, H, N, N]
    if look:
        look(module, scores)
    weights = scores.float().softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights
