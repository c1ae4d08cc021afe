"""The least time that a model takes on a device: computed, never measured. Standard library only.

Phase by phase max(operations / rate, bytes / bandwidth), as if every product ran at the device's
peak, and every weight and every slot of the cache passed once between memory and chip while
activations stayed there. Operations are the matrix products of `costs.py`, those with what the
causal mask hides included. Real times are longer; by how much, only a measurement says.

A device's rates are its maker's (`first_token`, `next_token`); for a bundle in hand, `himix-edge
bench` measures them (`vision_floor`, `projection_floor`, `step_floor`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from himix_edge.analysis import costs, sizes
from himix_edge.analysis.devices import Arithmetic, Device
from himix_edge.analysis.memory import (
    DTYPE_BYTES,
    Setting,
    encoder_bytes,
    injection_bytes,
    layers_bytes,
    table_bytes,
)
from himix_edge.config import DecoderConfig, HiMixConfig
from himix_edge.contract import DECODER_GRAPH, PREFILL_GRAPH, VISION_GRAPH, Dtype, Manifest
from himix_edge.errors import ConfigError, closest


@dataclass(frozen=True)
class Phase:
    """One phase at its floor.

    Attributes:
        operations: of matrix products, two a multiply-add.
        moved: bytes from and to memory.
        rate: operations a second.
        bandwidth: bytes a second.
    """

    name: str
    operations: int
    moved: int
    rate: float
    bandwidth: float

    @property
    def seconds(self) -> float:
        """The larger of the two."""
        return max(self.operations / self.rate, self.moved / self.bandwidth)

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """Which of the two it is."""
        computing = self.operations / self.rate > self.moved / self.bandwidth
        return "compute" if computing else "memory"


def first_token(config: HiMixConfig, setting: Setting, on: Device) -> list[Phase]:
    """From pixels to the logits of the first answer token, for vanilla and himix.

    Raises:
        ConfigError: a dtype that the device has no rate for, or too many tokens.
    """
    cost = costs.cost(config, setting.text_tokens)
    decoder, images = config.decoder, config.image_slots
    slot = slot_bytes(decoder, setting)
    if config.design == "vanilla":
        injection, from_image, tokens = "connector", 0, images + setting.text_tokens
    else:  # the image's slots are written, and then read, without passing through the decoder
        injection, from_image, tokens = "projections", images, setting.text_tokens
    seeing, reading = _vision_rate(setting, on), _decoder_rate(setting, on)
    return [
        Phase(
            "vision",
            cost.encoder.matmul,
            encoder_bytes(config.vision, setting),
            seeing,
            on.bandwidth,
        ),
        Phase(
            injection,
            cost.connectors.matmul + cost.projections.matmul,
            injection_bytes(config, setting) + from_image * slot,
            seeing,
            on.bandwidth,
        ),
        Phase(
            "prefill",
            cost.attention.matmul + cost.ffn.matmul + cost.last_logits.matmul,
            _step_bytes(decoder, setting, setting.text_tokens) + (from_image + tokens) * slot,
            reading,
            on.bandwidth,
        ),
    ]


def next_token(config: HiMixConfig, setting: Setting, on: Device, slots: int) -> Phase:
    """One more token, which sees `slots` of the cache, its own included.

    Raises:
        ConfigError: a dtype that the device has no rate for.
    """
    decoder = config.decoder
    products = costs.attention(decoder, 1, slots) + costs.ffn(decoder, 1) + costs.head(decoder, 1)
    moved = _step_bytes(decoder, setting, 1) + slots * slot_bytes(decoder, setting)
    return Phase("decode", products.matmul, moved, _decoder_rate(setting, on), on.bandwidth)


def slot_bytes(config: DecoderConfig, setting: Setting) -> int:
    """Keys and values of one token in all layers."""
    return sizes.kv_cache_bytes(config, 1, setting.number_bytes)


def _step_bytes(config: DecoderConfig, setting: Setting, tokens: int) -> int:
    """What a step reads of the decoder: layers, head, and a row of the embedding a token."""
    rows = tokens * config.hidden_size * setting.number_bytes
    return layers_bytes(config, setting) + table_bytes(config, setting) + rows


def _vision_rate(setting: Setting, on: Device) -> float:
    """Weights in int8 may meet activations in int8, and so run at its rate."""
    return _rate("int8" if setting.vision == "int8" else setting.dtype, on)


def _decoder_rate(setting: Setting, on: Device) -> float:
    """Stored weights become the dtype's before a product; ONNX Runtime's kernels alone use int8."""
    quantized = setting.dialect == "ort" and setting.weights is not None
    return _rate("int8" if quantized else setting.dtype, on)


def _rate(arithmetic: Dtype | Literal["int8"], on: Device) -> float:
    kind: Arithmetic = "float16" if arithmetic == "bfloat16" else arithmetic
    if kind not in on.rates:
        raise ConfigError(f"no rate of {on.title} is known in {kind}", fix=closest(kind, on.rates))
    return on.rates[kind]


# A bundle on a machine whose rates were measured.


@dataclass(frozen=True)
class Stored:
    """Bytes of a bundle's weights, as its files hold them.

    Attributes:
        vision: the encoder's; of the vision graph, what is not the projections by their number.
        projections: the rest of the vision graph.
        step: of the decoder, what a step with one token reads: all but an embedding that is not
            the head too.
        prompt: likewise a step with many, which may have a graph of its own.
        slot: keys and values of one token in all layers.
    """

    vision: int
    projections: int
    step: int
    prompt: int
    slot: int


def stored_bytes(manifest: Manifest) -> Stored:
    """What the files of a HiMix bundle hold."""
    config, decoder = manifest.config, manifest.config.decoder
    seeing, reading, prompts = (
        _graph_bytes(manifest, graph) for graph in (VISION_GRAPH, DECODER_GRAPH, PREFILL_GRAPH)
    )
    unread = 0 if decoder.tie_word_embeddings else _embedding_bytes(manifest)
    count = sizes.parameters(config)
    projections = seeing * count.injection // (count.encoder + count.injection)
    number = DTYPE_BYTES[manifest.dtype]
    return Stored(
        seeing - projections,
        projections,
        reading - unread,
        (prompts or reading) - unread,
        sizes.kv_cache_bytes(decoder, 1, number),
    )


def vision_floor(config: HiMixConfig, stored: Stored, rate: float, bandwidth: float) -> Phase:
    """One image through the encoder."""
    operations = costs.encoder(config.vision).total.matmul
    return Phase("vision", operations, stored.vision, rate, bandwidth)


def projection_floor(config: HiMixConfig, stored: Stored, rate: float, bandwidth: float) -> Phase:
    """HiMix's projections, the keys and values they write included."""
    cost = costs.cost(config, text_tokens=1)
    operations = (cost.connectors + cost.projections).matmul
    moved = stored.projections + config.image_slots * stored.slot
    return Phase("projection", operations, moved, rate, bandwidth)


