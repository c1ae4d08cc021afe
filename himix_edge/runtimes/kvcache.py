"""The cache of one conversation: the image's slots, then the text's.

It grows, or has a fixed size and is written in place: which of the two is the engine's affair. Both
are counted in the same way here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from himix_edge.config import HiMixConfig
from himix_edge.errors import PromptError


@dataclass(eq=False)
class Cache:
    """Keys and values of everything that the decoder has seen, and where the next token stands.

    Attributes:
        tensors: what the engine last returned: key and value of every layer, each
            [B, Hkv, length, D], or [B, Hkv, S, D] where the size is fixed; only the engine looks
            inside.
        length: how many slots are filled.
        image_slots: how many of them, from the first on, are the image's: P + N.
        text_offset: the rotary position of the first text token.
        capacity: how many slots the model's positions suffice for, and the engine has.
        binding: what an engine keeps from one step on these tensors for the next.
    """

    tensors: tuple[Any, ...]
    length: int
    image_slots: int
    text_offset: int
    capacity: int
    binding: Any = None

    @classmethod
    def after_image(
        cls,
        config: HiMixConfig,
        tensors: tuple[Any, ...],
        slots: int,
        most_slots: int | None = None,
    ) -> Cache:
        """The cache in which an image fills the first `slots` slots, or none, and no text has come.

        Without an image there is no prefix either, as its keys are turned for text that follows an
        image: such a cache is a stock decoder's, with all its positions for text from 0 on.

        Args:
            tensors: the image's keys and values; see `VisionKV`.
            most_slots: S, where the engine has no more than these for image and text together.
        """
        positions = config.max_text_tokens if slots else config.decoder.max_position_embeddings
        capacity = positions + slots
        return cls(
            tensors=tensors,
            length=slots,
            image_slots=slots,
            text_offset=config.text_offset if slots else 0,
            capacity=capacity if most_slots is None else min(capacity, most_slots),
        )

    @property
    def text_length(self) -> int:
        """How many slots are text."""
        return self.length - self.image_slots

    @property
    def room(self) -> int:
        """How many more tokens fit."""
        return self.capacity - self.length

    def require_room(self, count: int) -> None:
        """Checks that `count` more tokens fit.

        Raises:
            PromptError: they don't.
        """
        if count > self.room:
            raise PromptError(
                "the context is full",
                expected=f"at most {self.room} more tokens",
                found=str(count),
                fix="ask less at a time, or begin a new conversation",
            )

    def next_positions(self, batch: int, count: int) -> NDArray[np.int64]:
        """position_ids [B, M] of the next tokens: slot P + N + t stands at text_offset + t.

        Raises:
            PromptError: they don't fit.
        """
        self.require_room(count)
        first = self.text_length + self.text_offset
        positions = np.arange(first, first + count, dtype=np.int64)
        return np.repeat(positions[None], batch, axis=0)

    def advance(self, tensors: tuple[Any, ...], count: int) -> None:
        """The engine has put `count` more tokens in."""
        self.move_to(tensors)
        self.length += count

    def move_to(self, tensors: tuple[Any, ...]) -> None:
        """The engine keeps the filled slots in these tensors from now on."""
        if tensors is not self.tensors:
            self.tensors, self.binding = tensors, None
