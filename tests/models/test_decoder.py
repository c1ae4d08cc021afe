"""The decoder against transformers' stock models under the same random weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from himix_edge.config import DecoderConfig, RopeScaling
from himix_edge.models.decoder import (
    KV,
    Decoder,
    RMSNorm,
    inverse_frequencies,
    part_causal_mask,
)
from tests import tolerances
from tests.models.reference import random_ids, randomized

QWEN2 = DecoderConfig(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=128,
    attention_bias=True,
    tie_word_embeddings=True,
)
LLAMA = dataclasses.replace(QWEN2, attention_bias=False, tie_word_embeddings=False)
STOCK: dict[str, tuple[type[PreTrainedModel], type[PreTrainedConfig], DecoderConfig]] = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, QWEN2),
    "qwen2-untied": (
        Qwen2ForCausalLM,
        Qwen2Config,
        dataclasses.replace(QWEN2, tie_word_embeddings=False, rope_theta=1e6),
    ),
    "qwen2-multi-head": (
        Qwen2ForCausalLM,
        Qwen2Config,
        dataclasses.replace(QWEN2, num_key_value_heads=4),
    ),
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA),
    "llama-multi-query": (
        LlamaForCausalLM,
        LlamaConfig,
        dataclasses.replace(LLAMA, num_key_value_heads=1, rope_theta=5e5),
    ),
    "llama-wide-heads": (
        LlamaForCausalLM,
        LlamaConfig,
        dataclasses.replace(LLAMA, head_dim=20, tie_word_embeddings=True),
    ),
    "llama-large-eps": (
        LlamaForCausalLM,
        LlamaConfig,
        dataclasses.replace(LLAMA, rms_norm_eps=0.25, rope_theta=50.0),
    ),
    "llama-3": (
        LlamaForCausalLM,
        LlamaConfig,
        dataclasses.replace(LLAMA, rope_theta=500.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)),
    ),
}


@pytest.fixture(params=STOCK)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Decoder]:
    """A stock model, and our decoder with its weights."""
    return stock_and_ours(*STOCK[request.param])


def stock_and_ours(
    model_class: type[Any], config_class: type[Any], config: DecoderConfig
) -> tuple[Any, Decoder]:
    fields = dataclasses.asdict(config)
    del fields["eos_token_ids"]
    theta, scaling = fields.pop("rope_theta"), fields.pop("rope_scaling")
    if config_class is Qwen2Config:
        del fields["attention_bias"], fields["head_dim"]  # Qwen2 has the one, and derives the other
    kind = "default" if scaling is None else "llama3"
    fields["rope_parameters"] = {"rope_type": kind, "rope_theta": theta, **(scaling or {})}
    stock = randomized(model_class(config_class(**fields, attn_implementation="eager")))
    weights = dict(stock.state_dict())
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    ours = Decoder(config).eval().requires_grad_(False)
    ours.load_state_dict(weights, strict=True)
    return stock, ours


def test_logits_and_cache_are_transformers_own(pair: tuple[Any, Decoder]) -> None:
    stock, ours = pair
    ids = random_ids(2, 9, ours.config.vocab_size)
    expected = stock(ids, use_cache=True)
    assert expected.logits.std() > 0.5  # or else any tolerance would do
    hidden, cache = ours(ids, torch.arange(9).expand(2, 9))
    assert_near(ours.logits(hidden), expected.logits)
    for (key, value), layer in zip(cache, expected.past_key_values.layers, strict=True):
        assert_near(key, layer.keys)
        assert_near(value, layer.values)


@pytest.mark.parametrize("split", [(1,) * 9, (8, 1), (5, 1, 1, 1, 1), (2, 3, 4), (1, 8)], ids=str)
def test_over_a_cache_the_logits_are_the_same(
    pair: tuple[Any, Decoder], split: tuple[int, ...]
) -> None:
    stock, ours = pair
    ids = random_ids(2, sum(split), ours.config.vocab_size)
    expected = stock(ids).logits
    cache: list[KV] | None = None
    start = 0
    for length in split:
        positions = torch.arange(start, start + length).expand(2, length)
        hidden, cache = ours(ids[:, start : start + length], positions, cache)
        assert_near(ours.logits(hidden), expected[:, start : start + length])
        start += length
        assert cache[0].key.shape[2] == start


def test_positions_are_those_given_and_not_those_of_the_slots(pair: tuple[Any, Decoder]) -> None:
    stock, ours = pair
    ids = random_ids(2, 5, ours.config.vocab_size)
    positions = torch.tensor([[0, 1, 5, 6, 90], [2, 3, 40, 8, 20]])
    expected = stock(ids, attention_mask=torch.ones(2, 5), position_ids=positions).logits
    assert_near(ours.logits(ours(ids, positions)[0]), expected)
    plain = ours.logits(ours(ids, torch.arange(5).expand(2, 5))[0])
    assert (plain - expected).abs().max() > 0.01


def test_a_later_token_does_not_touch_earlier_logits(pair: tuple[Any, Decoder]) -> None:
    _, ours = pair
    positions = torch.arange(6).expand(1, 6)
    ids = random_ids(1, 6, ours.config.vocab_size)
    logits = ours.logits(ours(ids, positions)[0])
    for changed in range(6):
        others = ids.clone()
        others[0, changed] = (ids[0, changed] + 1) % ours.config.vocab_size
        moved = (ours.logits(ours(others, positions)[0]) != logits).any(-1)[0]
        assert moved.tolist() == [token >= changed for token in range(6)]


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (64, 1e4, None),
        (64, 1e6, None),
        (64, 5e5, RopeScaling(32.0, 1.0, 4.0, 8192)),  # Llama 3.2 1B
        (128, 5e5, RopeScaling(32.0, 1.0, 4.0, 8192)),  # Llama 3.2 3B
        (128, 5e5, RopeScaling(8.0, 1.0, 4.0, 8192)),  # Llama 3.1
        (12, 500.0, RopeScaling(3.0, 0.5, 2.5, 64)),
    ],
)
def test_frequencies_are_transformers_own(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> None:
    """To the last bit: at position 100,000 the last bit is 0.006 radians."""
    kind = "default" if scaling is None else "llama3"
    stock = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": kind,
            "rope_theta": theta,
            **(dataclasses.asdict(scaling) if scaling else {}),
        },
    )
    config = dataclasses.replace(LLAMA, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    assert torch.equal(inverse_frequencies(config), LlamaRotaryEmbedding(stock).inv_freq)


def test_llama_3_slows_what_turns_seldom() -> None:
    """By the definition: more than 4 turns in 8192 tokens as before, less than one 32 times as
    slow."""
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(LLAMA, head_dim=64, rope_theta=5e5)
    plain = inverse_frequencies(config).double()
    scaled = inverse_frequencies(dataclasses.replace(config, rope_scaling=scaling)).double()
    turns = (plain * 8192 / (2 * math.pi)).tolist()
    slower = (plain / scaled).tolist()
    for count, ratio in zip(turns, slower, strict=True):
        if count > 4:
            assert ratio == 1
        elif count < 1:
            assert ratio == 32
        else:
            share = (count - 1) / 3
            assert 1 / ratio == pytest.approx(share + (1 - share) / 32, rel=1e-6)
    assert min(turns) < 1 < sorted(turns)[-1]
    assert any(1 < count < 4 for count in turns)


@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, 1.0, 4.0, 64)])
def test_made_without_weights_its_frequencies_are_real(scaling: RopeScaling | None) -> None:
    config = dataclasses.replace(LLAMA, rope_scaling=scaling)
    with torch.device("meta"):
        hollow = Decoder(config)
    assert all(weight.is_meta for weight in hollow.state_dict().values())
    frequencies = hollow.model.rotary.inverse_frequencies
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, Decoder(config).model.rotary.inverse_frequencies)


def test_mask_without_a_past_is_causal() -> None:
    assert part_causal_mask(3, 0, torch.device("cpu")).int().tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
    ]


def test_mask_shows_all_of_the_past() -> None:
    #   image, image, and the text's three tokens
    assert part_causal_mask(3, 2, torch.device("cpu")).int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


def test_mask_of_one_token_hides_nothing() -> None:
    assert part_causal_mask(1, 4, torch.device("cpu")).int().tolist() == [[1, 1, 1, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_does_not_overflow_in_half_precision(dtype: torch.dtype) -> None:
    norm = RMSNorm(4, eps=1e-6).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
    normed = norm(torch.tensor([[3000.0, -4000.0, 0.0, 0.0]], dtype=dtype))  # squares: 9e6, 16e6
    assert normed.dtype == dtype
    rms = math.sqrt((3000**2 + 4000**2) / 4)
    expected = torch.tensor([[3000 / rms, -8000 / rms, 0.0, 0.0]])
    torch.testing.assert_close(
        normed.float(), expected, rtol=0, atol=tolerances.HALF_PRECISION_NORM
    )


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerances.MODEL_LOGITS)
