"""What a model needs of a device's memory: an estimate, from dimensions. Standard library only.

Weights count as they are stored, the cache with all its slots, activations with their largest live
set. Of T tokens that see S slots, in a layer h wide with H heads of d, K key-value heads and an
inner width I, there are at once the residual and its norm, and either queries, keys, values and the
result, or the inner values before and after their activation:

    T (2h + max(2Hd + 2Kd, 2I)) numbers; where attention is not fused, T S H scores in fp32 too
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from himix_edge.analysis import costs, sizes
from himix_edge.analysis.devices import device
from himix_edge.config import DecoderConfig, HiMixConfig, VisionConfig
from himix_edge.contract import Dialect, Dtype
from himix_edge.engines.memory import LIBRARIES, build_memory_bytes, device_memory_bytes
from himix_edge.engines.profiles import DEFAULT_MAX_PROMPT
from himix_edge.errors import ConfigError, closest
from himix_edge.targets import target

Storage = Literal["int8", "int4", "fp8"]

DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
STORAGE_BITS: dict[Storage, int] = {"int8": 8, "int4": 4, "fp8": 8}
BLOCK: dict[Dialect, int] = {"ort": 128, "native": 64, "portable": 64}  # decoder weights to a scale


@dataclass(frozen=True)
class Setting:
    """How a model is exported and asked.

    Attributes:
        target: a name of `TARGETS`: all but "cpu" run on a GPU, by engines that are built.
        dialect: "portable" holds two copies of the cache, a step's past and its present; "ort"
            holds the image's slots twice, as they came and in the conversation.
        dtype: of the cache, of activations, and of the weights that are not quantized.
        vision, weights: what the matrices of the vision graph and of the decoder are stored in;
            None is the dtype. In "ort", the decoder's head and embedding are then int8.
        text_tokens: M, of the question.
        max_text: of question and answer together; the cache has P + N and these as slots.
    """

    target: str
    dialect: Dialect
    dtype: Dtype
    vision: Storage | None = None
    weights: Storage | None = None
    text_tokens: int = 64
    max_text: int = 1024

    @property
    def on_gpu(self) -> bool:
        """Whether engines are built for it."""
        return self.target != "cpu"

    @property
    def number_bytes(self) -> int:
        """Of one number of the dtype."""
        return DTYPE_BYTES[self.dtype]


def setting_for(
    on: str,
    target_name: str | None = None,
    dtype: str | None = None,
    vision: str | None = None,
    weights: str | None = None,
    text_tokens: int = 64,
    max_text: int = 1024,
) -> Setting:
    """The setting that suits a device, where nothing else is asked for.

    Args:
        on: a name of `DEVICES`.
        target_name: a name of `TARGETS`; by default the device's usual one.

    Raises:
        ConfigError: an unknown name, a target that the device is none of, or too many tokens.
    """
    known = device(on).targets
    name = target_name or known[0]
    chosen = target(name).updated(None, dtype)
    if name not in known:
        raise ConfigError(f"{on} is no device for {name}", fix=closest(name, known))
    if not 1 <= text_tokens < max_text:
        raise ConfigError(
            "the number of text tokens is out of range",
            expected=f"1 to {max_text - 1}, with {max_text} for question and answer together",
            found=str(text_tokens),
        )
    return Setting(
        name,
        chosen.dialect,
        chosen.dtype,
        _storage(vision),
        _storage(weights),
        text_tokens,
        max_text,
    )


def _storage(name: str | None) -> Storage | None:
    storages = {str(storage): storage for storage in STORAGE_BITS}
    if name is None:
        return None
    if name not in storages:
        raise ConfigError(f"no storage of weights is named {name!r}", fix=closest(name, storages))
    return storages[name]


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        encoder: down to the feature layer.
        injection: HiMix's projections with all they have, or a vanilla model's connector.
        decoder: its head and embedding too.
        cache: all slots, and a second copy where a step makes one.
        activations: the larger of what vision and what the longest step needs.
        libraries: CUDA's context and TensorRT's kernels, as `engines.memory` reckons them.
    """

    encoder: int
    injection: int
    decoder: int
    cache: int
    activations: int
    libraries: int

    @property
    def weights(self) -> int:
        """All three parts'."""
        return self.encoder + self.injection + self.decoder

    @property
    def run(self) -> int:
        """What one session holds."""
        return self.weights + self.cache + self.activations + self.libraries


def memory(config: HiMixConfig, setting: Setting) -> Memory:
    """What one session needs: batch 1, one image, a cache of P + N + `max_text` slots."""
    slots = config.image_slots + setting.max_text
    twice = {"portable": slots, "ort": config.image_slots, "native": 0}
    kept = slots + twice[setting.dialect]
    return Memory(
        encoder_bytes(config.vision, setting),
        injection_bytes(config, setting),
        decoder_bytes(config.decoder, setting),
        sizes.kv_cache_bytes(config.decoder, kept, setting.number_bytes),
        activation_bytes(config, setting),
        LIBRARIES if setting.on_gpu else 0,
    )


