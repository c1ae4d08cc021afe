"""Which shapes engines are built for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from himix_edge.contract import Manifest
from himix_edge.engines.profiles import (
    Sizes,
    all_profiles,
    decoder_profiles,
    digest,
    engine_sizes,
    vision_profile,
)
from himix_edge.errors import ConfigError

# The tiny model: 28 px, 4 image tokens; 2 layers, 2 key heads of 8; 256 text tokens.


@pytest.fixture
def native(bundle: Path) -> Manifest:
    return Manifest.read(bundle)


@pytest.fixture
def portable(portable_bundle: Path) -> Manifest:
    return Manifest.read(portable_bundle)


def test_vision_where_the_cache_grows(portable: Manifest) -> None:
    pixels = (1, 3, 28, 28)
    assert vision_profile(portable).shapes == {"pixel_values": (pixels, pixels, pixels)}


def test_vision_where_the_cache_is_fixed(native: Manifest) -> None:
    pixels, cache = (1, 3, 28, 28), (1, 2, 64, 16)
    assert vision_profile(native).shapes == {
        "pixel_values": (pixels, pixels, pixels),
        "past_key_values.0.key": (cache, cache, cache),
        "past_key_values.0.value": (cache, cache, cache),
        "past_key_values.1.key": (cache, cache, cache),
        "past_key_values.1.value": (cache, cache, cache),
    }


def test_decoder_where_the_cache_is_fixed(native: Manifest) -> None:
    prefill, decode = decoder_profiles(native, Sizes(max_prompt=50, max_cache=64))
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 50), (1, 50))
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (1, 1))
    for profile in (prefill, decode):
        assert profile.shapes["position_ids"] == profile.shapes["input_ids"]
        assert profile.shapes["write_indices"] == ((1,), (1,), (1,))
        assert profile.shapes["past_key_values.1.value"] == ((1, 2, 64, 16),) * 3
        assert len(profile.shapes) == 3 + 4


def test_decoder_where_the_cache_grows(portable: Manifest) -> None:
    prefill, decode = decoder_profiles(portable, Sizes(max_prompt=100, max_cache=200))
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 64), (1, 100))
    assert prefill.shapes["past_key_values.0.key"] == (
        (1, 2, 1, 16),
        (1, 2, 4, 16),
        (1, 2, 199, 16),
    )
    assert decode.shapes["past_key_values.0.key"] == (
        (1, 2, 1, 16),
        (1, 2, 132, 16),
        (1, 2, 199, 16),
    )
    assert "write_indices" not in prefill.shapes


@pytest.mark.parametrize("slots", [5, 6, 70, 140, 260])
@pytest.mark.parametrize("prompt", [1, 2, 65, 1000])
def test_bounds_are_in_order(portable: Manifest, slots: int, prompt: int) -> None:
    sizes = engine_sizes(portable, min(prompt, slots - 4), slots)
    for profile in all_profiles(portable, sizes):
        for low, typical, high in profile.shapes.values():
            assert all(1 <= a <= b <= c for a, b, c in zip(low, typical, high, strict=True))


def test_sizes_by_default(native: Manifest, portable: Manifest) -> None:
    assert engine_sizes(native) == Sizes(60, 64)
    assert engine_sizes(portable) == Sizes(256, 260)  # all that the positions suffice for
    decoder = dataclasses.replace(portable.config.decoder, max_position_embeddings=32768)
    config = dataclasses.replace(portable.config, decoder=decoder)
    assert engine_sizes(dataclasses.replace(portable, config=config)) == Sizes(512, 1028)


def test_sizes_as_told(native: Manifest, portable: Manifest) -> None:
    assert engine_sizes(native, 60, 64) == Sizes(60, 64)
    assert engine_sizes(portable, 7, 100) == Sizes(7, 100)


@pytest.mark.parametrize(
    ("prompt", "cache", "message"),
    [
        (0, None, "max_prompt is out of range: expected 1 to 256 tokens"),
        (257, None, "max_prompt is out of range: expected 1 to 256 tokens"),
        (97, 100, "max_prompt is out of range: expected 1 to 96 tokens"),
        (None, 4, "the cache's size is out of range: expected 5 to 260 slots, 4 of them for"),
        (None, 261, "the cache's size is out of range"),
        (None, -1, "the cache's size is out of range"),
        (None, 0, "the cache's size is out of range"),
    ],
)
def test_sizes_out_of_range(
    portable: Manifest, prompt: int | None, cache: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_sizes(portable, prompt, cache)


def test_a_fixed_cache_stays_as_exported(native: Manifest) -> None:
    with pytest.raises(ConfigError, match="fixed size: expected 64 slots, found 100"):
        engine_sizes(native, max_cache=100)


def test_the_digest_tells_shapes_apart(native: Manifest, portable: Manifest) -> None:
    made = [
        all_profiles(native, Sizes(60, 64)),
        all_profiles(native, Sizes(59, 64)),
        all_profiles(portable, Sizes(60, 64)),
        all_profiles(portable, Sizes(60, 65)),
    ]
    assert len({digest(profiles) for profiles in made}) == 4
    assert digest(made[0]) == digest(all_profiles(native, Sizes(60, 64)))
