"""The two modules that become graphs: the model cut where the runtime cuts it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from himix_edge.models.decoder import KV, Decoder
from himix_edge.models.himix import HiMix
from himix_edge.models.injection import HiMixInjection


class VisionGraph(nn.Module):
    """pixel_values [B, 3, H, W] -> key and value of every layer, each [B, Hkv, N, D]."""

    def __init__(self, model: HiMix) -> None:
        super().__init__()
        self.vision = model.vision
        self.decoder = model.decoder
        injection = model.injection
        if isinstance(injection, HiMixInjection):
            injection = WideProjections(injection, model.decoder)
        self.injection = injection

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        with plain_attention(self.vision.model):
            features = self.vision(pixel_values)
        return flat(self.injection(features, self.decoder))


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


class DecoderGraph(nn.Module):
    """M tokens over a cache of P slots, P >= 1 -> logits [B, 1, V] of the last, and the cache."""

    def __init__(self, model: HiMix) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        hidden, present = self.decoder(input_ids, position_ids, layered(past))
        logits = self.decoder.logits(hidden[:, -1])  # [B, V]
        return logits[:, None], *flat(present)


def flat(cache: Sequence[KV]) -> tuple[Tensor, ...]:
    """Key 0, value 0, key 1, value 1, ...: the order of the contract's names."""
    return tuple(part for kv in cache for part in kv)


def layered(parts: Sequence[Tensor]) -> list[KV]:
    """The inverse of `flat`."""
    return [KV(key, value) for key, value in zip(parts[::2], parts[1::2], strict=True)]


@contextlib.contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention as two matrix products and a softmax: in a graph, no shape arithmetic."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
