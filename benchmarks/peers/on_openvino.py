"""OpenVINO GenAI: a folder exported by optimum-intel; OpenVINO: an encoder's ONNX or IR file."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ovg

THREADS = 2


class Stamps(ovg.StreamerBase):
    """Notes when each token comes."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.perf_counter()
        self.times: list[float] = []

    def write(self, token: Any) -> ovg.StreamingStatus:
        """Called for each token, or for some at a time."""
        count = len(token) if isinstance(token, list) else 1
        self.times += [time.perf_counter() - self.began] * count
        return ovg.StreamingStatus.RUNNING

    def end(self) -> None:
        """Called when no more come."""


class Decoder:
    """An LLMPipeline; `properties` are those of OpenVINO's CPU plugin."""

    def __init__(self, folder: str, backend: str = "PA", **properties: Any) -> None:
        properties.setdefault("INFERENCE_NUM_THREADS", THREADS)
        if backend == "PA":
            scheduler = ovg.SchedulerConfig()
            scheduler.cache_size = 1
            scheduler.max_num_batched_tokens = 2048  # the whole prompt at once
            scheduler.enable_prefix_caching = False
            properties["scheduler_config"] = scheduler
        properties["ATTENTION_BACKEND"] = backend
        self._pipeline = ovg.LLMPipeline(folder, "CPU", **properties)

    def answer(self, ids: list[int], tokens: int) -> list[float]:
        """Greedy; seconds from the prompt to each token."""
        stamps = Stamps()
        row = np.array([ids], np.int64)
        inputs = ovg.TokenizedInputs(ov.Tensor(row), ov.Tensor(np.ones_like(row)))
        config = ovg.GenerationConfig()
        config.max_new_tokens = tokens
        config.do_sample = False
        config.ignore_eos = True
        self._pipeline.generate(inputs, config, stamps)
        return stamps.times


class Encoder:
    """A compiled model; `properties` are those of OpenVINO's CPU plugin."""

    def __init__(self, file: str, **properties: Any) -> None:
        properties.setdefault("INFERENCE_NUM_THREADS", THREADS)
        self._request = ov.Core().compile_model(file, "CPU", properties).create_infer_request()
        shape = tuple(self._request.get_input_tensor().shape)
        self._pixels = np.random.default_rng(0).standard_normal(shape, np.float32)

    def encode(self) -> None:
        """One picture."""
        self._request.infer([self._pixels])

    def embed(self) -> np.ndarray:
        """pixels [1, 3, H, W] -> embeddings [1, N, h]"""
        self.encode()
        return self._request.get_output_tensor().data
