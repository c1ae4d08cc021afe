"""The two modules that become graphs: the model cut where the runtime cuts it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from himix_edge.config import DecoderConfig, HiMixConfig
from himix_edge.export.wide import NOTHING_WIDE, WideParts, dtype_of, is_wide, widen_encoder
from himix_edge.models.decoder import KV, Decoder, rotated
from himix_edge.models.himix import HiMix
from himix_edge.models.injection import HiMixInjection, image_angles
from himix_edge.models.weights import StackedWeight, Weight, Weights

PLAIN = "himix_edge_plain"  # our attention's name among transformers'


class VisionGraph(nn.Module):
    """pixel_values [B, 3, H, W] in fp32 -> key and value of every layer, each [B, Hkv, P + N, D].

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
    """All layers' W_v^K and W_v^V as one matrix: one product reads its input once.

    Equal to `HiMixInjection`; all its keys come first, then all values, so that a converted model's
    keys are rotated together. Their bias and rotation are in fp32 in any case: a bias may be a
    hundred times as large as what it is added to, and so half precision rounds a key only once.
    """

    weight: Tensor  # [2 * L * Hkv * D, d]
    bias: Tensor | None  # [2 * L * Hkv * D], in fp32
    prefix: Tensor | None  # [1, 2 * L * Hkv, P, D]

    def __init__(self, injection: HiMixInjection, decoder: Decoder) -> None:
        super().__init__()
        self.heads, self.head_dim = decoder.config.num_key_value_heads, decoder.config.head_dim
        self.rotates, self.inputs = injection.rotates, injection.inputs
        weights = dict(injection.named_parameters())

        def stacked(kind: str) -> Tensor:
            return torch.cat([weights[name].detach() for name in _keys_first(decoder.config, kind)])

        has_bias, prefix = "layers.0.k_proj.bias" in weights, injection.prefix
        self.register_buffer("weight", stacked("weight"))
        self.register_buffer("bias", stacked("bias").float() if has_bias else None)
        self.register_buffer("prefix", None if prefix is None else _joined_prefix(prefix.detach()))

    def forward(self, features: Tensor, decoder: Decoder) -> list[KV]:
        projected = F.linear(self.inputs(features), self.weight)  # [B, N, 2 * L * Hkv * D]
        if self.bias is not None:
            projected = projected.float() + self.bias
        kv = projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, 2 * L * Hkv, N, D]
        if self.rotates:
            keys, values = kv.chunk(2, dim=1)
            keys = rotated(keys.float(), image_angles(decoder, features.shape[1]))
            kv = torch.cat((keys.to(kv.dtype), values), dim=1)
        kv = kv.to(features.dtype)
        if self.prefix is not None:
            kv = torch.cat((self.prefix.expand(kv.shape[0], -1, -1, -1), kv), dim=2)
        keys_and_values = kv.split(self.heads, dim=1)
        layers = len(keys_and_values) // 2
        return list(map(KV, keys_and_values[:layers], keys_and_values[layers:]))


@dataclass(frozen=True)
class PrefixWeight:
    """A model's prefix [L, 2, Hkv, P, D] as `StackedProjections` has it."""

    prefix: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        layers, parts, heads, *slots = self.prefix.shape
        return (1, parts * layers * heads, *slots)

    def read(self) -> Tensor:
        return _joined_prefix(self.prefix.read())

    def problem(self) -> str | None:
        return self.prefix.problem()


def vision_graph_weights(config: HiMixConfig, weights: Weights) -> Weights:
    """The weights of `VisionGraph` by its own names, from those of the model."""
    if config.design != "himix":
        return weights
    own: dict[str, Weight] = {}
    for kind in ("weight", "bias") if config.projection.bias else ("weight",):
        names = _keys_first(config.decoder, kind)
        own[f"injection.{kind}"] = StackedWeight(
            tuple(weights[f"injection.{name}"] for name in names)
        )
    if config.prefix_tokens:
        own["injection.prefix"] = PrefixWeight(weights["injection.prefix"])
    return {**weights, **own}


def _keys_first(config: DecoderConfig, kind: str) -> list[str]:
    """The parameters of one kind of all layers' projections, in the order they are stacked in."""
    layers = range(config.num_hidden_layers)
    return [f"layers.{i}.{part}_proj.{kind}" for part in ("k", "v") for i in layers]


def _joined_prefix(prefix: Tensor) -> Tensor:
    """[L, 2, Hkv, P, D] -> [1, 2 * L * Hkv, P, D]: all keys, then all values"""
    return prefix.transpose(0, 1).flatten(0, 2)[None]


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
