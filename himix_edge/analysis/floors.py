"""The least time that a model takes on a device: computed, never measured. Standard library only.

Phase by phase max(operations / rate, bytes / bandwidth), as if every product ran at the device's
peak, and every weight and every slot of the cache passed once between memory and chip while
activations stayed there. Operations are the matrix products of `costs.py`, those with what the
causal mask hides included. Real times are longer; by how much, only a measurement says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from himix_edge.analysis import costs, sizes
from himix_edge.analysis.devices import Arithmetic, Device
from himix_edge.analysis.memory import (
    Setting,
    encoder_bytes,
    injection_bytes,
    layers_bytes,
    table_bytes,
)
from himix_edge.config import DecoderConfig, HiMixConfig
from himix_edge.contract import Dtype
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
    decoder, images = config.decoder, config.vision.num_image_tokens
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
