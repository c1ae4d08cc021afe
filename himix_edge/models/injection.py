"""Four ways for the image to reach the decoder: the paper's, and the three it is compared with.

Each turns the vision features X_v [B, N, d_v] into what the image leaves in the decoder's cache:
per layer, keys and values [B, Hkv, N, D]. From there on all four are the same model. None adds a
position to the image's keys but `VanillaInjection`, where image tokens are tokens like any others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from himix_edge.config import DecoderConfig, Design, HiMixConfig
from himix_edge.models.decoder import KV, Decoder, split_heads


class HiMixInjection(nn.Module):
    """The paper's final design (3.2): every layer has projections of its own, W_v^K and W_v^V."""

    def __init__(self, vision_size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            VisionProjections(vision_size, config) for _ in range(config.num_hidden_layers)
        )

    def forward(self, features: Tensor, decoder: Decoder) -> list[KV]:
        return [projections(features) for projections in self.layers]


class VisionProjections(nn.Module):
    """One layer's W_v^K and W_v^V."""

    def __init__(self, vision_size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.heads = config.num_key_value_heads
        width = config.num_key_value_heads * config.head_dim
        self.k_proj = nn.Linear(vision_size, width, bias=False)
        self.v_proj = nn.Linear(vision_size, width, bias=False)

    def forward(self, features: Tensor) -> KV:
        return KV(
            split_heads(self.k_proj(features), self.heads),
            split_heads(self.v_proj(features), self.heads),
        )


class UniformInjection(nn.Module):
    """Figure 4 (a): one connector; every layer projects its output with the text's W^K and W^V."""

    def __init__(self, vision_size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.connector = Connector(vision_size, config.hidden_size)

    def forward(self, features: Tensor, decoder: Decoder) -> list[KV]:
        connected = self.connector(features)  # [B, N, h]
        return [_shared_projection(connected, layer) for layer in decoder.model.layers]


class HierarchicalInjection(nn.Module):
    """Figure 4 (b): a connector a layer, which projects its output with the text's W^K and W^V."""

    def __init__(self, vision_size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.connectors = nn.ModuleList(
            Connector(vision_size, config.hidden_size) for _ in range(config.num_hidden_layers)
        )

    def forward(self, features: Tensor, decoder: Decoder) -> list[KV]:
        return [
            _shared_projection(connector(features), layer)
            for connector, layer in zip(self.connectors, decoder.model.layers, strict=True)
        ]


class VanillaInjection(nn.Module):
    """Paper 3.1, LLaVA's way: image tokens run through the whole decoder, ahead of the text."""

    def __init__(self, vision_size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.connector = Connector(vision_size, config.hidden_size)

    def forward(self, features: Tensor, decoder: Decoder) -> list[KV]:
        connected = self.connector(features)  # [B, N, h]
        positions = torch.arange(features.shape[1], device=features.device)
        _, present = decoder.model(connected, positions.expand(features.shape[:2]), None)
        return present


class Connector(nn.Sequential):
    """The 2-layer MLP from vision features to token embeddings (LLaVA-1.5's mlp2x_gelu)."""

    def __init__(self, vision_size: int, hidden_size: int) -> None:
        super().__init__(
            nn.Linear(vision_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )


def _shared_projection(connected: Tensor, layer: Any) -> KV:  # a Layer; ModuleList forgets it
    """What the layer makes of text: its norm, then its key and value projections."""
    return layer.self_attn.keys_and_values(layer.input_layernorm(connected))


INJECTIONS: dict[Design, type[nn.Module]] = {
    "himix": HiMixInjection,
    "uniform": UniformInjection,
    "hierarchical": HierarchicalInjection,
    "vanilla": VanillaInjection,
}


def injection_from_config(config: HiMixConfig) -> nn.Module:
    return INJECTIONS[config.design](config.vision.hidden_size, config.decoder)
