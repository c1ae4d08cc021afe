"""What each design leaves in the decoder's cache, against the paper's formulas; its weight."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from himix_edge.config import (
    DecoderConfig,
    Design,
    HiMixConfig,
    KeyRotation,
    PreprocessConfig,
    ProjectionConfig,
    VisionConfig,
)
from himix_edge.models.decoder import KV, Decoder
from himix_edge.models.injection import INJECTIONS, injection_from_config
from tests import tolerances
from tests.models.reference import (
    Array,
    connected,
    heads_joined,
    random_tensor,
    randomized,
    shared_kv,
    turned,
    weights_of,
)

VISION = VisionConfig(
    image_size=12,
    patch_size=4,
    hidden_size=20,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
)
DECODER = DecoderConfig(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    attention_bias=True,
)
FEATURES = random_tensor(2, VISION.num_image_tokens, VISION.hidden_size, seed=5)  # [2, 9, 20]


def injected(design: Design, features: Tensor = FEATURES) -> tuple[list[KV], nn.Module, Decoder]:
    config = HiMixConfig(VISION, DECODER, PreprocessConfig(VISION.image_size), design)
    injection = randomized(injection_from_config(config), seed=1)
    decoder = randomized(Decoder(DECODER), seed=2)
    assert isinstance(decoder, Decoder)
    return injection(features, decoder), injection, decoder


def test_himix_projects_the_features_with_weights_of_each_layers_own() -> None:
    cache, injection, _ = injected("himix")
    weights = weights_of(injection)
    features = FEATURES.double().numpy()
    for i, kv in enumerate(cache):
        key = features @ weights[f"layers.{i}.k_proj.weight"].T  # W_v^K
        value = features @ weights[f"layers.{i}.v_proj.weight"].T  # W_v^V
        assert_image_kv(kv, key, value)


def test_himix_asks_nothing_of_the_decoder() -> None:
    cache, injection, _ = injected("himix")
    other = Decoder(dataclasses.replace(DECODER, attention_bias=False))
    for kv, same in zip(cache, injection(FEATURES, other), strict=True):
        assert kv.key.equal(same.key)
        assert kv.value.equal(same.value)


def test_uniform_gives_every_layer_the_one_connectors_output() -> None:
    cache, injection, decoder = injected("uniform")
    weights = weights_of(decoder)
    images = [connected(x, weights_of(injection), "connector.") for x in FEATURES.double().numpy()]
    for i, kv in enumerate(cache):
        pairs = [shared_kv(image, weights, i, DECODER.rms_norm_eps) for image in images]
        assert_image_kv(kv, np.stack([k for k, _ in pairs]), np.stack([v for _, v in pairs]))


def test_hierarchical_gives_every_layer_the_output_of_its_own_connector() -> None:
    cache, injection, decoder = injected("hierarchical")
    weights = weights_of(decoder)
    for i, kv in enumerate(cache):
        pairs = []
        for features in FEATURES.double().numpy():
            image = connected(features, weights_of(injection), f"connectors.{i}.")
            pairs.append(shared_kv(image, weights, i, DECODER.rms_norm_eps))
        assert_image_kv(kv, np.stack([k for k, _ in pairs]), np.stack([v for _, v in pairs]))


def surrounded(features: Array, side: int, skipped: int) -> Array:
    """[N, d] -> [N, 9 d]: beside each patch the eight around it, zeros where there is none."""
    width = features.shape[1]
    patches = {divmod(i + skipped, side): x for i, x in enumerate(features)}
    return np.stack(
        [
            np.concatenate(
                [
                    patches.get((row + down, column + right), np.zeros(width))
                    for down in (-1, 0, 1)
                    for right in (-1, 0, 1)
                ]
            )
            for row, column in patches
        ]
    )


@pytest.mark.parametrize(
    ("projection", "rotation", "prefix", "skipped"),
    [
        (ProjectionConfig(bias=True), "slots", 0, 0),
        (ProjectionConfig(neighbourhood=3), "none", 2, 0),
        (ProjectionConfig(connector_size=6), "none", 0, 1),
        (ProjectionConfig(neighbourhood=3, connector_size=6, bias=True), "slots", 5, 2),
    ],
)
def test_what_a_converted_models_projections_may_have(
    projection: ProjectionConfig, rotation: KeyRotation, prefix: int, skipped: int
) -> None:
    vision = dataclasses.replace(VISION, skipped_patches=skipped)
    config = HiMixConfig(
        vision, DECODER, PreprocessConfig(12), "himix", projection, rotation, prefix
    )
    injection = randomized(injection_from_config(config), seed=1)
    weights = weights_of(injection)
    features = FEATURES[:, skipped:]
    cache = injection(features, Decoder(DECODER))
    tokens = 9 - skipped
    for image, x in enumerate(features.double().numpy()):
        parts = [surrounded(x, 3, skipped) if projection.neighbourhood == 3 else x]
        if projection.connector_size:
            y = connected(x, weights, "inputs.connector.")
            parts.append(y / np.sqrt((y * y).mean(1, keepdims=True) + 1e-6))
        inputs = np.concatenate(parts, axis=1)
        for i, kv in enumerate(cache):
            for name, part in (("k", kv.key), ("v", kv.value)):
                expected = inputs @ weights[f"layers.{i}.{name}_proj.weight"].T
                if projection.bias:
                    expected = expected + weights[f"layers.{i}.{name}_proj.bias"]
                heads = expected.reshape(tokens, 2, 8).swapaxes(0, 1)  # [Hkv, N, D]
                if rotation == "slots" and name == "k":
                    heads = np.stack(
                        [
                            [turned(key, n - tokens, DECODER.rope_theta) for n, key in enumerate(h)]
                            for h in heads
                        ]
                    )
                if prefix:
                    heads = np.concatenate([weights["prefix"][i, int(name == "v")], heads], axis=1)
                assert part.shape == (2, 2, prefix + tokens, 8)
                np.testing.assert_allclose(part[image], heads, rtol=0, atol=tolerances.IMAGE_KV)


@pytest.mark.parametrize("design", ["himix", "uniform", "hierarchical"])
def test_an_image_token_has_no_position_and_sees_no_other(design: Design) -> None:
    order = torch.randperm(FEATURES.shape[1], generator=torch.Generator().manual_seed(3))
    cache, _, _ = injected(design)
    shuffled, _, _ = injected(design, FEATURES[:, order])
    for kv, other in zip(cache, shuffled, strict=True):
        for part, other_part in zip(kv, other, strict=True):
            torch.testing.assert_close(
                part[:, :, order], other_part, rtol=0, atol=tolerances.ATTENTION
            )


def test_in_the_vanilla_design_an_image_token_has_a_position_and_sees_the_earlier_ones() -> None:
    order = torch.arange(FEATURES.shape[1]).flip(0)
    cache, _, _ = injected("vanilla")
    shuffled, _, _ = injected("vanilla", FEATURES[:, order])
    assert (cache[0].key[:, :, order] - shuffled[0].key).abs().max() > 0.1  # position
    assert (cache[1].value[:, :, order] - shuffled[1].value).abs().max() > 0.1  # attention


@pytest.mark.parametrize(
    ("design", "expected"),
    [
        ("himix", 2 * 3 * 20 * (2 * 8)),  # 2 L d_v Hkv D
        ("uniform", 20 * 24 + 24 + 24 * 24 + 24),
        ("hierarchical", 3 * (20 * 24 + 24 + 24 * 24 + 24)),
        ("vanilla", 20 * 24 + 24 + 24 * 24 + 24),
    ],
)
def test_parameters_by_formula(design: Design, expected: int) -> None:
    config = HiMixConfig(VISION, DECODER, PreprocessConfig(VISION.image_size), design)
    assert parameters(INJECTIONS[design](20, config)) == expected


QWEN2_05B = DecoderConfig(151936, 896, 4864, 24, 14, 2, 64, 32768, attention_bias=True)
TINYLLAMA = DecoderConfig(32000, 2048, 5632, 22, 32, 4, 64, 2048, tie_word_embeddings=False)
LLAMA_32_1B = DecoderConfig(128256, 2048, 8192, 16, 32, 8, 64, 131072)


@pytest.mark.parametrize(
    ("decoder", "without", "with_himix"),
    [(QWEN2_05B, 0.49, 0.50), (TINYLLAMA, 1.10, 1.11), (LLAMA_32_1B, 1.24, 1.25)],
    ids=["Qwen2-0.5B", "TinyLlama-1.1B", "Llama-3.2-1B"],
)
def test_parameters_of_the_papers_table_3(
    decoder: DecoderConfig, without: float, with_himix: float
) -> None:
    """In billions; the features are SigLIP so400m's, 1152 wide."""
    config = HiMixConfig(VISION, decoder, PreprocessConfig(VISION.image_size))
    with torch.device("meta"):
        plain = parameters(Decoder(decoder))
        added = parameters(INJECTIONS["himix"](1152, config))
    assert round(plain / 1e9, 2) == without
    assert round((plain + added) / 1e9, 2) == with_himix


def parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def assert_image_kv(kv: KV, key: Array, value: Array) -> None:
    """kv [B, Hkv, N, D] against [B, N, Hkv * D]"""
    for part, expected in zip(kv, (key, value), strict=True):
        assert part.shape == (2, DECODER.num_key_value_heads, 9, DECODER.head_dim)
        actual = np.stack(list(heads_joined(part)))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerances.IMAGE_KV)
