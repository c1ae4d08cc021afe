"""A text through a decoder graph in ONNX Runtime, as a device reads it, with all its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from himix_edge.config import HiMixConfig
from himix_edge.contract import (
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    WRITE_INDICES,
    past_names,
    present_names,
)
from himix_edge.export.expected import Array
from himix_edge.export.judge_text import Passage
from himix_edge.export.rewrites.chosen_tokens import CHOSEN, choose_tokens
from himix_edge.export.sessions import DTYPES, UNWRITTEN, cache_slots, changed_session

ROWS = 64  # of logits at a time: in float64 a large vocabulary's take much memory


@dataclass
class Cache:
    """What a decoder has read.

    Attributes:
        tensors: keys and values of every layer, flat, as the graph takes them.
        length: of the slots that are filled.
        position: of the next token.
    """

    tensors: list[Array]
    length: int
    position: int


@dataclass(frozen=True)
class Contents:
    """What is in a cache before a text.

    Attributes:
        tensors: keys and values of every layer, flat, each [1, Hkv, P, D]; empty is nothing.
        position: of the text's first token.
    """

    tensors: Sequence[Array] = ()
    position: int = 0


class Reader:
    """A decoder graph that gives the logits of chosen tokens."""

    def __init__(self, path: Path, config: HiMixConfig, *, packed: bool) -> None:
        """Opens the graph.

        Args:
            packed: as a device opens it.

        Raises:
            ExportError: a graph that is built otherwise, or that ONNX Runtime can't run.
        """
        self.config = config
        self.layers = config.decoder.num_hidden_layers
        self.session = changed_session(path, choose_tokens, packed=packed)
        self.slots = cache_slots(self.session)
        types = {node.name: node.type for node in self.session.get_inputs()}
        self.dtype = DTYPES[types[past_names(1)[0]]]

    def start(self, contents: Contents, tokens: int) -> Cache:
        """A cache with room for so many tokens after its contents."""
        decoder = self.config.decoder
        shape = (1, decoder.num_key_value_heads, 0, decoder.head_dim)
        tensors = list(contents.tensors) or [np.zeros(shape, self.dtype)] * (2 * self.layers)
        filled = tensors[0].shape[2]
        if self.slots is not None:
            size = filled + tokens if self.slots == "any" else self.slots
            room = ((0, 0), (0, 0), (0, size - filled), (0, 0))
            tensors = [np.pad(part, room, constant_values=UNWRITTEN) for part in tensors]
        tensors = [part.astype(self.dtype, copy=False) for part in tensors]
        return Cache(tensors, filled, contents.position)

    def read(self, ids: Sequence[int], chosen: Sequence[int], cache: Cache) -> Array:
        """Tokens of one step go into the cache; logits [K, V] of the chosen ones come out."""
        count = len(ids)
        positions = np.arange(cache.position, cache.position + count)[None]
        feeds = {
            INPUT_IDS: np.array([ids], np.int64),
            POSITION_IDS: positions.astype(np.int64),
            CHOSEN: np.array(chosen, np.int64),
            **dict(zip(past_names(self.layers), cache.tensors, strict=True)),
        }
        if self.slots is not None:
            feeds[WRITE_INDICES] = np.array([cache.length], np.int64)
        names = [LOGITS, *present_names(self.layers)]
        logits, *cache.tensors = self.session.run(names, feeds)
        cache.length += count
        cache.position += count
        rows: Array = logits[:, 0]
        return rows


def read_at_once(reader: Reader, passage: Passage, contents: Contents) -> Array:
    """Logits [K, V] of a passage's chosen places, as one prompt."""
    ids = passage.ids[:-1]
    return reader.read(ids, passage.chosen, reader.start(contents, len(ids)))


def read_token_by_token(
    prompts: Reader, tokens: Reader, passage: Passage, contents: Contents
) -> Array:
    """Logits [K, V] of a passage's chosen places; what comes before the first is a prompt."""
    first = passage.chosen[0]
    cache = prompts.start(contents, len(passage.ids))
    rows = [prompts.read(passage.ids[: first + 1], [first], cache)]
    rows += [
        tokens.read(passage.ids[place : place + 1], [0], cache)
        for place in range(first + 1, passage.chosen[-1] + 1)
    ]
    return np.concatenate([rows[place - first] for place in passage.chosen])


@dataclass
class Sums:
    """What is known of two bundles' predictions so far: sums over tokens."""

    tokens: int = 0
    loss_before: float = 0.0
    loss: float = 0.0
    divergence: float = 0.0
    same: int = 0

    def add(self, before: Array, after: Array, targets: Sequence[int]) -> None:
        """Logits [K, V] of both bundles, and the tokens that came."""
        for start in range(0, len(targets), ROWS):
            part = slice(start, start + ROWS)
            p, q = log_softmax(before[part]), log_softmax(after[part])
            rows, ids = np.arange(len(p)), list(targets[part])
            self.tokens += len(p)
            self.loss_before -= float(p[rows, ids].sum())
            self.loss -= float(q[rows, ids].sum())
            self.divergence += float((np.exp(p) * (p - q)).sum())
            self.same += int((p.argmax(-1) == q.argmax(-1)).sum())


def log_softmax(logits: Array) -> Array:
    """[K, V] -> [K, V] in float64"""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide
