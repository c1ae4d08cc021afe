"""How much of a text's attention goes to each image token, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from himix_edge.convert.teacher import Teacher
from himix_edge.models.decoder import KV, part_causal_mask, rotated, split_heads

FLOOR = 0.1  # the weight that an image token has even where nobody looks at it; the mean is 1


@torch.no_grad()
def token_weights(teacher: Teacher, cache: list[KV], prompts: Sequence[Sequence[int]]) -> Tensor:
    """[L, B, N]: for each image a mean of 1 over its tokens, in every layer.

    In proportion to the attention that the tokens of all prompts pay, over a floor.

    Args:
        cache: of `Teacher.image_cache`.
    """
    tokens = sum(len(prompt) for prompt in prompts)
    paid = torch.stack([attention_paid(teacher, cache, prompt) for prompt in prompts])
    lengths = paid.new_tensor([len(prompt) for prompt in prompts])
    mean = torch.einsum("plbn,p->lbn", paid, lengths) / tokens
    return FLOOR + (1 - FLOOR) * mean / mean.mean(-1, keepdim=True)


@torch.no_grad()
def attention_paid(teacher: Teacher, cache: list[KV], prompt: Sequence[int]) -> Tensor:
    """[L, B, N]: softmax weights on the image's slots, their mean over heads and text tokens."""
    decoder = teacher.model.decoder.model
    batch, slots = cache[0].key.shape[0], cache[0].key.shape[2]
    ids = torch.tensor([list(prompt)], device=teacher.device)
    hidden = decoder.embed_tokens(ids).expand(batch, -1, -1)  # [B, M, h]
    length = hidden.shape[1]
    mask = part_causal_mask(length, slots, hidden.device)
    angles = decoder.rotary(torch.arange(slots, slots + length, device=hidden.device)[None])
    paid = []
    for layer, past in zip(decoder.layers, cache, strict=True):
        after, present = layer(hidden, angles, mask, past)
        weights = attention_weights(layer, hidden, angles, mask, present.key)  # [B, H, M, S]
        paid.append(weights[..., teacher.prefix_tokens : slots].mean((1, 2)))
        hidden = after
    return torch.stack(paid)


def attention_weights(
    layer: Any, hidden: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, key: Tensor
) -> Tensor:
    """What `Attention.forward` has no need to give: its softmax, [B, H, M, S], in fp32.

    Args:
        layer: a decoder's `Layer`; ModuleList forgets it.
        hidden: [B, M, h], before the layer's norm.
        key: [B, Hkv, S, D], those of the past and of these tokens.
    """
    attention = layer.self_attn
    query = split_heads(attention.q_proj(layer.input_layernorm(hidden)), attention.heads)
    query = rotated(query, angles) * attention.head_dim**-0.5
    keys = key.repeat_interleave(attention.heads // attention.kv_heads, dim=1)
    scores = (query @ keys.transpose(2, 3)).float()
    weights: Tensor = scores.masked_fill(~mask, torch.finfo(torch.float32).min).softmax(-1)
    return weights
