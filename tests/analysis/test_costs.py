"""The formulas by hand, on round numbers, and what they refuse."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from himix_edge.analysis import costs, sizes
from himix_edge.analysis.costs import Flops
from himix_edge.analysis.report import DESIGNS
from himix_edge.config import (
    DecoderConfig,
    Design,
    HiMixConfig,
    PreprocessConfig,
    ProjectionConfig,
    VisionConfig,
)
from himix_edge.errors import ConfigError
from himix_edge.presets import DECODERS

# h 10, I 30, L 2, H 4, K 2, d 2, V 100: H d is 8, K d is 4
DECODER = DecoderConfig(100, 10, 30, 2, 4, 2, 2, 50)
VISION = VisionConfig(28, 14, 8, 16, 3, 2)


def config(design: Design) -> HiMixConfig:
    return HiMixConfig(VISION, DECODER, PreprocessConfig(28), design)


def test_the_decoder_by_hand() -> None:
    projections = 2 * 5 * (10 * 8 + 10 * 4 + 10 * 4 + 8 * 10)  # q, k, v, o of 5 tokens
    products = 2 * 5 * 9 * 8 * 2  # queries by keys and weights by values, over 9 slots
    assert costs.attention(DECODER, 5, 9) == Flops(2 * (projections + products), 2 * 5 * 9 * 4)
    assert costs.ffn(DECODER, 5) == Flops(2 * 2 * 5 * 3 * 10 * 30, 2 * 5 * 30)
    assert costs.head(DECODER, 5) == Flops(2 * 5 * 10 * 100)
    assert costs.image_kv(DECODER, 7, 8) == Flops(2 * 2 * (2 * 7 * 8 * 4))
    assert costs.connector(7, 8, 10) == Flops(2 * 7 * (8 * 10 + 10 * 10), 7 * 10)


@pytest.mark.parametrize(
    ("design", "connectors", "projections", "tokens"),
    [
        ("himix", 0, costs.image_kv(DECODER, 4, 8), 6),
        ("uniform", 1, costs.image_kv(DECODER, 4, 10), 6),
        ("hierarchical", 2, costs.image_kv(DECODER, 4, 10), 6),
        ("vanilla", 1, Flops(), 10),
    ],
)
def test_what_a_design_is_made_of(
    design: Design, connectors: int, projections: Flops, tokens: int
) -> None:
    cost = costs.cost(config(design), text_tokens=6)  # 4 image tokens
    assert cost.connectors == costs.connector(4, 8, 10) * connectors
    assert cost.projections == projections
    assert cost.attention == costs.attention(DECODER, tokens, 10)
    assert cost.ffn == costs.ffn(DECODER, tokens)
    assert cost.head == Flops(2 * tokens * 10 * 100)
    parts = (cost.projections, cost.attention, cost.ffn, cost.head)
    assert cost.decoder.total == sum(part.total for part in parts)
    assert cost.total == cost.encoder + cost.connectors + cost.decoder
    assert cost.total.total - cost.total_as_run.total == 2 * (tokens - 1) * 10 * 100


def test_a_converted_model_by_hand() -> None:
    vision = dataclasses.replace(VISION, joined_layers=(-2,), skipped_patches=1)  # d_v 16, N 3
    wide = HiMixConfig(
        vision,
        DECODER,
        PreprocessConfig(28),
        projection=ProjectionConfig(neighbourhood=3, connector_size=5, bias=True),
        vision_key_rotation="slots",
        prefix_tokens=2,
    )
    cost = costs.cost(wide, text_tokens=6)
    assert cost.encoder == costs.cost(config("himix"), 6).encoder  # of all patches
    assert cost.connectors == Flops(2 * 3 * 5 * (16 + 5), 3 * 5)
    inputs = 9 * 16 + 5
    assert cost.projections == Flops(2 * 2 * (2 * 3 * inputs * 4))
    assert cost.attention == costs.attention(DECODER, 6, 2 + 3 + 6)
    weights = 2 * 2 * (inputs * 4 + 4)
    connector = 16 * 5 + 5 + 5 * 5 + 5
    assert sizes.injection_parameters(wide) == weights + connector + 2 * 2 * 2 * (2 * 2)
    costs.cost(wide, 50 - 5)
    with pytest.raises(ConfigError, match="expected 1 to 45, with 3 image tokens, found 46"):
        costs.cost(wide, 46)
    with pytest.raises(ConfigError, match="expected 1 to 44, with 4 image tokens, found 45"):
        costs.cost(wide, 45, image_tokens=4)


def test_image_tokens_can_be_other_than_the_encoders() -> None:
    more = costs.cost(config("himix"), 6, image_tokens=9)
    assert more.attention == costs.attention(DECODER, 6, 15)
    assert more.projections == costs.image_kv(DECODER, 9, 8)
    assert more.encoder == costs.cost(config("himix"), 6).encoder


def test_an_encoder_runs_up_to_its_feature_layer() -> None:
    last, before = VISION, dataclasses.replace(VISION, feature_layer=-2)
    assert (costs.layers_run(last), costs.layers_run(before)) == (3, 2)
    assert costs.layers_run(before, whole=True) == 3
    one_layer = costs.encoder(last).total.matmul - costs.encoder(before).total.matmul
    assert one_layer == 2 * 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 2 * 5 * 5 * 8  # 4 patches, 1 class
    layer_parameters = 4 * (8 * 8 + 8) + (8 * 16 + 16) + (16 * 8 + 8) + 2 * 2 * 8
    assert sizes.encoder_parameters(last) - sizes.encoder_parameters(before) == layer_parameters


def test_fastv_without_filtering_is_vanilla() -> None:
    decoder = DECODERS["llama-3.2-1b"].decoder
    vanilla = costs.attention(decoder, 792, 792) + costs.ffn(decoder, 792)
    assert costs.fastv(decoder, 728, 64, 3, 0.0) == vanilla + costs.head(decoder, 792)


def test_fastv_with_all_filtered_is_text_alone_above() -> None:
    one = dataclasses.replace(DECODER, num_hidden_layers=1)
    expected = costs.attention(one, 10, 10) + costs.ffn(one, 10) + costs.head(one, 6)
    expected += costs.attention(one, 6, 6) + costs.ffn(one, 6)
    assert costs.fastv(DECODER, 4, 6, 1, 1.0) == expected


@pytest.mark.parametrize(("layer", "ratio"), [(0, 0.5), (2, 0.5), (-1, 0.5), (1, 1.1), (1, -0.1)])
def test_fastv_refuses_what_cannot_be(layer: int, ratio: float) -> None:
    with pytest.raises(ConfigError, match="1 to 1" if ratio == 0.5 else "0 to 1"):
        costs.fastv(DECODER, 4, 6, layer, ratio)


@pytest.mark.parametrize(
    ("design", "text", "images", "saying"),
    [
        ("himix", 0, None, "expected 1 to 50, with 4 image tokens, found 0"),
        ("himix", -1, None, "found -1"),
        ("himix", 51, None, "found 51"),
        ("vanilla", 47, None, "expected 1 to 46, with 4 image tokens, found 47"),
        ("vanilla", 1, 50, "expected 1 to 0, with 50 image tokens"),
        ("himix", 1, 0, "image_tokens is out of range: expected 1 or more, found 0"),
    ],
)
def test_numbers_of_tokens_out_of_range(
    design: Design, text: int, images: int | None, saying: str
) -> None:
    with pytest.raises(ConfigError, match=saying):
        costs.cost(config(design), text, images)


def test_the_longest_text_is_not_out_of_range() -> None:
    costs.cost(config("himix"), 50)
    costs.cost(config("vanilla"), 46)


def test_bytes_of_the_cache_by_hand() -> None:
    assert sizes.kv_cache_bytes(DECODER, 9) == 2 * (2 * 2 * 4 * 9)
    assert sizes.kv_cache_bytes(DECODER, 9, number_bytes=4) == 4 * (2 * 2 * 4 * 9)


def test_designs_are_all_there() -> None:
    assert {costs.connectors(config(design)) for design in DESIGNS} == {0, 1, 2}


def test_the_cost_model_needs_nothing_but_the_standard_library() -> None:
    blocked = ("torch", "numpy", "transformers", "onnx", "onnxruntime", "matplotlib", "rich")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
    code += "from himix_edge.analysis import costs, paper, sizes; print(len(paper.cells()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("", 0)
    assert int(done.stdout) > 0
