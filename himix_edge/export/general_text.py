"""Text to calibrate with that is like any other: our own words, in several registers.

Calibrated on questions about a model's own pictures alone, GPTQ fits those and loses elsewhere: on
a pretrained decoder up to ten times what it loses on them. Half of the sequences follow an image,
as an answer does, and half follow nothing: a model's first token is often unlike all others, and in
front of an image there is no first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from himix_edge.config import HiMixConfig
from himix_edge.contract import POSITION_IDS
from himix_edge.export.calibration import Feeds
from himix_edge.export.expected import Array
from himix_edge.export.sessions import CacheSlots, decoder_feeds
from himix_edge.runtimes.tokenizer import Tokenizer

TEXTS = Path(__file__).parents[1] / "assets" / "calibration"
SEQUENCE = 512  # tokens
MAX_TOKENS = 8192  # of all sequences; a tokenizer of bytes makes five times as many


def general_sequences(tokenizer: Tokenizer, longest: int) -> list[list[int]]:
    """Token ids of the texts, all registers alike.

    Args:
        longest: tokens that the model has positions and slots for.
    """
    paths = sorted(TEXTS.glob("*.txt"))
    length, share = min(SEQUENCE, longest), MAX_TOKENS // max(len(paths), 1)
    sequences = []
    for path in paths:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))[:share]
        sequences += [ids[first : first + length] for first in range(0, len(ids), length)]
    return sequences


class TextFeeds(Sequence[Feeds]):
    """The decoder's inputs for whole sequences, every second one after an image.

    Made when they are read: a cache of fixed size takes much room for each of them. A graph whose
    cache grows needs something in it, and so has an image in front of every sequence.
    """

    def __init__(
        self,
        config: HiMixConfig,
        sequences: Sequence[list[int]],
        images: Sequence[list[Array]],
        slots: CacheSlots = None,
    ) -> None:
        """Args:
        images: keys and values of every layer, flat, each [1, Hkv, P + N, D]; one at least.
        """
        self.config, self.sequences, self.images, self.slots = config, sequences, images, slots

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        ids = np.array([self.sequences[index]])
        image = self.images[index % len(self.images)]
        if index % 2 or self.slots is None:
            return decoder_feeds(self.config, ids, image, self.slots)
        feeds = decoder_feeds(self.config, ids, [part[:, :, :0] for part in image], self.slots)
        return {**feeds, POSITION_IDS: np.arange(ids.shape[1])[None]}


class JoinedFeeds(Sequence[Feeds]):
    """One after the other."""

    def __init__(self, *parts: Sequence[Feeds]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)
