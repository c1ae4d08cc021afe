"""Parameters and bytes of a model, from its config: standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from himix_edge.analysis.costs import connectors, layers_run
from himix_edge.config import DecoderConfig, HiMixConfig, VisionConfig

HALF = 2  # bytes a number in fp16 and bf16


@dataclass(frozen=True)
class Parameters:
    """How many numbers each part holds."""

    encoder: int
    injection: int
    decoder: int

    @property
    def total(self) -> int:
        return self.encoder + self.injection + self.decoder


def parameters(config: HiMixConfig) -> Parameters:
    """Of the model that runs: its encoder ends at the feature layer."""
    return Parameters(
        encoder_parameters(config.vision),
        injection_parameters(config),
        decoder_parameters(config.decoder),
    )


def decoder_parameters(config: DecoderConfig) -> int:
    """Embedding, layers, last norm, and the head where it is not the embedding."""
    h = config.hidden_size
    wide = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    attention = 2 * h * wide + 2 * h * narrow
    biases = wide + 2 * narrow if config.attention_bias else 0
    layer = attention + biases + 3 * h * config.intermediate_size + 2 * h
    embeddings = 1 if config.tie_word_embeddings else 2
    return embeddings * config.vocab_size * h + config.num_hidden_layers * layer + h


def injection_parameters(config: HiMixConfig) -> int:
    """HiMix: W_v^K and W_v^V of every layer, 2 L d_v K d. The other designs: their connectors.

    A converted model's: as wide as their input is, with a bias, a connector and a prefix if any.
    """
    decoder, projection, width = config.decoder, config.projection, config.vision.feature_size
    size = projection.connector_size or decoder.hidden_size
    count = connectors(config) * ((width * size + size) + (size * size + size))
    if config.design == "himix":
        rows = projection.input_size(width) + projection.bias + config.prefix_tokens
        narrow = decoder.num_key_value_heads * decoder.head_dim
        count += 2 * decoder.num_hidden_layers * narrow * rows
    return count


def encoder_parameters(config: VisionConfig, *, whole: bool = False) -> int:
    """The encoder down to its feature layer, or the whole of the published model.

    Args:
        whole: all layers and what is above them: SigLIP's pooling head, CLIP's last norm.
    """
    h, inner, patches = config.hidden_size, config.intermediate_size, config.num_patches
    siglip, layers = config.model_type == "siglip", layers_run(config, whole=whole)
    norm, attention, mlp = 2 * h, 4 * (h * h + h), 2 * h * inner + inner + h
    patch = 3 * config.patch_size**2 * h
    # SigLIP: a bias of the patches. CLIP: a class token with a position, a norm before all layers.
    embedding = patch + patches * h + (h if siglip else 2 * h + norm)
    pooling = 0
    if whole:
        pooling = norm + (h + attention + norm + mlp if siglip else 0)
    return embedding + layers * (2 * norm + attention + mlp) + pooling


def kv_cache_bytes(config: DecoderConfig, slots: int, number_bytes: int = HALF) -> int:
    """Keys and values of S slots in all layers: 2 L K d S numbers."""
    narrow = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * narrow * slots * number_bytes
