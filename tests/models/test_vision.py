"""The vision encoder against transformers' own hidden states, under the same random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from himix_edge.config import VisionConfig, VisionFamily
from himix_edge.export.graphs import plain_attention
from himix_edge.models.vision import VisionEncoder
from tests import tolerances
from tests.models.reference import random_tensor, randomized

CLIP = VisionConfig(
    image_size=20,
    patch_size=5,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=3,
)
# 23 pixels: four whole patches, and three pixels over, as SigLIP's 384 are 27 patches of 14.
SIGLIP = dataclasses.replace(
    CLIP, model_type="siglip", image_size=23, hidden_act="gelu_pytorch_tanh"
)
FAMILIES: dict[VisionFamily, VisionConfig] = {"clip": CLIP, "siglip": SIGLIP}
ACTIVATIONS: list[tuple[VisionFamily, str]] = [
    ("clip", "quick_gelu"),
    ("clip", "gelu"),
    ("siglip", "gelu_pytorch_tanh"),
    ("siglip", "gelu"),
]
both_families = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


def stock_model(config: VisionConfig) -> Any:
    """Transformers' whole model, with all its layers and SigLIP's pooling head."""
    fields = dataclasses.asdict(config)
    del fields["feature_layer"], fields["model_type"]
    if config.model_type == "clip":
        return randomized(CLIPVisionModel(CLIPVisionConfig(**fields)))
    return randomized(SiglipVisionModel(SiglipVisionConfig(**fields)))


@pytest.mark.parametrize(("family", "hidden_act"), ACTIVATIONS)
@pytest.mark.parametrize("feature_layer", [-1, -2, -4])
def test_features_are_the_hidden_state_of_the_layer(
    feature_layer: int, family: VisionFamily, hidden_act: str
) -> None:
    config = dataclasses.replace(
        FAMILIES[family], feature_layer=feature_layer, hidden_act=hidden_act, layer_norm_eps=0.01
    )
    stock = stock_model(config)
    ours = VisionEncoder(config).eval().requires_grad_(False)
    layers = 4 + 1 + feature_layer
    weights = {
        name: weight
        for name, weight in stock.state_dict().items()
        if not name.startswith(("post_layernorm.", "head."))
        and not any(name.startswith(f"encoder.layers.{i}.") for i in range(layers, 4))
    }
    ours.model.load_state_dict(weights, strict=True)

    pixels = random_tensor(2, 3, config.image_size, config.image_size)
    hidden_states = stock(pixels, output_hidden_states=True).hidden_states
    assert len(hidden_states) == 5
    first = 1 if family == "clip" else 0  # CLIP's class token is no part of X_v
    features = ours(pixels)
    assert features.shape == (2, config.num_image_tokens, 24) == (2, 16, 24)
    torch.testing.assert_close(
        features, hidden_states[feature_layer][:, first:], rtol=0, atol=tolerances.VISION_FEATURES
    )
    for other in {-1, -2, -4} - {feature_layer}:
        assert (features - hidden_states[other][:, first:]).abs().max() > 0.1


@both_families
def test_layers_above_the_features_do_not_exist(config: VisionConfig) -> None:
    counts = {
        layer: sum(
            weight.numel()
            for weight in VisionEncoder(
                dataclasses.replace(config, feature_layer=layer)
            ).parameters()
        )
        for layer in (-1, -2)
    }
    d, i, p = 24, 40, 5
    layer_weights = 4 * (d * d + d) + (d * i + i) + (i * d + d) + 2 * 2 * d
    assert counts[-1] - counts[-2] == layer_weights
    patches, positions = 3 * p * p * d, 16 * d
    if config.model_type == "clip":  # a class token with its position, and the norm before layer 0
        assert counts[-1] == patches + positions + 2 * d + 2 * d + 4 * layer_weights
    else:  # a bias on the patches; no head, no last norm
        assert counts[-1] == patches + d + positions + 4 * layer_weights


@both_families
def test_patches_are_read_row_by_row(config: VisionConfig) -> None:
    encoder = VisionEncoder(config).eval().requires_grad_(False)
    embeddings: Any = encoder.model.embeddings
    blank = torch.zeros(1, 3, config.image_size, config.image_size)
    dotted = blank.clone()
    dotted[:, :, 5:10, 15:20] = 1  # second row of patches, fourth column
    changed = (embeddings(dotted) - embeddings(blank)).abs().amax(-1)[0] > 0
    first = 1 if config.model_type == "clip" else 0
    assert changed[first:].nonzero().flatten().tolist() == [1 * 4 + 3]


def test_pixels_beyond_the_last_whole_patch_are_not_seen() -> None:
    encoder = VisionEncoder(SIGLIP).eval().requires_grad_(False)
    pixels = random_tensor(1, 3, 23, 23)
    other = pixels.clone()
    other[:, :, 20:] = 9
    other[:, :, :, 20:] = 9
    assert torch.equal(encoder(other), encoder(pixels))


@both_families
def test_made_without_weights_its_positions_are_real(config: VisionConfig) -> None:
    with torch.device("meta"):
        hollow = VisionEncoder(config)
    assert all(weight.is_meta for weight in hollow.state_dict().values())
    for name, buffer in hollow.named_buffers():
        assert not buffer.is_meta, name
    whole = randomized(VisionEncoder(config))
    hollow.load_state_dict(whole.state_dict(), strict=True, assign=True)
    pixels = random_tensor(1, 3, config.image_size, config.image_size)
    assert torch.equal(hollow.eval()(pixels), whole(pixels))


@both_families
def test_it_can_be_traced(config: VisionConfig) -> None:
    encoder = randomized(VisionEncoder(config))
    pixels = random_tensor(2, 3, config.image_size, config.image_size)
    batch = torch.export.Dim("batch", min=1, max=8)
    with plain_attention(encoder.model):  # type: ignore[arg-type]
        program = torch.export.export(encoder, (pixels,), dynamic_shapes=({0: batch},))
    for images in (pixels, random_tensor(3, 3, config.image_size, config.image_size, seed=1)):
        torch.testing.assert_close(
            program.module()(images), encoder(images), rtol=0, atol=tolerances.VISION_FEATURES
        )
