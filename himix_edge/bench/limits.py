"""What this machine can do at best, measured with as many threads as the model has.

Bandwidth: the largest of 256 MiB of numbers, each thread reading a part of its own. Products:
[256, 1024] x [1024, 4096] in ONNX Runtime, in fp32, and in int8 (uint8 times int8, the pair with
the fastest kernels on x86 with VNNI). Each figure is the best of a few repetitions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from himix_edge.bench.product_graphs import DEPTH, FP32_GRAPH, INT8_GRAPH, WIDTH
from himix_edge.runtimes.providers import CPU, import_onnxruntime, open_session

ROWS = 256  # M
BUFFER_BYTES = 256 << 20  # many times what the caches hold
REPETITIONS, LEAST_SECONDS = 4, 0.05  # at least so often, and for so long
SETTLED = 0.1  # seconds; idle workers of a session spin for a while before they sleep


@dataclass(frozen=True)
class Limits:
    """Bytes a second from memory; operations a second, two a multiply-add."""

    bandwidth: float
    fp32: float
    int8: float


class LimitMeter:
    """Measures the limits again and again, with everything it needs kept ready."""

    def __init__(self, threads: int | None) -> None:
        """Opens the two products.

        Args:
            threads: None takes all cores.

        Raises:
            DependencyError: no onnxruntime.
        """
        numbers = np.random.default_rng(0).integers(0, 128, (ROWS, DEPTH), np.uint8)
        self._products = {
            "fp32": (_session(FP32_GRAPH, threads), numbers.astype(np.float32)),
            "int8": (_session(INT8_GRAPH, threads), numbers),
        }
        workers = threads or cores()
        self._parts = np.array_split(np.ones(BUFFER_BYTES // 4, np.float32), workers)
        self._pool = ThreadPoolExecutor(workers)

    def measure(self) -> Limits:
        """About a quarter of a second's work on a fast machine."""
        settle()
        bandwidth = BUFFER_BYTES / _best(self._read)
        return Limits(bandwidth, self._rate("fp32"), self._rate("int8"))

    def close(self) -> None:
        """Ends the reading threads."""
        self._pool.shutdown()

    def _rate(self, product: str) -> float:
        session, numbers = self._products[product]
        return 2 * ROWS * DEPTH * WIDTH / _best(lambda: session.run(None, {"x": numbers}))

    def _read(self) -> None:
        for _ in self._pool.map(_largest, self._parts):
            pass


def settle() -> None:
    """Waits until the workers of sessions that ran last leave the cores alone."""
    time.sleep(SETTLED)


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _session(graph: Path, threads: int | None) -> Any:
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # nor disturb others
    if threads is not None:
        options.intra_op_num_threads = threads
    return open_session(CPU, graph, options)


def _largest(numbers: NDArray[np.float32]) -> np.float32:
    return numbers.max()  # type: ignore[no-any-return]


def _best(work: Callable[[], object]) -> float:
    """Seconds."""
    taken: list[float] = []
    while len(taken) < REPETITIONS or sum(taken) < LEAST_SECONDS:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)
