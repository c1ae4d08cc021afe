"""What a runtime is: one file with five methods; everything above them is the same for all."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from himix_edge.runtimes.kvcache import Cache

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class VisionKV:
    """What an image leaves in the decoder's cache; it never depends on the prompt.

    Attributes:
        tensors: key and value of every layer, each [B, Hkv, P + N, D], in the order of
            `contract.past_names`; or the buffers of a cache of fixed size whose first P + N slots
            they fill. Of a type that only the engine that made them knows.
        slots: P + N.
        wait: returns when they are there, for engines that encode in the background. Only who
            measures need call it; `step` waits by itself.
        writers: the conversation that goes on in these very buffers, if one does; see `lend`.
        lending: held while that is decided.
    """

    tensors: tuple[Any, ...]
    slots: int
    wait: Callable[[], None] = lambda: None
    writers: weakref.WeakSet[Cache] = field(default_factory=weakref.WeakSet)
    lending: threading.Lock = field(default_factory=threading.Lock)

    def lend(self, cache: Cache) -> bool:
        """Whether a cache of fixed size may use the image's own buffers.

        Text never overwrites the image's slots, so one conversation may; while it lasts, any other
        needs a copy.
        """
        with self.lending:
            if self.writers:
                return False
            self.writers.add(cache)
            return True


class Engine(Protocol):
    """Runs the graphs of a bundle.

    Which of them a token goes through depends on what it is, a token of a prompt or a generated
    one, never on how many come at a time or on what was asked before.
    """

    def encode(self, pixel_values: FloatArray) -> VisionKV:
        """[B, 3, H, W] -> per layer keys and values [B, Hkv, P + N, D]"""
        ...

    def open(self, image: VisionKV | None) -> Cache:
        """A fresh cache whose first P + N slots are the image; `image` itself stays as it is.

        Without an image it is empty, of the model's prefix too, and holds text from position 0 on.
        """
        ...

    def prefill(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        """M tokens of a prompt [B, M] go into the cache; the logits [B, V] of the last come out.

        In how many calls a prompt comes makes no difference, to the last bit where none brings a
        single token, for which kernels sum in another order.

        Raises:
            PromptError: the cache has less than M slots left; it is then unchanged.
        """
        ...

    def step(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        """M generated tokens [B, M] go into the cache; the logits [B, V] of the last come out.

        Raises:
            PromptError: the cache has less than M slots left; it is then unchanged.
        """
        ...

    def rewind(self, cache: Cache, count: int) -> None:
        """Forgets all text but the first `count` tokens.

        Args:
            count: at most `cache.text_length`; what a prompt goes on from is at most
                `cache.reusable`.
        """
        ...


@runtime_checkable
class BranchingEngine(Engine, Protocol):
    """An engine whose conversations can begin with what an earlier one about the image has said.

    Keys and values of a text token depend on the image and the tokens up to it, on nothing else.

    `TrtEngine` is none: the conversation that an image remembers would hold one more of its few
    cache sets.

    Attributes:
        branches: whether `branch` gains anything where this engine runs.
    """

    branches: bool

    def branch(self, cache: Cache, count: int) -> Cache:
        """A fresh cache that begins as another: with its image and first `count` text tokens."""
        ...


def in_parts(input_ids: IntArray, most: int) -> Iterator[IntArray]:
    """Tokens [B, M] in parts of at most so many: a cache makes no difference between them.

    None is left over for a part of its own, for which kernels sum in another order.
    """
    count, first = input_ids.shape[1], 0
    while first < count:
        part = min(most, count - first)
        if part > 2 and count - first - part == 1:
            part -= 1
        yield input_ids[:, first : first + part]
        first += part
