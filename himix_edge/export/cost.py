"""What is asked of graphs in floats, to calibrate with; and what a quantized vision graph costs.

What a quantized decoder costs is measured on other text: see `judge.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from himix_edge.bundle.quality import Feature
from himix_edge.config import HiMixConfig
from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH, present_names
from himix_edge.export.calibration import Feeds
from himix_edge.export.expected import Array
from himix_edge.export.sessions import (
    CacheSlots,
    DecoderSession,
    Opener,
    VisionSession,
    decoder_feeds,
    packed_session,
)
from himix_edge.export.verify import Closeness


@dataclass(frozen=True)
class Exchange:
    """An image, a question about it, and what the graphs before answer.

    Attributes:
        image: keys and values of every layer, flat, each [1, Hkv, N, D].
        prompt, answer: token ids; the answer's last is its end, or the longest it may be.
    """

    pixels: Array
    image: list[Array]
    prompt: list[int]
    answer: list[int]


def exchanges_from_graphs(
    folder: Path,
    config: HiMixConfig,
    images: Sequence[Array],
    prompts: Sequence[list[int]],
    max_new_tokens: int = 24,
) -> list[Exchange]:
    """Asks a folder's graphs every prompt about every image, greedily.

    Args:
        images: each [1, 3, H, W].
        prompts: token ids.

    Raises:
        ExportError: a graph that ONNX Runtime can't run.
    """
    vision = VisionSession(folder / VISION_GRAPH, config)
    encoded = [vision.encode(pixels) for pixels in images]
    del vision  # one graph in memory at a time
    decoder = DecoderSession(folder / DECODER_GRAPH, config)
    return [
        Exchange(pixels, image, prompt, _answer(decoder, image, prompt, max_new_tokens))
        for pixels, image in zip(images, encoded, strict=True)
        for prompt in prompts
    ]


class CalibrationFeeds(Sequence[Feeds]):
    """The decoder's inputs for whole exchanges, the answer's last token aside.

    Made when they are read: a cache of fixed size takes much room for each of them.
    """

    def __init__(
        self, config: HiMixConfig, exchanges: Sequence[Exchange], slots: CacheSlots = None
    ) -> None:
        self.config, self.exchanges, self.slots = config, exchanges, slots

    def __len__(self) -> int:
        return len(self.exchanges)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        exchange = self.exchanges[index]
        ids = np.array([[*exchange.prompt, *exchange.answer[:-1]]])
        return decoder_feeds(self.config, ids, exchange.image, self.slots)


def vision_cost(
    before: Path,
    quantized: Path,
    config: HiMixConfig,
    images: Sequence[Array],
    open_quantized: Opener = packed_session,
) -> dict[str, Feature]:
    """Keys and values of every layer, at worst.

    Args:
        before, quantized: the graphs' files.
        images: each [B, 3, H, W].

    Raises:
        ExportError: a graph that ONNX Runtime can't run.
    """
    names = present_names(config.decoder.num_hidden_layers)
    vision = VisionSession(before, config)
    expected = [vision.encode(pixels) for pixels in images]
    del vision  # one graph in memory at a time
    vision = VisionSession(quantized, config, open_quantized)
    worst: dict[str, Feature] = {}
    for pixels, tensors in zip(images, expected, strict=True):
        for name, found, wanted in zip(names, vision.encode(pixels), tensors, strict=True):
            feature = _feature(found, wanted)
            worst[name] = _worse(feature, worst.get(name, feature))
    return worst


def _feature(found: Array, expected: Array) -> Feature:
    """Of keys or values [B, Hkv, N, D]; a token's are those of all its heads."""
    whole = Closeness.of(found, expected)
    a, b = (np.moveaxis(part.astype(np.float64), 2, 1) for part in (found, expected))
    a, b = (part.reshape(*part.shape[:2], -1) for part in (a, b))  # [B, N, Hkv * D]
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    same = (a == b).all(-1).astype(np.float64)  # of a token of zeros
    cosines = np.where(norms > 0, (a * b).sum(-1) / np.where(norms > 0, norms, 1), same).min(0)
    token = int(cosines.argmin())
    return Feature(whole.error, whole.cosine, float(cosines[token]), token)


def _worse(one: Feature, other: Feature) -> Feature:
    token = min(one, other, key=lambda feature: feature.token_cosine)
    error, cosine = max(one.error, other.error), min(one.cosine, other.cosine)
    return Feature(error, cosine, token.token_cosine, token.token)


def _answer(
    decoder: DecoderSession, image: list[Array], prompt: list[int], limit: int
) -> list[int]:
    logits, cache = decoder.step(np.array([prompt]), image)
    tokens = [int(logits.argmax())]
    while len(tokens) < limit and tokens[-1] not in decoder.config.decoder.eos_token_ids:
        logits, cache = decoder.step(np.array([tokens[-1:]]), cache)
        tokens.append(int(logits.argmax()))
    return tokens
