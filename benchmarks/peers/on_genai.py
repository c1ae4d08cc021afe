"""ONNX Runtime GenAI: a folder of its model builder."""

from __future__ import annotations

import json
import time

import onnxruntime_genai as og

THREADS = 2


class Decoder:
    """A decoder with its cache shared between past and present, GenAI's fast way."""

    def __init__(self, folder: str, slots: int = 1024) -> None:
        config = og.Config(folder)
        session = {"intra_op_num_threads": THREADS, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = og.Model(config)
        self._slots = slots

    def answer(self, ids: list[int], tokens: int) -> list[float]:
        """Greedy; seconds from the prompt to each token."""
        began = time.perf_counter()
        params = og.GeneratorParams(self._model)
        params.set_search_options(
            do_sample=False,
            max_length=self._slots,
            min_length=self._slots,
            past_present_share_buffer=True,
        )
        generator = og.Generator(self._model, params)
        generator.append_tokens(ids)
        stamps = []
        for _ in range(tokens):
            generator.generate_next_token()
            stamps.append(time.perf_counter() - began)
        return stamps
