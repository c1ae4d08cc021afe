"""The vision encoder against transformers' own hidden states, under the same random weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from himix_edge.config import VisionConfig
from himix_edge.models.vision import VisionEncoder
from tests import tolerances
from tests.models.reference import random_tensor, randomized

CONFIG = VisionConfig(
    image_size=20,
    patch_size=5,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=3,
)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("feature_layer", [-1, -2, -4])
def test_features_are_the_hidden_state_of_the_layer(feature_layer: int, hidden_act: str) -> None:
    config = dataclasses.replace(
        CONFIG, feature_layer=feature_layer, hidden_act=hidden_act, layer_norm_eps=0.01
    )
    fields = dataclasses.asdict(config)
    del fields["feature_layer"]
    stock = randomized(CLIPVisionModel(CLIPVisionConfig(**fields)))
    ours = VisionEncoder(config).eval().requires_grad_(False)
    layers = 4 + 1 + feature_layer
    weights = {
        name: weight
        for name, weight in stock.state_dict().items()
        if not name.startswith("post_layernorm.")
        and not any(name.startswith(f"encoder.layers.{i}.") for i in range(layers, 4))
    }
    ours.model.load_state_dict(weights, strict=True)

    pixels = random_tensor(2, 3, 20, 20)
    hidden_states = stock(pixels, output_hidden_states=True).hidden_states
    assert len(hidden_states) == 5
    features = ours(pixels)
    assert features.shape == (2, config.num_image_tokens, 24)
    torch.testing.assert_close(
        features, hidden_states[feature_layer][:, 1:], rtol=0, atol=tolerances.VISION_FEATURES
    )
    for other in {-1, -2, -4} - {feature_layer}:
        assert (features - hidden_states[other][:, 1:]).abs().max() > 0.1


def test_layers_above_the_features_do_not_exist() -> None:
    counts = {
        layer: sum(
            weight.numel()
            for weight in VisionEncoder(
                dataclasses.replace(CONFIG, feature_layer=layer)
            ).parameters()
        )
        for layer in (-1, -2)
    }
    d, i = 24, 40
    layer_weights = 4 * (d * d + d) + (d * i + i) + (i * d + d) + 2 * 2 * d
    assert counts[-1] - counts[-2] == layer_weights


def test_patches_are_read_row_by_row() -> None:
    encoder = VisionEncoder(CONFIG).eval().requires_grad_(False)
    embeddings = encoder.model.embeddings
    blank, dotted = torch.zeros(1, 3, 20, 20), torch.zeros(1, 3, 20, 20)
    dotted[:, :, 5:10, 15:20] = 1  # second row of patches, fourth column
    changed = (embeddings(dotted) - embeddings(blank)).abs().amax(-1)[0, 1:] > 0
    assert changed.nonzero().flatten().tolist() == [1 * 4 + 3]
