"""The encoders and decoders of the paper, and some beyond it, by name.

Only dimensions: a checkpoint's own `config.json` is what its weights are loaded by. The features
X_v are the hidden state before the last layer, as in TinyLLaVA, whose setup the paper follows
(section 4.1); the layer above it is not run. The paper counts 728 tokens of SigLIP's 729 because
TinyLLaVA drops the first, where CLIP has its class token; SigLIP has none, and all 729 are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from himix_edge.config import (
    DecoderConfig,
    Design,
    HiMixConfig,
    PreprocessConfig,
    RopeScaling,
    VisionConfig,
)
from himix_edge.errors import ConfigError, closest

T = TypeVar("T")


@dataclass(frozen=True)
class EncoderPreset:
    """A vision encoder: where its weights are, its shape, and how it wants its pictures."""

    hub_id: str
    vision: VisionConfig
    preprocess: PreprocessConfig


@dataclass(frozen=True)
class DecoderPreset:
    """A language decoder: where its weights are, and its shape."""

    hub_id: str
    decoder: DecoderConfig


def _tinyclip(hub_id: str, patch_size: int, hidden_size: int) -> EncoderPreset:
    vision = VisionConfig(
        image_size=224,
        patch_size=patch_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=12,
        num_attention_heads=hidden_size // 64,
        hidden_act="gelu",
        feature_layer=-2,
    )
    return EncoderPreset(hub_id, vision, PreprocessConfig(224))


def _qwen2(hub_id: str) -> DecoderPreset:
    decoder = DecoderConfig(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=32768,
        rope_theta=1e6,
        attention_bias=True,
        eos_token_ids=(151645, 151643),
    )
    return DecoderPreset(hub_id, decoder)


def _llama_3_2(hub_id: str, hidden: int, layers: int, heads: int, head_dim: int) -> DecoderPreset:
    decoder = DecoderConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        eos_token_ids=(128001, 128008, 128009),
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
    )
    return DecoderPreset(hub_id, decoder)


ENCODERS = {
    "siglip-so400m-384": EncoderPreset(
        "google/siglip-so400m-patch14-384",
        VisionConfig(
            image_size=384,
            patch_size=14,
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
            feature_layer=-2,
            model_type="siglip",
        ),
        PreprocessConfig(
            384, resize="squash", image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)
        ),
    ),
    "tinyclip-39m": _tinyclip("wkcn/TinyCLIP-ViT-39M-16-Text-19M-YFCC15M", 16, 512),
    "tinyclip-40m": _tinyclip("wkcn/TinyCLIP-ViT-40M-32-Text-19M-LAION400M", 32, 512),
    "tinyclip-61m": _tinyclip("wkcn/TinyCLIP-ViT-61M-32-Text-29M-LAION400M", 32, 640),
}

DECODERS = {
    "qwen2-0.5b": _qwen2("Qwen/Qwen2-0.5B-Instruct"),
    "qwen2.5-0.5b": _qwen2("Qwen/Qwen2.5-0.5B-Instruct"),
    "tinyllama-1.1b": DecoderPreset(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        DecoderConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            eos_token_ids=(2,),
        ),
    ),
    "llama-3.2-1b": _llama_3_2("meta-llama/Llama-3.2-1B-Instruct", 2048, 16, 32, 64),
    "llama-3.2-3b": _llama_3_2("meta-llama/Llama-3.2-3B-Instruct", 3072, 28, 24, 128),
    "vicuna-7b": DecoderPreset(
        "lmsys/vicuna-7b-v1.5",
        DecoderConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            eos_token_ids=(2,),
        ),
    ),
    "smollm2-360m": DecoderPreset(
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        DecoderConfig(
            vocab_size=49152,
            hidden_size=960,
            intermediate_size=2560,
            num_hidden_layers=32,
            num_attention_heads=15,
            num_key_value_heads=5,
            head_dim=64,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_theta=1e5,
            eos_token_ids=(2,),
        ),
    ),
}
DEFAULT_ENCODER = "siglip-so400m-384"
DEFAULT_DECODER = "qwen2-0.5b"


def preset(kind: str, presets: Mapping[str, T], name: str) -> T:
    """The preset of that name.

    Args:
        kind: "encoder" or "decoder", for the error.

    Raises:
        ConfigError: no such preset; it names the closest.
    """
    if name not in presets:
        raise ConfigError(f"no {kind} is named {name!r}", fix=closest(name, presets))
    return presets[name]


def preset_config(encoder: str, decoder: str, design: Design = "himix") -> HiMixConfig:
    """The model of two presets.

    Raises:
        ConfigError: no such preset, or two that don't go together.
    """
    vision = preset("encoder", ENCODERS, encoder)
    language = preset("decoder", DECODERS, decoder)
    return HiMixConfig(vision.vision, language.decoder, vision.preprocess, design)


def is_preset_name(source: str) -> bool:
    """Whether it can only be a preset's name: folders exist, repositories have a slash."""
    return "/" not in source and not Path(source).is_dir()
