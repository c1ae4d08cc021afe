from __future__ import annotations

from typing import Any

import torch

from himix_edge.convert.attention import FLOOR, attention_paid, attention_weights, token_weights
from himix_edge.convert.teacher import Teacher
from himix_edge.models.decoder import part_causal_mask
from tests.models.reference import random_tensor
from tests.tiny import tiny_config, tiny_model
from tests.tolerances import ATTENTION

PROMPTS = [[1, 40, 41, 42, 2], [1, 50, 2]]


def teacher() -> Teacher:
    return Teacher(tiny_model(tiny_config("vanilla")), prefix_ids=(5, 6))


def test_the_weights_bring_what_the_layer_brings() -> None:
    """Softmax times values, through o_proj, is the output of the attention."""
    layer: Any = teacher().model.decoder.model.layers[1]
    rotary = teacher().model.decoder.model.rotary
    hidden, past = random_tensor(2, 3, 32), teacher().image_cache(random_tensor(2, 4, 32, seed=1))
    angles, mask = rotary(torch.arange(6, 9)[None]), part_causal_mask(3, 6, hidden.device)
    expected, present = layer.self_attn(layer.input_layernorm(hidden), angles, mask, past[1])
    weights = attention_weights(layer, hidden, angles, mask, present.key)  # [B, H, M, S]
    brought = weights @ present.value.repeat_interleave(2, dim=1)
    joined = layer.self_attn.o_proj(brought.transpose(1, 2).flatten(2))
    assert torch.allclose(joined, expected, rtol=0, atol=ATTENTION)


def test_what_is_paid_goes_by_layer_image_and_slot() -> None:
    """One image token's key is the same as that of another: they are paid alike, in that layer."""
    model = teacher()
    cache = model.image_cache(random_tensor(2, 4, 32))
    paid = attention_paid(model, cache, PROMPTS[0])
    assert paid.shape == (2, 2, 4)
    assert bool((paid > 0).all())
    assert bool((paid.sum(-1) < 1).all())  # the rest goes to the prefix and to the text
    cache[1].key[1, :, 2 + 3] = cache[1].key[1, :, 2 + 1]
    again = attention_paid(model, cache, PROMPTS[0])
    assert abs(again[1, 1, 3] - again[1, 1, 1]) < ATTENTION
    assert torch.allclose(again[0], paid[0], rtol=0, atol=ATTENTION)
    assert torch.allclose(again[1, 0], paid[1, 0], rtol=0, atol=ATTENTION)


def test_every_text_token_counts_once_and_the_mean_is_one() -> None:
    model = teacher()
    cache = model.image_cache(random_tensor(2, 4, 32))
    five, three = (attention_paid(model, cache, prompt) for prompt in PROMPTS)
    mean = (5 * five + 3 * three) / 8
    weights = token_weights(model, cache, PROMPTS)
    assert torch.allclose(weights.mean(-1), torch.ones(2, 2), rtol=0, atol=ATTENTION)
    share = mean / mean.sum(-1, keepdim=True) * 4
    assert torch.allclose(weights, FLOOR + (1 - FLOOR) * share, rtol=0, atol=1e-5)
