"""The presets' dimensions: parameters counted on models without weights, against what is published,
and against formulas."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from himix_edge.config import DecoderConfig, HiMixConfig, VisionConfig
from himix_edge.errors import ConfigError
from himix_edge.models.decoder import Decoder
from himix_edge.models.vision import VisionEncoder
from himix_edge.presets import DECODERS, DEFAULT_DECODER, ENCODERS, preset

# Paper, table 6: parameters in billions, image tokens (SigLIP: 728 there, see presets.py), width.
TABLE_6 = {
    "siglip-so400m-384": (0.428, 729, 1152),
    "tinyclip-39m": (0.038, 196, 512),
    "tinyclip-40m": (0.039, 49, 512),
    "tinyclip-61m": (0.061, 49, 640),
}
# As the hub counts the tensors of each repository, in millions.
PUBLISHED = {
    "qwen2-0.5b": 494.0,
    "qwen2.5-0.5b": 494.0,
    "tinyllama-1.1b": 1100.0,
    "llama-3.2-1b": 1235.8,
    "llama-3.2-3b": 3212.7,
    "vicuna-7b": 6738.4,
    "smollm2-360m": 361.8,
}


def parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def hollow_encoder(config: VisionConfig) -> nn.Module:
    with torch.device("meta"):
        return VisionEncoder(config)


def hollow_decoder(config: DecoderConfig) -> nn.Module:
    with torch.device("meta"):
        return Decoder(config)


def beyond_the_features(config: VisionConfig) -> int:
    """Of a whole vision model what we leave out: the last norm, and SigLIP's pooling head."""
    d, i = config.hidden_size, config.intermediate_size
    norm = 2 * d
    if config.model_type == "clip":
        return norm
    probe, attention, mlp = d, 4 * (d * d + d), 2 * d * i + d + i
    return norm + probe + attention + norm + mlp


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_have_the_papers_parameters(name: str) -> None:
    billions, tokens, width = TABLE_6[name]
    config = dataclasses.replace(ENCODERS[name].vision, feature_layer=-1)
    whole = parameters(hollow_encoder(config)) + beyond_the_features(config)
    assert round(whole / 1e9, 3) == billions
    assert (config.num_image_tokens, config.hidden_size) == (tokens, width)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_stop_before_the_last_layer(name: str) -> None:
    config = ENCODERS[name].vision
    assert config.feature_layer == -2
    d, i = config.hidden_size, config.intermediate_size
    layer = 4 * (d * d + d) + 2 * d * i + d + i + 4 * d
    all_layers = dataclasses.replace(config, feature_layer=-1)
    assert parameters(hollow_encoder(all_layers)) - parameters(hollow_encoder(config)) == layer


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_have_the_published_parameters(name: str) -> None:
    assert round(parameters(hollow_decoder(DECODERS[name].decoder)) / 1e6, 1) == PUBLISHED[name]


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_parameters_by_the_formula(name: str) -> None:
    c = DECODERS[name].decoder
    h, q, kv = (
        c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    )  # fmt: skip
    attention = 2 * h * q + 2 * h * kv + (q + 2 * kv if c.attention_bias else 0)
    layer = attention + 3 * h * c.intermediate_size + 2 * h
    embeddings = (1 if c.tie_word_embeddings else 2) * c.vocab_size * h
    expected = embeddings + c.num_hidden_layers * layer + h
    assert parameters(hollow_decoder(c)) == expected


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_pair_is_a_model(encoder: str, decoder: str) -> None:
    chosen = ENCODERS[encoder]
    config = HiMixConfig(chosen.vision, DECODERS[decoder].decoder, chosen.preprocess)
    assert HiMixConfig.from_dict(config.to_dict()) == config
    assert config.decoder.eos_token_ids  # or an answer would never end


def test_a_preset_by_name_and_a_name_that_is_off() -> None:
    assert preset("encoder", ENCODERS, "tinyclip-39m") is ENCODERS["tinyclip-39m"]
    assert preset("decoder", DECODERS, DEFAULT_DECODER).hub_id == "Qwen/Qwen2-0.5B-Instruct"
    with pytest.raises(ConfigError, match=r"no encoder is named 'tinyclip39m'.*'tinyclip-39m'"):
        preset("encoder", ENCODERS, "tinyclip39m")
    with pytest.raises(ConfigError, match=r"no decoder is named 'gpt'.*use one of: qwen2-0.5b, "):
        preset("decoder", DECODERS, "gpt")
