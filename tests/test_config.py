"""Configs: what goes out comes back, and nothing unknown, mistyped or impossible comes in."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from himix_edge.config import (
    DecoderConfig,
    Design,
    HiMixConfig,
    KeyRotation,
    PreprocessConfig,
    ProjectionConfig,
    RopeScaling,
    VisionConfig,
    VisionFamily,
)
from himix_edge.errors import ConfigError

CONFIG = HiMixConfig(
    vision=VisionConfig(
        image_size=112,
        patch_size=14,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        feature_layer=-2,
    ),
    decoder=DecoderConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        eos_token_ids=(1, 7),
    ),
    preprocess=PreprocessConfig(image_size=112, resize="squash"),
)

SCALING = {
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 64,
}

sizes = st.integers(1, 10_000)
factors = st.integers(1, 16)
numbers = st.floats(1e-300, 1e300)
triples = st.tuples(numbers, numbers, numbers)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)


@st.composite
def rope_scalings(draw: st.DrawFn) -> RopeScaling:
    low = draw(st.floats(1e-3, 1e3))
    return RopeScaling(draw(numbers), low, low * draw(st.floats(1.5, 10)), draw(sizes))


@st.composite
def configs(draw: st.DrawFn) -> HiMixConfig:
    patch, layers, heads = draw(factors), draw(factors), draw(factors)
    side, feature_layer = draw(factors), -draw(st.integers(1, layers))
    lower = range(-layers, feature_layer)
    vision = VisionConfig(
        image_size=patch * side + draw(st.integers(0, patch - 1)),
        patch_size=patch,
        hidden_size=heads * draw(factors),
        intermediate_size=draw(sizes),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=draw(st.sampled_from(["gelu", "quick_gelu"])),
        layer_norm_eps=draw(numbers),
        feature_layer=feature_layer,
        model_type=draw(st.sampled_from(get_args(VisionFamily))),
        joined_layers=tuple(layer for layer in lower if draw(st.booleans())),
        skipped_patches=draw(st.integers(0, side * side - 1)),
    )
    prefix_tokens = draw(st.integers(0, 40))
    kv_heads, vocab_size = draw(factors), draw(sizes)
    decoder = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=draw(sizes),
        intermediate_size=draw(sizes),
        num_hidden_layers=draw(factors),
        num_attention_heads=kv_heads * draw(factors),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(factors),
        max_position_embeddings=prefix_tokens + vision.num_image_tokens + draw(sizes),
        rms_norm_eps=draw(numbers),
        rope_theta=draw(numbers),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        eos_token_ids=tuple(draw(st.lists(st.integers(0, vocab_size - 1), max_size=3))),
        rope_scaling=draw(st.none() | rope_scalings()),
    )
    preprocess = PreprocessConfig(
        image_size=vision.image_size,
        resize=draw(st.sampled_from(["squash", "crop"])),
        resample=draw(st.sampled_from(["bicubic", "bilinear"])),
        image_mean=draw(triples),
        image_std=draw(triples),
    )
    design: Design = draw(st.sampled_from(get_args(Design)))
    if design != "himix":
        return HiMixConfig(vision, decoder, preprocess, design)
    projection = ProjectionConfig(
        draw(st.sampled_from([1, 3])), draw(st.none() | sizes), draw(st.booleans())
    )
    rotation = draw(st.sampled_from(get_args(KeyRotation)))
    return HiMixConfig(vision, decoder, preprocess, design, projection, rotation, prefix_tokens)


@settings(deadline=None, max_examples=50)
@given(configs())
def test_what_goes_out_by_way_of_json_comes_back(config: HiMixConfig) -> None:
    assert HiMixConfig.from_dict(config.to_dict()) == config
    again = HiMixConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert type(again.decoder.eos_token_ids) is tuple
    assert hash(again) == hash(config)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_other_value_anywhere_is_a_config_error_or_a_config(data: st.DataObject) -> None:
    plain = CONFIG.to_dict()
    part = data.draw(st.sampled_from(["vision", "decoder", "preprocess", None]))
    target = plain if part is None else plain[part]
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(json_values)
    try:
        config = HiMixConfig.from_dict(plain)
    except ConfigError:
        return
    assert HiMixConfig.from_dict(config.to_dict()) == config


def test_defaults_may_be_left_out() -> None:
    plain = CONFIG.to_dict()
    del plain["design"], plain["decoder"]["rope_theta"], plain["preprocess"]["image_mean"]
    assert HiMixConfig.from_dict(plain) == CONFIG


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # unknown
        ("vision.hiden_size", 3, "unknown key 'vision.hiden_size' in VisionConfig. Fix: "
         "did you mean 'hidden_size'?"),
        ("desing", "himix", "unknown key 'desing' in HiMixConfig. Fix: "
         "did you mean 'design'?"),
        ("xyz", 1, "unknown key 'xyz' in HiMixConfig. Fix: "
         "use one of: vision, decoder, preprocess, design, projection, vision_key_rotation, "
         "prefix_tokens"),
        # mistyped
        ("vision.image_size", "112", "vision.image_size is invalid: expected int, found '112'"),
        ("vision.image_size", True, "vision.image_size is invalid: expected int, found True"),
        ("vision.image_size", 112.0, "vision.image_size is invalid: expected int, found 112.0"),
        ("vision.image_size", None, "vision.image_size is invalid: expected int, found None"),
        ("decoder.attention_bias", 1, "decoder.attention_bias is invalid: expected bool, found 1"),
        ("decoder.rope_theta", "1e4", "decoder.rope_theta is invalid: expected float, found '1e4'"),
        ("decoder.rope_theta", True, "decoder.rope_theta is invalid: expected float, found True"),
        ("decoder.eos_token_ids", 1, "decoder.eos_token_ids is invalid: expected tuple[int, ...], "
         "found 1"),
        ("decoder.eos_token_ids", [1, "2"], "decoder.eos_token_ids is invalid: expected int, "
         "found '2'"),
        ("preprocess.image_mean", [0.5, 0.5], "preprocess.image_mean is invalid: "
         "expected tuple[float, float, float], found [0.5, 0.5]"),
        ("vision", [1], "vision is invalid: expected an object, found [1]"),
        ("decoder.rope_scaling", 8.0, "decoder.rope_scaling is invalid: "
         "expected an object, found 8.0"),
        ("decoder.rope_scaling", {**SCALING, "factor": None}, "decoder.rope_scaling.factor is "
         "invalid: expected float, found None"),
        ("decoder.rope_scaling", {**SCALING, "factr": 1}, "unknown key "
         "'decoder.rope_scaling.factr' in RopeScaling. Fix: did you mean 'factor'?"),
        ("decoder.rope_scaling", {"factor": 8}, "RopeScaling lacks "
         "decoder.rope_scaling.low_freq_factor, decoder.rope_scaling.high_freq_factor, "
         "decoder.rope_scaling.original_max_position_embeddings"),
        # no such choice
        ("vision.model_type", "siglp", "vision.model_type can't be 'siglp'. Fix: "
         "did you mean 'siglip'?"),
        ("design", "himx", "design can't be 'himx'. Fix: did you mean 'himix'?"),
        ("preprocess.resize", "stretch", "preprocess.resize can't be 'stretch'. Fix: "
         "use one of: squash, crop, pad"),
        ("preprocess.resize", ["crop"], "preprocess.resize can't be ['crop']. Fix: "
         "did you mean 'crop'?"),
        # impossible
        ("vision.image_size", 16385, "image_size is invalid: expected 1 to 16384, found 16385"),
        ("decoder.num_hidden_layers", 10**7, "num_hidden_layers is invalid: "
         "expected 1 to 1000, found 10000000"),
        ("decoder.hidden_size", 10**30, "hidden_size is invalid: "
         f"expected 1 to 1048576, found {10**30}"),
        ("prefix_tokens", 10**9, "prefix_tokens is invalid: "
         "expected 0 to 131072, found 1000000000"),
        ("vision.patch_size", 113, "image_size is invalid: "
         "expected at least patch_size (113), found 112"),
        ("vision.patch_size", 0, "patch_size is invalid: expected 1 to 16384, found 0"),
        ("vision.num_attention_heads", 5, "hidden_size is invalid: "
         "expected a positive multiple of num_attention_heads (5), found 96"),
        ("vision.feature_layer", 0, "feature_layer is invalid: expected -4 to -1, found 0"),
        ("vision.feature_layer", -5, "feature_layer is invalid: expected -4 to -1, found -5"),
        ("vision.num_hidden_layers", 0, "num_hidden_layers is invalid: "
         "expected 1 to 1000, found 0"),
        ("decoder.num_key_value_heads", 3, "num_attention_heads is invalid: "
         "expected a positive multiple of num_key_value_heads (3), found 4"),
        ("decoder.head_dim", 15, "head_dim is invalid: "
         "expected a positive multiple of a rotary pair (2), found 15"),
        ("decoder.vocab_size", -1, "vocab_size is invalid: expected 1 to 16777216, found -1"),
        ("decoder.eos_token_ids", [199, 200, -1], "eos_token_ids are off: "
         "expected ids below vocab_size (200), found [200, -1]"),
        ("decoder.rope_scaling", {**SCALING, "factor": 0}, "factor is invalid: "
         "expected a positive number, found 0.0"),
        ("decoder.rope_scaling", {**SCALING, "low_freq_factor": 4}, "high_freq_factor is invalid: "
         "expected more than low_freq_factor (4.0), found 4.0"),
        ("decoder.rope_scaling", {**SCALING, "high_freq_factor": float("inf")},
         "high_freq_factor is invalid: expected more than low_freq_factor (1.0), found inf"),
        ("decoder.rope_scaling", {**SCALING, "original_max_position_embeddings": -1},
         "original_max_position_embeddings is invalid: expected a positive number, found -1"),
        ("decoder.rms_norm_eps", float("nan"), "rms_norm_eps is invalid: "
         "expected a positive number, found nan"),
        ("decoder.rope_theta", float("inf"), "rope_theta is invalid: "
         "expected a positive number, found inf"),
        ("vision.joined_layers", [-3, -3], "joined_layers are off: expected different ones "
         "from -4 to below feature_layer (-2), found (-3, -3)"),
        ("vision.joined_layers", [-2], "joined_layers are off: expected different ones "
         "from -4 to below feature_layer (-2), found (-2,)"),
        ("vision.joined_layers", [-5], "joined_layers are off: expected different ones "
         "from -4 to below feature_layer (-2), found (-5,)"),
        ("vision.skipped_patches", 64, "skipped_patches is invalid: expected 0 to 63, found 64"),
        ("vision.skipped_patches", -1, "skipped_patches is invalid: expected 0 to 63, found -1"),
        ("projection.neighbourhood", 2, "projection.neighbourhood can't be 2. Fix: "
         "use one of: 1, 3"),
        ("projection.connector_size", 0, "connector_size is invalid: "
         "expected 1 to 1048576, found 0"),
        ("vision_key_rotation", "slot", "vision_key_rotation can't be 'slot'. Fix: "
         "did you mean 'slots'?"),
        ("prefix_tokens", -1, "prefix_tokens is invalid: expected 0 to 131072, found -1"),
        ("preprocess.image_size", 224, "preprocess.image_size is invalid: "
         "expected the encoder's 112, found 224"),
        ("preprocess.image_std", [0.5, 0, 0.5], "image_std is invalid: "
         "expected positive numbers, found (0.5, 0.0, 0.5)"),
    ],
)  # fmt: skip
def test_bad_values_are_named(path: str, value: Any, message: str) -> None:
    plain = CONFIG.to_dict()
    *parents, name = path.split(".")
    target = plain
    for parent in parents:
        target = target[parent]
    target[name] = value
    with pytest.raises(ConfigError) as error:
        HiMixConfig.from_dict(plain)
    assert str(error.value) == message


def test_a_field_may_be_nothing_or_whole() -> None:
    plain = CONFIG.to_dict()
    assert plain["decoder"]["rope_scaling"] is None
    assert HiMixConfig.from_dict(plain).decoder.rope_scaling is None
    plain["decoder"]["rope_scaling"] = SCALING
    scaled = HiMixConfig.from_dict(plain)
    assert scaled.decoder.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    assert type(scaled.decoder.rope_scaling.factor) is float
    assert scaled.to_dict()["decoder"]["rope_scaling"] == SCALING
    del plain["decoder"]["rope_scaling"]
    assert HiMixConfig.from_dict(plain) == CONFIG


def test_missing_fields_are_all_named() -> None:
    plain = CONFIG.to_dict()
    del plain["vision"]["image_size"], plain["vision"]["patch_size"]
    with pytest.raises(ConfigError, match=r"VisionConfig lacks vision.image_size, vision.patch_si"):
        HiMixConfig.from_dict(plain)


@pytest.mark.parametrize("data", [None, [], "{}", 3])
def test_what_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match="HiMixConfig is invalid: expected an object"):
        HiMixConfig.from_dict(data)


def test_sizes_that_follow_from_others() -> None:
    assert CONFIG.vision.num_image_tokens == 64
    assert CONFIG.text_offset == 0
    assert CONFIG.max_text_tokens == 128
    vanilla = dataclasses.replace(CONFIG, design="vanilla")
    assert vanilla.text_offset == 64
    assert vanilla.max_text_tokens == 64


CONVERTED = dataclasses.replace(
    CONFIG,
    vision=dataclasses.replace(CONFIG.vision, joined_layers=(-3, -4), skipped_patches=4),
    projection=ProjectionConfig(neighbourhood=3, connector_size=7, bias=True),
    vision_key_rotation="slots",
    prefix_tokens=5,
)


def test_sizes_of_a_converted_model() -> None:
    vision = CONVERTED.vision
    assert (vision.num_patches, vision.num_image_tokens, vision.feature_size) == (64, 60, 3 * 96)
    assert CONVERTED.projection.input_size(288) == 9 * 288 + 7
    assert CONVERTED.image_slots == 65
    assert CONVERTED.text_offset == 0
    assert CONVERTED.max_text_tokens == 128 - 65  # the image stands at -65 to -1
    unturned = dataclasses.replace(CONVERTED, vision_key_rotation="none")
    assert unturned.max_text_tokens == 128
    assert HiMixConfig.from_dict(json.loads(json.dumps(CONVERTED.to_dict()))) == CONVERTED


def test_what_only_a_himix_model_can_have() -> None:
    for design in ("vanilla", "uniform", "hierarchical"):
        for name in ("projection", "vision_key_rotation", "prefix_tokens"):
            change: dict[str, Any] = {name: getattr(CONVERTED, name), "design": design}
            with pytest.raises(ConfigError, match=f"their defaults in the design '{design}'"):
                dataclasses.replace(CONFIG, **change)


def test_a_converted_context_must_have_room_for_more_than_the_image() -> None:
    short = dataclasses.replace(CONFIG.decoder, max_position_embeddings=65)
    with pytest.raises(ConfigError, match="expected more than the 65 that the image takes"):
        dataclasses.replace(CONVERTED, decoder=short)


def test_image_tokens_are_the_whole_patches() -> None:
    """SigLIP so400m: 384 pixels are 27 patches of 14, and six pixels over; paper 4.1."""
    siglip = dataclasses.replace(CONFIG.vision, image_size=384, patch_size=14, model_type="siglip")
    assert siglip.num_image_tokens == 27 * 27 == 729
    assert dataclasses.replace(siglip, patch_size=16).num_image_tokens == 576
    assert dataclasses.replace(siglip, patch_size=384).num_image_tokens == 1


def test_a_vanilla_context_must_have_room_for_more_than_the_image() -> None:
    short = dataclasses.replace(CONFIG.decoder, max_position_embeddings=64)
    dataclasses.replace(CONFIG, decoder=short)  # HiMix's image takes no position
    with pytest.raises(ConfigError, match="expected more than the 64 that the image takes"):
        dataclasses.replace(CONFIG, decoder=short, design="vanilla")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.decoder.vocab_size = 5  # type: ignore[misc]
