"""Two decoders over the same text, and from the same image: how close single graphs come.

The text is what the graphs before answer with. What a bundle has lost is judged on other text: see
`himix_edge/export/judge.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from himix_edge.config import HiMixConfig
from himix_edge.contract import LOGITS, present_names
from himix_edge.export.cost import Exchange
from himix_edge.export.expected import Array
from himix_edge.export.sessions import DecoderSession, Opener, packed_session
from himix_edge.export.verify import Closeness, Closenesses, comparable


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
        ExportError: a graph that ONNX Runtime can't run.
    """
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
