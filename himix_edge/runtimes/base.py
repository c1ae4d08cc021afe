"""What a runtime is: one file with three methods; everything above them is the same for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from himix_edge.runtimes.kvcache import Cache

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class VisionKV:
    """What an image leaves in the decoder's cache; it never depends on the prompt.

    Attributes:
        tensors: key and value of every layer, each [B, Hkv, N, D], in the order of
            `contract.past_names`; of a type that only the engine that made them knows.
        slots: N.
    """

    tensors: tuple[Any, ...]
    slots: int


class Engine(Protocol):
    """Runs the two graphs of a bundle."""

    def encode(self, pixel_values: FloatArray) -> VisionKV:
        """[B, 3, H, W] -> per layer keys and values [B, Hkv, N, D]"""
        ...

    def open(self, image: VisionKV | None) -> Cache:
        """A fresh cache whose first N slots are the image; `image` itself stays as it is."""
        ...

    def step(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        """M tokens [B, M] go into the cache; the logits [B, V] of the last of them come out.

        Raises:
            PromptError: the cache has less than M slots left; it is then unchanged.
        """
        ...
