"""The vision encoder: transformers' CLIP vision model, down to the layer whose features we use."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from himix_edge.config import VisionConfig


class VisionEncoder(nn.Module):
    """pixel_values [B, 3, H, W] -> X_v [B, N, d_v] (paper 3.1).

    The hidden state of `feature_layer` without its class token, as LLaVA takes it; the layers above
    it do not exist here. HF: `CLIPVisionModel(...).hidden_states[feature_layer][:, 1:]`.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.model = CLIPVisionModel(
            CLIPVisionConfig(
                image_size=config.image_size,
                patch_size=config.patch_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers + 1 + config.feature_layer,
                num_attention_heads=config.num_attention_heads,
                hidden_act=config.hidden_act,
                layer_norm_eps=config.layer_norm_eps,
            )
        )
        # The last norm serves the pooled class token alone.
        self.model.post_layernorm = nn.Identity()  # type: ignore[assignment]

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.model(pixel_values).last_hidden_state
        return features[:, 1:]
