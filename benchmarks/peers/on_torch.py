"""transformers: a decoder's folder, an encoder's weights; torch's own fused attention, fp32."""

from __future__ import annotations

import time
from pathlib import Path

import make_weights
import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

torch.set_num_threads(2)


class Decoder:
    """A decoder as transformers runs it, logits of the last token only."""

    def __init__(self, folder: str, dtype: str = "float32", attention: str = "sdpa") -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=attention
        ).eval()

    @torch.inference_mode()
    def answer(self, ids: list[int], tokens: int) -> list[float]:
        """Greedy; seconds from the prompt to each token."""
        began = time.perf_counter()
        cache = DynamicCache(config=self._model.config)
        step, stamps = torch.tensor([ids]), []
        for _ in range(tokens):
            logits = self._model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            step = logits.logits[:, -1].argmax(-1, keepdim=True)
            int(step)
            stamps.append(time.perf_counter() - began)
        return stamps


class Encoder:
    """An encoder of `make_weights`, from the file that it wrote."""

    def __init__(self, file: str) -> None:
        self._model = make_weights.read_encoder(Path(file))
        size = self._model.tower.config.image_size
        pixels = np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)
        self._pixels = torch.from_numpy(pixels)

    def encode(self) -> None:
        """One picture."""
        self.embed()

    @torch.inference_mode()
    def embed(self) -> np.ndarray:
        """pixels [1, 3, H, W] -> embeddings [1, N, h]"""
        return self._model(self._pixels).numpy()
