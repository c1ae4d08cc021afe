"""What quantization costs: the quantized graphs against the ones before, on given inputs.

Both decoders are made to read the same text, the one that the graphs before answer with, and start
from the same image, so that what is measured is the decoder alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from himix_edge.config import HiMixConfig
from himix_edge.contract import (
    DECODER_GRAPH,
    LOGITS,
    VISION_GRAPH,
    present_names,
)
from himix_edge.errors import ConfigError
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
from himix_edge.export.verify import Closeness, Closenesses, comparable


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


@dataclass(frozen=True)
class DecoderCost:
    """The quantized decoder against the one before, over the same text.

    Attributes:
        tensors: the logits, and the keys and values of every layer, at worst.
        tokens: of all answers.
        same_tokens: where both find the same token likeliest.
        perplexity, perplexity_before: of the answers.
    """

    tensors: Closenesses
    tokens: int
    same_tokens: int
    perplexity: float
    perplexity_before: float


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
) -> Closenesses:
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
    worst: Closenesses = {}
    for pixels, tensors in zip(images, expected, strict=True):
        found = vision.encode(pixels)
        _note(worst, zip(names, found, tensors, strict=True))
    return worst


def decoder_cost(
    before: Path,
    quantized: Path,
    config: HiMixConfig,
    exchanges: Sequence[Exchange],
    open_quantized: Opener = packed_session,
) -> DecoderCost:
    """Both decoders over the same exchanges, one graph in memory at a time.

    Args:
        before, quantized: the graphs' files.

    Raises:
        ConfigError: no exchanges.
        ExportError: a graph that ONNX Runtime can't run.
    """
    if not exchanges:
        raise ConfigError("there is nothing to measure with", expected="exchanges", found="none")
    decoder = DecoderSession(before, config)
    expected = [_forced(decoder, exchange) for exchange in exchanges]
    del decoder  # one graph in memory at a time
    decoder = DecoderSession(quantized, config, open_quantized)
    names = present_names(config.decoder.num_hidden_layers)
    worst: Closenesses = {}
    same = 0
    losses: list[float] = []
    losses_before: list[float] = []
    for exchange, (logits_before, kv_before) in zip(exchanges, expected, strict=True):
        logits, kv = _forced(decoder, exchange)
        pair = (comparable(logits, config), comparable(logits_before, config))
        _note(worst, [(LOGITS, *pair)])
        _note(worst, zip(names, kv, kv_before, strict=True))
        same += int((logits.argmax(-1) == logits_before.argmax(-1)).sum())
        losses += _losses(logits, exchange.answer)
        losses_before += _losses(logits_before, exchange.answer)
    return DecoderCost(
        worst,
        len(losses),
        same,
        float(np.exp(np.mean(losses))),
        float(np.exp(np.mean(losses_before))),
    )


def _answer(
    decoder: DecoderSession, image: list[Array], prompt: list[int], limit: int
) -> list[int]:
    logits, cache = decoder.step(np.array([prompt]), image)
    tokens = [int(logits.argmax())]
    while len(tokens) < limit and tokens[-1] not in decoder.config.decoder.eos_token_ids:
        logits, cache = decoder.step(np.array([tokens[-1:]]), cache)
        tokens.append(int(logits.argmax()))
    return tokens


def _forced(decoder: DecoderSession, exchange: Exchange) -> tuple[Array, list[Array]]:
    """Logits [T, V] before each token of the answer; the text's keys and values, [1, Hkv, M, D]."""
    step, cache = decoder.step(np.array([exchange.prompt]), exchange.image)
    logits = [step]
    for token in exchange.answer[:-1]:
        step, cache = decoder.step(np.array([[token]]), cache)
        logits.append(step)
    slots = exchange.image[0].shape[2]
    return np.concatenate(logits), [part[:, :, slots:] for part in cache]


def _losses(logits: Array, answer: Sequence[int]) -> list[float]:
    """-log p of each token of the answer, logits [T, V]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    chosen = wide[np.arange(len(answer)), list(answer)]
    return [float(loss) for loss in np.log(np.exp(wide).sum(-1)) - chosen]


def _note(worst: Closenesses, tensors: Iterable[tuple[str, Array, Array]]) -> None:
    for name, found, expected in tensors:
        closeness = Closeness.of(found, expected)
        worst[name] = closeness.worst(worst.get(name, closeness))