def step_floor(
    config: DecoderConfig, stored: Stored, tokens: int, slots: int, rate: float, bandwidth: float
) -> Phase:
    """T tokens through the decoder, which see S slots, their own included; one token's logits.

    Prefill and decode alike, after an image or as a vanilla model's.
    """
    layers = costs.attention(config, tokens, slots) + costs.ffn(config, tokens)
    operations = (layers + costs.head(config, 1)).matmul
    weights = stored.step if tokens == 1 else stored.prompt
    return Phase("step", operations, weights + slots * stored.slot, rate, bandwidth)


def _graph_bytes(manifest: Manifest, graph: str) -> int:
    """A graph and the weights beside it."""
    return sum(record.size for name, record in manifest.files.items() if name.startswith(graph))


def _embedding_bytes(manifest: Manifest) -> int:
    """A table of its own: as exported; or, of a quantized "ort" bundle, in the head's bits, with a
    scale and a zero point to a block."""
    decoder, how = manifest.config.decoder, manifest.quantization
    numbers = decoder.vocab_size * decoder.hidden_size
    block = how.block_size if how and how.decoder and manifest.dialect == "ort" else None
    if how is None or block is None or decoder.hidden_size % block:
        return numbers * DTYPE_BYTES[manifest.dtype]
    bits = 4 if how.head == "int4" else 8
    return (numbers * bits + numbers // block * (32 + bits)) // 8
