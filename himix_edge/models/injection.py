"""Four ways for the image to reach the decoder: the paper's, and the three it is compared with.

Each turns the vision features X_v [B, N, d_v] into what the image leaves in the decoder's cache:
per layer, keys and values [B, Hkv, N, D]. From there on all four are the same model. None adds a
position to the image's keys but `VanillaInjection`, where image tokens are tokens like any others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from himix_edge.config import DecoderConfig, Design, HiMixConfig
from himix_edge.models.decoder import KV, Decoder, rotated, split_heads

UNIT_RMS_EPS = 1e-6


class HiMixInjection(nn.Module):
    """The paper's final design (3.2): every layer has projections of its own, W_v^K and W_v^V.

    A converted model's say more: see `ProjectionConfig`, and the fields of `HiMixConfig` beside it.

    Attributes:
        prefix: [L, 2, Hkv, P, D], keys and values of the fixed text ahead of the image, the keys
            where they stand: prefix token p at p - (P + N). None in a model without one.
    """

    prefix: nn.Parameter | None

    def __init__(self, vision_size: int, config: HiMixConfig) -> None:
        super().__init__()
        decoder, size = config.decoder, config.projection.input_size(vision_size)
        self.inputs = ProjectionInputs(vision_size, config)
        self.layers = nn.ModuleList(
            VisionProjections(size, decoder, bias=config.projection.bias)
            for _ in range(decoder.num_hidden_layers)
        )
        self.rotates = config.vision_key_rotation == "slots"
        shape = (config.prefix_tokens, decoder.head_dim)
        heads = (decoder.num_hidden_layers, 2, decoder.num_key_value_heads)
        self.prefix = nn.Parameter(torch.zeros(*heads, *shape)) if config.prefix_tokens else None

    def forward(self, features: Tensor, decoder: Decoder) -> list[KV]:
        x = self.inputs(features)
        image = [projections(x) for projections in self.layers]
        if self.rotates:
            angles = image_angles(decoder, features.shape[1])
            image = [KV(rotated(key, angles), value) for key, value in image]
        return image if self.prefix is None else after_prefix(self.prefix, image)


class ProjectionInputs(nn.Module):
    """X_v [B, N, d_v] -> what W_v^K and W_v^V are applied to; X_v itself in the paper."""

    def __init__(self, vision_size: int, config: HiMixConfig) -> None:
        super().__init__()
        vision, projection = config.vision, config.projection
        self.side = vision.image_size // vision.patch_size
        self.skipped = vision.skipped_patches
        self.neighbourhood = projection.neighbourhood
        size = projection.connector_size
        self.connector = Connector(vision_size, size) if size else None

    def forward(self, features: Tensor) -> Tensor:
        parts = [self.surroundings(features) if self.neighbourhood > 1 else features]
        if self.connector is not None:
            parts.append(unit_rms(self.connector(features)))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def surroundings(self, features: Tensor) -> Tensor:
        """[B, N, d] -> [B, N, 9 d]: row by row, each patch and those around; zeros off the edge."""
        grid = F.pad(features, (0, 0, self.skipped, 0)).unflatten(1, (self.side, self.side))
        padded = F.pad(grid, (0, 0, 1, 1, 1, 1))  # [B, side + 2, side + 2, d]
        steps, side = range(self.neighbourhood), self.side
        around = [padded[:, i : i + side, j : j + side] for i in steps for j in steps]
        return torch.cat(around, dim=-1).flatten(1, 2)[:, self.skipped :]


class VisionProjections(nn.Module):
    """One layer's W_v^K and W_v^V."""

    def __init__(self, input_size: int, config: DecoderConfig, *, bias: bool = False) -> None:
        super().__init__()
        self.heads = config.num_key_value_heads
        width = config.num_key_value_heads * config.head_dim
        self.k_proj = nn.Linear(input_size, width, bias=bias)
        self.v_proj = nn.Linear(input_size, width, bias=bias)

    def forward(self, x: Tensor) -> KV:
        return KV(split_heads(self.k_proj(x), self.heads), split_heads(self.v_proj(x), self.heads))


def unit_rms(x: Tensor) -> Tensor:
    """Each row divided by its root mean square, in fp32 as `RMSNorm` does it."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + UNIT_RMS_EPS)).to(x.dtype)


def image_angles(decoder: Decoder, image_tokens: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, 1, N, D] of slot n at position n - N."""
    device = decoder.model.embed_tokens.weight.device
    positions = torch.arange(-image_tokens, 0, device=device)
    angles: tuple[Tensor, Tensor] = decoder.model.rotary(positions[None])
    return angles


def after_prefix(prefix: Tensor, image: list[KV]) -> list[KV]:
    """The prefix's keys and values [L, 2, Hkv, P, D] ahead of each image's [B, Hkv, N, D]."""
    batch = image[0].key.shape[0]
    return [
        KV(
            *(
                torch.cat((fixed.to(part.dtype).expand(batch, -1, -1, -1), part), dim=2)
                for fixed, part in zip(pair, kv, strict=True)
            )
        )
        for pair, kv in zip(prefix, image, strict=True)
    ]


class UniformInjection(nn.Module):
    """Figure 4 (a): one connector; every layer projects its output with the text's W^K and W^V."""

    def __init__(self, vision_size: int, config: HiMixConfig) -> None:
        super().__init__()
        self.connector = Connector(vision_size, config.decoder.hidden_size)

    def forward(self, features: Tensor, decoder: Decoder) -> list[KV]:
        connected = self.connector(features)  # [B, N, h]
        return [_shared_projection(connected, layer) for layer in decoder.model.layers]


class HierarchicalInjection(nn.Module):
    """Figure 4 (b): a connector a layer, which projects its output with the text's W^K and W^V."""

    def __init__(self, vision_size: int, config: HiMixConfig) -> None:
        super().__init__()
        self.connectors = nn.ModuleList(
            Connector(vision_size, config.decoder.hidden_size)
            for _ in range(config.decoder.num_hidden_layers)
        )

    def forward(self, features: Tensor, decoder: Decoder) -> list[KV]:
        return [
            _shared_projection(connector(features), layer)
            for connector, layer in zip(self.connectors, decoder.model.layers, strict=True)
        ]


class VanillaInjection(nn.Module):
    """Paper 3.1, LLaVA's way: image tokens run through the whole decoder, ahead of the text."""

    def __init__(self, vision_size: int, config: HiMixConfig) -> None:
        super().__init__()
        self.connector = Connector(vision_size, config.decoder.hidden_size)

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
    return INJECTIONS[config.design](config.vision.feature_size, config)