def build_bytes(needed: Memory, *, shared: bool) -> int:
    """While the engine with the larger weights is built; see `engines.memory`.

    Args:
        shared: one memory for CPU and GPU; else only what the GPU's must hold.
    """
    largest = max(needed.encoder + needed.injection, needed.decoder)
    return build_memory_bytes(largest) if shared else device_memory_bytes(largest)


# Activations.


@dataclass(frozen=True)
class _Layer:
    hidden: int
    wide: int  # H d
    narrow: int  # K d
    inner: int
    heads: int


def activation_bytes(config: HiMixConfig, setting: Setting) -> int:
    """Of vision, or of the longest step that an engine is built for, whichever is more."""
    vision, decoder = config.vision, config.decoder
    patches = vision.num_patches + (vision.model_type == "clip")  # with CLIP's class token
    h = vision.hidden_size
    seeing = _Layer(h, h, h, vision.intermediate_size, vision.num_attention_heads)
    reading = _Layer(
        decoder.hidden_size,
        decoder.num_attention_heads * decoder.head_dim,
        decoder.num_key_value_heads * decoder.head_dim,
        decoder.intermediate_size,
        decoder.num_attention_heads,
    )
    tokens = min(DEFAULT_MAX_PROMPT, setting.max_text)
    if config.design == "vanilla":
        tokens += config.image_slots
    return max(
        _live_bytes(seeing, patches, patches, setting),
        _live_bytes(reading, tokens, config.image_slots + setting.max_text, setting),
    )


def _live_bytes(layer: _Layer, tokens: int, slots: int, setting: Setting) -> int:
    """T (2h + max(2Hd + 2Kd, 2I)) numbers, and unfused scores of T S H in fp32."""
    scores = 0 if setting.dialect == "native" else 4 * slots * layer.heads
    attention = (2 * layer.wide + 2 * layer.narrow) * setting.number_bytes + scores
    mlp = 2 * layer.inner * setting.number_bytes
    return tokens * (2 * layer.hidden * setting.number_bytes + max(attention, mlp))


# Weights.


def encoder_bytes(config: VisionConfig, setting: Setting) -> int:
    """The matrices of its layers as they are stored, all else in the dtype."""
    h, inner = config.hidden_size, config.intermediate_size
    matrices = costs.layers_run(config) * (4 * h * h + 2 * h * inner)
    rest = sizes.encoder_parameters(config) - matrices
    return _by_channel(matrices, setting) + rest * setting.number_bytes


def injection_bytes(config: HiMixConfig, setting: Setting) -> int:
    """The projections, or the connector, which are part of the vision graph."""
    return _by_channel(sizes.injection_parameters(config), setting)


def decoder_bytes(config: DecoderConfig, setting: Setting) -> int:
    """Its layers, its embedding and head, which may be one; in "ort" every position's rotation."""
    tables = 1 if config.tie_word_embeddings else 2
    rotary = config.max_position_embeddings * config.head_dim if setting.dialect == "ort" else 0
    return (
        layers_bytes(config, setting)
        + tables * table_bytes(config, setting)
        + rotary * setting.number_bytes
    )


def layers_bytes(config: DecoderConfig, setting: Setting) -> int:
    """All but the tables: L (2hHd + 2hKd + 3hI) as stored, norms and biases in the dtype."""
    h, wide = config.hidden_size, config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    row = 2 * wide + 2 * narrow + 3 * config.intermediate_size
    matrices = config.num_hidden_layers * h * row
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * h
    rest = sizes.decoder_parameters(config) - tables - matrices
    if setting.dialect == "ort" and setting.weights == "int8":
        return matrices + rest * setting.number_bytes  # the scales, one an output, aside
    return _by_block(matrices, setting.weights, setting) + rest * setting.number_bytes


def table_bytes(config: DecoderConfig, setting: Setting) -> int:
    """V h: the embedding, or the head."""
    storage: Storage | None = "int8" if setting.dialect == "ort" and setting.weights else None
    return _by_block(config.vocab_size * config.hidden_size, storage, setting)


def _by_channel(numbers: int, setting: Setting) -> int:
    """The scales, one an output channel, count for nothing."""
    if setting.vision is None:
        return numbers * setting.number_bytes
    return numbers * STORAGE_BITS[setting.vision] // 8


def _by_block(numbers: int, storage: Storage | None, setting: Setting) -> int:
    """A scale a block: in the dtype; in "ort" in fp32, with a zero point as wide as a weight."""
    if storage is None:
        return numbers * setting.number_bytes
    bits, blocks = STORAGE_BITS[storage], numbers // BLOCK[setting.dialect]
    scale = 32 + bits if setting.dialect == "ort" else 8 * setting.number_bytes
    return (numbers * bits + blocks * scale) // 8
