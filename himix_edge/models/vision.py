"""The vision encoder: transformers' CLIP or SigLIP, down to the layer whose features we use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from himix_edge.config import VisionConfig


class VisionEncoder(nn.Module):
    """pixel_values [B, 3, H, W] -> X_v [B, N, d_v] (paper 3.1).

    The hidden state of `feature_layer`, as LLaVA takes it, and those of `joined_layers` beside it:
    CLIP's without its class token, all without `skipped_patches`. The layers above, the last norm
    and SigLIP's pooling head do not exist here.
    HF: `CLIPVisionModel(...).hidden_states[feature_layer][:, 1:]`, and
    `SiglipVisionModel(...).hidden_states[feature_layer]`.

    Its state_dict is HF's, under "model.".
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.class_tokens = 1 if config.model_type == "clip" else 0
        # Counted from the end, as HF counts hidden states; those above feature_layer don't exist.
        self.joined = [layer - config.feature_layer - 1 for layer in config.joined_layers]
        self.model = _clip(config) if config.model_type == "clip" else _siglip(config)
        self.model.post_layernorm = nn.Identity()  # type: ignore[assignment]
        # No weight, so in no state_dict: real, then, even where weights are on the meta device.
        positions = torch.arange(config.num_patches + self.class_tokens, device="cpu")
        self.model.embeddings.register_buffer("position_ids", positions[None], persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        said = self.model(pixel_values, output_hidden_states=bool(self.joined))
        layers = [said.last_hidden_state, *(said.hidden_states[layer] for layer in self.joined)]
        features = torch.cat(layers, dim=-1) if self.joined else layers[0]
        return features[:, self.class_tokens + self.config.skipped_patches :]


def _clip(config: VisionConfig) -> CLIPVisionModel:
    return CLIPVisionModel(CLIPVisionConfig(**_shape(config)))


def _siglip(config: VisionConfig) -> SiglipVisionModel:
    return SiglipVisionModel(SiglipVisionConfig(**_shape(config), vision_use_head=False))


def _shape(config: VisionConfig) -> dict[str, Any]:
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers + 1 + config.feature_layer,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
    }
