"""The two modules that become graphs: the model cut where the runtime cuts it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from himix_edge.config import HiMixConfig
from himix_edge.models.decoder import KV, Decoder
from himix_edge.models.himix import HiMix
from himix_edge.models.injection import HiMixInjection
from himix_edge.models.weights import StackedWeight, Weights

PLAIN = "himix_edge_plain"  # our attention's name among transformers'


class VisionGraph(nn.Module):
    """pixel_values [B, 3, H, W] in fp32 -> key and value of every layer, each [B, Hkv, N, D]."""

    def __init__(self, model: HiMix) -> None:
        super().__init__()
        self.vision = model.vision
        embeddings = self.vision.model.embeddings
        if embeddings.patch_embedding.weight.dtype == torch.bfloat16:
            patches = WidePatches(embeddings.patch_embedding)
            embeddings.patch_embedding = patches  # type: ignore[assignment]
        self.decoder = model.decoder
        injection = model.injection
        if isinstance(injection, HiMixInjection):
            injection = WideProjections(injection, model.decoder)
        self.injection = injection

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        dtype = next(self.vision.parameters()).dtype
        with plain_attention(self.vision.model):
            features = self.vision(pixel_values.to(dtype))
        return flat(self.injection(features, self.decoder))


class WidePatches(nn.Module):
    """The patches' convolution in fp32: before opset 22 there is none in bfloat16."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.stride = convolution.stride

    def forward(self, pixel_values: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        patches = F.conv2d(pixel_values.float(), self.weight.float(), bias, self.stride)
        return patches.to(self.weight.dtype)


class WideProjections(nn.Module):
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
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """transformers' attention as two products and a softmax: in a graph, no shape arithmetic.

    Not its own "eager", whose products overflow float16 before they are scaled, and whose softmax
    torch's exporter leaves in float16.
    """
    before = model.config._attn_implementation
    AttentionInterface.register(PLAIN, _two_products_and_a_softmax)
    model.set_attn_implementation(PLAIN)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _two_products_and_a_softmax(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Every patch sees every other: query, key, value [B, H, N, D] -> [B, N, H, D], and weights."""
    scores = (query * scaling) @ key.transpose(2, 3)  # [B, H, N, N]
    weights = scores.float().softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights
