"""HiMix: a bundle folder, by himix-edge's own runtime."""

from __future__ import annotations

import time

import numpy as np

import himix_edge

THREADS = 2


class Pair:
    """Encoder and decoder. An answer follows the picture that was encoded last, or none."""

    def __init__(self, bundle: str, picture: str) -> None:
        self._model = himix_edge.load(bundle, device="cpu", threads=THREADS, verify=False)
        self._picture = picture

    def encode(self) -> dict[str, float]:
        """A picture's file to keys and values; seconds of its phases."""
        self._image = self._model.encode(self._picture)
        return {phase: spent / 1e3 for phase, spent in self._image.milliseconds.items()}

    def answer(self, ids: list[int], tokens: int, image: bool = True) -> list[float]:
        """Greedy; seconds from the prompt to each token."""
        began = time.perf_counter()
        engine = self._model.engine
        cache = engine.open(self._image.kv if image else None)
        step, feed, stamps = np.array([ids]), engine.prefill, []
        for _ in range(tokens):
            step = feed(step, cache).argmax(-1)[:, None]
            feed = engine.step
            stamps.append(time.perf_counter() - began)
        return stamps
