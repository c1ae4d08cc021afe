"""Builds an engine with the real builder of TensorRT for RTX, by the code that is TensorRT's.

Its Python API is TensorRT's; only which GPU to build for, where there is none, must be said. A
process of its own, because of the libraries: `python -m tests.engines.real_builder GRAPH TARGET`.
It prints one JSON object: the error if there was one, and what was told of the progress.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from himix_edge.engines import rtx
from himix_edge.engines.profiles import Profile, Sizes
from himix_edge.engines.progress import BuildProgress, run_cancellable
from himix_edge.engines.store import EngineDevice, EngineKey
from himix_edge.errors import HimixError

WIDTH = 8  # of the graph's only input, "x" [tokens, WIDTH]
MOST = 32  # tokens


def profiles() -> tuple[Profile, Profile]:
    one, many = (1, WIDTH), (MOST, WIDTH)
    return Profile("prefill", {"x": (one, many, many)}), Profile("decode", {"x": (one, one, one)})


def for_no_gpu(trt: Any) -> Any:
    """The module, with a builder whose configs name what to build for."""

    class Builder(trt.Builder):  # type: ignore[misc]
        def create_builder_config(self) -> Any:
            config = trt.Builder.create_builder_config(self)
            config.num_compute_capabilities = 1
            config.set_compute_capability(trt.ComputeCapability.SM89, 0)
            return config

    class Module:
        __version__ = rtx.version()

        def __getattr__(self, name: str) -> Any:
            return Builder if name == "Builder" else getattr(trt, name)

    return Module()


def main(graph: Path, target: Path, *options: str) -> None:
    trt = importlib.import_module("tensorrt_rtx_bindings.tensorrt_rtx")
    sys.modules["tensorrt"] = for_no_gpu(trt)
    from himix_edge.engines.trt import engine_from_onnx

    device = EngineDevice("tensorrt", rtx.version(), "none", "8.9")
    key = EngineKey(device, "", "", "float16", Sizes(MOST, MOST), "")
    told: list[tuple[str, float, str]] = []

    def report(phase: str, done: float, inner: str) -> None:
        told.append((phase, done, inner))
        if "interrupt" in options and len(told) == 10:
            os.kill(os.getpid(), signal.SIGINT)
            while not progress.cancelled:  # time for it to arrive
                time.sleep(0.001)

    progress = BuildProgress(report)
    error = None
    timings = target.with_suffix(".timing")
    kept = timings.read_bytes() if timings.exists() else b""
    try:
        measured = run_cancellable(
            lambda: engine_from_onnx(graph, target, profiles(), key, kept, 1 << 28, progress),
            progress.cancel,
        )
        timings.write_bytes(measured)
    except (HimixError, KeyboardInterrupt) as raised:
        error = f"{type(raised).__name__}: {raised}"
    print(json.dumps({"error": error, "told": told}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
