"""llama.cpp through llama-cpp-python: a GGUF file."""

from __future__ import annotations

import ctypes
import time

import llama_cpp
import numpy as np

THREADS = 2


class Decoder:
    """A decoder by llama.cpp's own calls: its logits are read where they lie."""

    def __init__(self, file: str, slots: int = 1024, flash: bool = True) -> None:
        self._llama = llama_cpp.Llama(
            file,
            n_ctx=slots,
            n_batch=slots,
            n_ubatch=slots,
            n_threads=THREADS,
            n_threads_batch=THREADS,
            flash_attn=flash,
            verbose=False,
        )
        self._context = self._llama.ctx
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = self._llama.n_vocab()

    def answer(self, ids: list[int], tokens: int) -> list[float]:
        """Greedy; seconds from the prompt to each token."""
        began = time.perf_counter()
        llama_cpp.llama_memory_clear(self._memory, False)
        step, stamps = ids, []
        for _ in range(tokens):
            row = (ctypes.c_int32 * len(step))(*step)
            failed = llama_cpp.llama_decode(
                self._context, llama_cpp.llama_batch_get_one(row, len(step))
            )
            if failed:
                raise RuntimeError(f"llama_decode returns {failed}")
            logits = llama_cpp.llama_get_logits_ith(self._context, -1)
            step = [int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())]
            stamps.append(time.perf_counter() - began)
        return stamps
