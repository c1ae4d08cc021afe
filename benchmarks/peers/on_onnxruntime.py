"""ONNX Runtime: an encoder's ONNX file."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

THREADS = 2


class Encoder:
    """A session; one picture at a time."""

    def __init__(self, file: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.log_severity_level = 3
        self._session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        shape = self._session.get_inputs()[0].shape
        self._pixels = np.random.default_rng(0).standard_normal(shape, np.float32)

    def encode(self) -> None:
        """One picture."""
        self.embed()

    def embed(self) -> np.ndarray:
        """pixels [1, 3, H, W] -> embeddings [1, N, h]"""
        return self._session.run(None, {"pixel_values": self._pixels})[0]
