"""The shapes an engine is built for: from which, for which best, and up to which.

Batch is 1. The vision graph has one profile; the decoder has two, because the kernels that are
best for a whole prompt are not those that are best for one token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from himix_edge.contract import (
    INPUT_IDS,
    PIXEL_VALUES,
    POSITION_IDS,
    WRITE_INDICES,
    Manifest,
    past_names,
)
from himix_edge.errors import ConfigError

Shape = tuple[int, ...]

BATCH = 1
DEFAULT_MAX_PROMPT = 512  # tokens of one step
DEFAULT_MAX_TEXT = 1024  # tokens of a conversation, where the export has not fixed it
TYPICAL_PROMPT = 64  # tokens of a question in its template


@dataclass(frozen=True)
class Profile:
    """What `IOptimizationProfile` holds.

    Attributes:
        name: for people: "vision", "prefill", "decode".
        shapes: (min, opt, max) by the input's name.
    """

    name: str
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class Sizes:
    """How large an engine's inputs may become.

    Attributes:
        max_prompt: tokens of one step; a longer prompt goes in by parts.
        max_cache: slots of the cache, the image's and the text's.
        max_decode: tokens that a step of the decode profile may have; it is best for one.
    """

    max_prompt: int
    max_cache: int
    max_decode: int = 1


def engine_sizes(
    manifest: Manifest,
    max_prompt: int | None = None,
    max_cache: int | None = None,
    max_decode: int = 1,
) -> Sizes:
    """What a build is to allow for; None is what suits the bundle.

    Raises:
        ConfigError: a size that the bundle has no room for, or a second opinion on a cache whose
            size its export has fixed.
    """
    image, fixed = manifest.config.image_slots, manifest.cache_slots
    longest = image + manifest.config.max_text_tokens
    if fixed is not None and max_cache not in (None, fixed):
        raise ConfigError(
            "the cache of this bundle has a fixed size",
            expected=f"{fixed} slots",
            found=str(max_cache),
            fix="export the bundle again with another size",
        )
    slots = fixed if max_cache is None else max_cache
    if slots is None:
        slots = min(longest, image + DEFAULT_MAX_TEXT)
    if fixed is None and not image < slots <= longest:
        raise ConfigError(
            "the cache's size is out of range",
            expected=f"{image + 1} to {longest} slots, {image} of them for the image",
            found=str(slots),
        )
    prompt = min(DEFAULT_MAX_PROMPT, slots - image) if max_prompt is None else max_prompt
    if not 1 <= prompt <= slots - image:
        raise ConfigError(
            "max_prompt is out of range",
            expected=f"1 to {slots - image} tokens, what the cache holds beside the image",
            found=str(prompt),
        )
    return Sizes(prompt, slots, max_decode)


def vision_profile(manifest: Manifest) -> Profile:
    """The one profile of the vision graph; nothing in it varies."""
    size = manifest.config.vision.image_size
    shapes = {PIXEL_VALUES: _always((BATCH, 3, size, size))}
    if manifest.cache_slots is not None:
        shapes |= _past(manifest, *(manifest.cache_slots,) * 3)
    return Profile("vision", shapes)


def decoder_profiles(manifest: Manifest, sizes: Sizes) -> tuple[Profile, Profile]:
    """Prefill, 1 to `max_prompt` tokens, and decode, one."""
    image, longest = manifest.config.image_slots, sizes.max_cache - 1
    prompt = min(TYPICAL_PROMPT, sizes.max_prompt)
    answering = min(image + 2 * TYPICAL_PROMPT, longest)
    return (
        _decoder_profile(manifest, "prefill", (1, prompt, sizes.max_prompt), (1, image, longest)),
        _decoder_profile(manifest, "decode", (1, 1, sizes.max_decode), (1, answering, longest)),
    )


def all_profiles(manifest: Manifest, sizes: Sizes) -> tuple[Profile, ...]:
    """Those of both graphs."""
    return (vision_profile(manifest), *decoder_profiles(manifest, sizes))


def digest(profiles: Iterable[Profile]) -> str:
    """Twelve hexadecimal digits that change when any shape does."""
    body = [[profile.name, sorted(profile.shapes.items())] for profile in profiles]
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()[:12]


def _decoder_profile(
    manifest: Manifest, name: str, tokens: tuple[int, int, int], growing: tuple[int, int, int]
) -> Profile:
    """A profile for so many tokens M and, where the cache grows, so many slots before them."""
    low, typical, high = tokens
    ids = ((BATCH, low), (BATCH, typical), (BATCH, high))
    shapes: dict[str, tuple[Shape, Shape, Shape]] = {INPUT_IDS: ids, POSITION_IDS: ids}
    if manifest.cache_slots is None:
        return Profile(name, shapes | _past(manifest, *growing))
    shapes[WRITE_INDICES] = _always((BATCH,))
    return Profile(name, shapes | _past(manifest, *(manifest.cache_slots,) * 3))


def _past(
    manifest: Manifest, low: int, typical: int, high: int
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Keys and values of every layer, each [B, Hkv, P, D] with P as given."""
    decoder = manifest.config.decoder
    heads, dim = decoder.num_key_value_heads, decoder.head_dim
    shapes = ((BATCH, heads, low, dim), (BATCH, heads, typical, dim), (BATCH, heads, high, dim))
    return dict.fromkeys(past_names(decoder.num_hidden_layers), shapes)


def _always(shape: Shape) -> tuple[Shape, Shape, Shape]:
    return (shape, shape, shape)
