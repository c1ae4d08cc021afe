"""One decoder for the Llama / Qwen2 family, under Hugging Face's parameter names.

It knows nothing of images: it is a stock causal decoder that goes on from whatever its cache holds.
References: transformers' `modeling_llama.py` and `modeling_qwen2.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from himix_edge.config import DecoderConfig
from himix_edge.contract import SUPPRESSED_LOGIT


class KV(NamedTuple):
    """One layer's cache."""

    key: Tensor  # [B, Hkv, S, D], text keys after rotary embedding
    value: Tensor  # [B, Hkv, S, D]


class Decoder(nn.Module):
    """Token ids and a cache in, logits and the longer cache out (HF: Qwen2ForCausalLM)."""

    suppression: Tensor  # [V], in fp32, where tokens are suppressed

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.suppressed_token_ids:  # not on the meta device, where a model to trace is made
            suppression = torch.zeros(config.vocab_size, dtype=torch.float32, device="cpu")
            suppression[list(config.suppressed_token_ids)] = SUPPRESSED_LOGIT
            self.register_buffer("suppression", suppression, persistent=False)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, past: list[KV] | None = None
    ) -> tuple[Tensor, list[KV]]:
        """Runs M tokens that follow P cached slots.

        Args:
            input_ids: [B, M]
            position_ids: [B, M], rotary positions; those of the slots do not matter.
            past: per layer [B, Hkv, P, D]; None is an empty cache.

        Returns:
            hidden states after the last norm [B, M, h] (`logits` turns them into logits), and the
            cache with M more slots.
        """
        return self.model(self.model.embed_tokens(input_ids), position_ids, past)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., h] -> [..., V], in fp32 where some are suppressed"""
        return self.suppressed(F.linear(hidden, self.head))

    @property
    def head(self) -> Tensor:
        """[V, h]"""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def suppressed(self, logits: Tensor) -> Tensor:
        """[..., V] -> [..., V]: those that are never to be chosen far below all others."""
        if not self.config.suppressed_token_ids:
            return logits
        return logits.float() + self.suppression.float()


class DecoderModel(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)

    def forward(
        self, hidden: Tensor, position_ids: Tensor, past: list[KV] | None
    ) -> tuple[Tensor, list[KV]]:
        past_length = past[0].key.shape[2] if past else 0
        mask = part_causal_mask(hidden.shape[1], past_length, hidden.device)  # [M, P + M]
        angles = self.rotary(position_ids)
        present = []
        for i, layer in enumerate(self.layers):
            hidden, kv = layer(hidden, angles, mask, past[i] if past else None)
            present.append(kv)
        return self.norm(hidden), present


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, hidden: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, past: KV | None
    ) -> tuple[Tensor, KV]:
        attended, present = self.self_attn(self.input_layernorm(hidden), angles, mask, past)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), present


class Attention(nn.Module):
    """Grouped-query attention over [past; new]: equations 5 and 6 when the past is the image."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        h, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(h, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(h, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(h, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, h, bias=False)

    def keys_and_values(self, x: Tensor) -> KV:
        """[B, T, h] -> key (before rotary embedding) and value, each [B, Hkv, T, D]"""
        return KV(
            split_heads(self.k_proj(x), self.kv_heads), split_heads(self.v_proj(x), self.kv_heads)
        )

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, past: KV | None
    ) -> tuple[Tensor, KV]:
        batch, length, _ = x.shape
        query = rotated(split_heads(self.q_proj(x), self.heads), angles)  # [B, H, M, D]
        query = query * self.head_dim**-0.5  # here, not after the product, which overflows fp16
        key, value = self.keys_and_values(x)
        key = rotated(key, angles)
        if past is not None:
            key = torch.cat((past.key, key), dim=2)  # [B, Hkv, P + M, D]
            value = torch.cat((past.value, value), dim=2)

        # The queries that share a key head stand below each other, so that keys are never repeated.
        rows = self.heads // self.kv_heads * length  # G * M
        query = query.reshape(batch, self.kv_heads, rows, self.head_dim)  # [B, Hkv, G * M, D]
        scores = query @ key.transpose(2, 3)  # [B, Hkv, G * M, P + M]
        scores = scores.reshape(batch, self.heads, length, -1)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.float().softmax(-1).to(value.dtype)
        attended = weights.reshape(batch, self.kv_heads, rows, -1) @ value
        attended = attended.reshape(batch, self.heads, length, self.head_dim)
        return self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1)), KV(key, value)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """In fp32 whatever the input: the square overflows fp16."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Rotary(nn.Module):
    """Rotary position embedding: position_ids [B, M] -> cos, sin [B, 1, M, D], in fp32."""

    inverse_frequencies: Tensor  # [D / 2]

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.register_buffer("inverse_frequencies", inverse_frequencies(config), persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[:, None, :, None].float() * self.inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def inverse_frequencies(config: DecoderConfig) -> Tensor:
    """Angle per position of each rotary pair: [D / 2], in fp32 (HF: `modeling_rope_utils`).

    With Llama 3's scaling, pairs that turn often within the original context stay as they are,
    those that turn seldom are slowed by `factor`, and between the two one goes over into the other.

    Computed, not loaded, and so real even where weights are on the meta device.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1 / config.rope_theta ** (pairs / config.head_dim)
    if (scaling := config.rope_scaling) is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotated(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, H, M, D] at the angles' positions, halves paired as in transformers' `rotate_half`."""
    cos, sin = angles
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-right, left), dim=-1) * sin.to(x.dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H * D] -> [B, H, T, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def part_causal_mask(length: int, past_length: int, device: torch.device) -> Tensor:
    """Who may look where, [M, P + M]: every token at all of the past, and at no later token.

    With the image in the first slots of the past this is the part-causal mask of paper 3.2.2.
    """
    slots = torch.arange(past_length + length, device=device)
    tokens = torch.arange(length, device=device)
    return slots[None, :] <= tokens[:, None] + past_length
