"""What the model in torch says to images and prompts: what its graphs are then held against.

Recorded before the graphs are opened, so that model and graphs are never in memory together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from himix_edge.config import PreprocessConfig
from himix_edge.models.decoder import KV
from himix_edge.models.himix import HiMix
from himix_edge.runtimes.preprocess import pixel_values
from himix_edge.shapes.render import render
from himix_edge.shapes.scenes import random_scene

Array = NDArray[Any]

QUESTIONS = ("describe", "How many objects are there?", "Is there a red circle in the picture?")
IMAGES = 3
MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Step:
    """M tokens over a cache.

    Attributes:
        ids: [B, M]
        logits: [B, V], of the last token.
        present: key and value of every layer, flat, in the M new slots alone: [B, Hkv, M, D].
    """

    ids: Array
    logits: Array
    present: list[Array]


@dataclass(frozen=True)
class Case:
    """Encode, prefill, and one token more.

    Attributes:
        pixels: [B, 3, H, W]
        image: keys and values of every layer, flat, each [B, Hkv, P + N, D].
    """

    pixels: Array
    image: list[Array]
    prefill: Step
    decode: Step


@dataclass(frozen=True)
class Greedy:
    """The likeliest tokens after a prompt about an image.

    Attributes:
        logits: [V] before each of the tokens.
    """

    pixels: Array
    prompt: list[int]
    tokens: list[int]
    logits: list[Array]


@dataclass(frozen=True)
class Expected:
    """All that a model was asked, and what it said."""

    cases: list[Case]
    greedy: list[Greedy]


def trial_images(config: PreprocessConfig) -> list[Array]:
    """Rendered scenes, preprocessed as a device does it, each [1, 3, H, W]."""
    rng = np.random.default_rng(0)
    return [pixel_values(render(random_scene(rng)), config) for _ in range(IMAGES)]


@torch.inference_mode()
def expected_from_model(
    model: HiMix, images: Sequence[Array], prompts: Sequence[list[int]]
) -> Expected:
    """Pairs image and prompt in turn: one pair at a time, and then two together.

    Args:
        images: at least two, each [1, 3, H, W].
        prompts: token ids.
    """
    pairs = [(image, prompts[i % len(prompts)]) for i, image in enumerate(images)]
    cases = [_case(model, image, np.array([prompt])) for image, prompt in pairs]
    shortest = min(len(prompt) for _, prompt in pairs[:2])
    both = np.array([prompt[-shortest:] for _, prompt in pairs[:2]])
    cases.append(_case(model, np.concatenate(images[:2]), both))
    return Expected(cases, [_greedy(model, image, prompt) for image, prompt in pairs])


def _case(model: HiMix, pixels: Array, ids: Array) -> Case:
    image = model.encode(torch.from_numpy(pixels))
    prefill, cache = _step(model, ids, image)
    decode, _ = _step(model, prefill.logits.argmax(-1)[:, None], cache)
    return Case(pixels, _flat(image), prefill, decode)


def _step(model: HiMix, ids: Array, past: list[KV]) -> tuple[Step, list[KV]]:
    logits, present = model.decode(torch.from_numpy(ids), past)
    new = [KV(*(part[:, :, -ids.shape[1] :].clone() for part in kv)) for kv in present]
    return Step(ids, logits[:, -1].numpy().copy(), _flat(new)), present


def _greedy(model: HiMix, pixels: Array, prompt: list[int]) -> Greedy:
    """`HiMix.generate_greedy` with the logits kept."""
    cache = model.encode(torch.from_numpy(pixels))
    tokens: list[int] = []
    said: list[Array] = []
    ids = torch.tensor([prompt])
    while len(tokens) < MAX_NEW_TOKENS:
        logits, cache = model.decode(ids, cache)
        said.append(logits[0, -1].numpy().copy())
        tokens.append(int(said[-1].argmax()))
        if tokens[-1] in model.config.decoder.eos_token_ids:
            break
        ids = torch.tensor([tokens[-1:]])
    return Greedy(pixels, prompt, tokens, said)


def _flat(cache: list[KV]) -> list[Array]:
    return [part.numpy() for kv in cache for part in kv]
