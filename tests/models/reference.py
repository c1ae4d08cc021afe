"""Algorithm 1 of the paper in plain loops over plain numbers (float64).

Slow, and with nothing in common with the model but the names of its weights: rotary embedding as a
turn in the complex plane, each head and each token by itself, no cache and no mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from himix_edge.config import DecoderConfig

Array = NDArray[np.float64]
Weights = dict[str, Array]


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """All weights at random. As made, norms and biases are ones and zeros and hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                weight.normal_(0, 0.5, generator=generator)
            else:
                weight.uniform_(0.5, 1.5, generator=generator)
    return module.eval().requires_grad_(False)


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_ids(batch: int, length: int, vocab_size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, length), generator=generator)


def weights_of(module: nn.Module) -> Weights:
    return {name: weight.double().numpy() for name, weight in module.state_dict().items()}


def turned(vector: Array, position: int, theta: float) -> Array:
    """Rotary embedding: k and k + D/2 as one complex number, turned by position * theta^(-2k/D)."""
    half = len(vector) // 2
    numbers = vector[:half] + 1j * vector[half:]
    rates = np.array([theta ** (-2 * k / len(vector)) for k in range(half)])
    numbers = numbers * np.exp(1j * position * rates)
    return np.concatenate((numbers.real, numbers.imag))


def mixture_attention(
    text: Array,
    image_keys: Array,
    image_values: Array,
    weights: Weights,
    prefix: str,
    config: DecoderConfig,
) -> Array:
    """Equations 5 and 6 for one text [M, h] after one image [N, Hkv * D]: [M, h]."""
    d, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    q, k, v = (_projected(text, weights, f"{prefix}{part}_proj") for part in "qkv")
    out = np.zeros((len(text), config.num_attention_heads * d))
    for head in range(config.num_attention_heads):
        mine = slice(head * d, (head + 1) * d)
        shared = slice(head // group * d, (head // group + 1) * d)
        for t in range(len(text)):
            query = turned(q[t, mine], t, config.rope_theta)
            keys = [key[shared] for key in image_keys]  # K_v: no position
            keys += [turned(k[s, shared], s, config.rope_theta) for s in range(t + 1)]  # K_l
            values = [value[shared] for value in image_values]
            values += [v[s, shared] for s in range(t + 1)]
            scores = [float(query @ key) / math.sqrt(d) for key in keys]
            shares = [math.exp(score) for score in scores]
            for share, value in zip(shares, values, strict=True):
                out[t, mine] += share / sum(shares) * value
    return out @ weights[f"{prefix}o_proj.weight"].T


def algorithm_1(
    input_ids: list[int], image: list[tuple[Array, Array]], weights: Weights, config: DecoderConfig
) -> Array:
    """Logits [M, V] of one text, given each layer's K_v and V_v [N, Hkv * D]."""
    text = weights["model.embed_tokens.weight"][input_ids]
    for i, (image_keys, image_values) in enumerate(image):
        layer = f"model.layers.{i}."
        normed = rms_normed(text, weights[f"{layer}input_layernorm.weight"], config.rms_norm_eps)
        text = text + mixture_attention(
            normed, image_keys, image_values, weights, f"{layer}self_attn.", config
        )
        normed = rms_normed(
            text, weights[f"{layer}post_attention_layernorm.weight"], config.rms_norm_eps
        )
        gate = _projected(normed, weights, f"{layer}mlp.gate_proj")
        up = _projected(normed, weights, f"{layer}mlp.up_proj")
        text = text + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{layer}mlp.down_proj.weight"].T
    text = rms_normed(text, weights["model.norm.weight"], config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return text @ weights[head].T


def rms_normed(x: Array, weight: Array, eps: float) -> Array:
    return np.stack([row / math.sqrt(sum(row * row) / len(row) + eps) * weight for row in x])


def connected(features: Array, weights: Weights, prefix: str) -> Array:
    """The connector of LLaVA-1.5, figure 4's grey box: linear, GELU (by its definition), linear."""
    hidden = _projected(features, weights, f"{prefix}0")
    hidden = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))(hidden)
    return _projected(hidden, weights, f"{prefix}2")


def shared_kv(image: Array, weights: Weights, layer: int, eps: float) -> tuple[Array, Array]:
    """Figure 4's mixture attention: the image goes in as text does, by norm and text's W^K, W^V."""
    prefix = f"model.layers.{layer}."
    normed = rms_normed(image, weights[f"{prefix}input_layernorm.weight"], eps)
    key, value = (_projected(normed, weights, f"{prefix}self_attn.{part}_proj") for part in "kv")
    return key, value


def heads_joined(kv: Tensor) -> Iterator[Array]:
    """[B, Hkv, N, D] -> B arrays [N, Hkv * D]"""
    for one in kv.double().numpy():
        yield np.concatenate(list(one), axis=-1)


def _projected(x: Array, weights: Weights, name: str) -> Array:
    product = x @ weights[f"{name}.weight"].T
    return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product
