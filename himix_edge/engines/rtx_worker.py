"""The process that compiles: `python -m himix_edge.engines.rtx_worker`, started by `rtx.py`.

A job comes in as JSON on stdin, its report goes out as JSON on stdout. It is a process of its own
because the loader reads LD_LIBRARY_PATH only when a process starts, because a crash in the builder
must end nothing else, and because nothing short of killing it stops a build.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from himix_edge.engines.ort_c_api import ERROR, Environment, OrtError

PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
PROVIDER = "NvTensorRTRTXExecutionProvider"
_STAMP = re.compile(r"^\[[-\d: ]+ERROR\] ")  # TensorRT's, before its messages
_NO_DRIVER = "cudaError 35"  # what TensorRT adds to errors, asking why: the driver is a stand-in


@dataclass(frozen=True)
class Job:
    """What to compile.

    Attributes:
        runtime: `libonnxruntime.so`.
        provider: the execution provider's library.
        switch: where in that library, counted from `CreateEpFactories`, stand the bytes to set so
            that it offers a device to compile for.
        graph, target: ONNX files, absolute.
        sm: the device to compile for.
        options: the provider's.
    """

    runtime: str
    provider: str
    switch: list[int]
    graph: str
    target: str
    sm: str
    options: dict[str, str]


@dataclass(frozen=True)
class Report:
    """What came of it.

    Attributes:
        seconds: of compiling; nothing else.
        peak_bytes: the most memory that this process ever held.
        errors: in the builder's words; none means that a file was written.
    """

    seconds: float
    peak_bytes: int
    errors: list[str]


def compile_graph(job: Job) -> Report:
    """Compiles; what goes wrong is in the report."""
    errors: list[str] = []
    start = time.monotonic()
    try:
        _switch_on(job)
        environment = Environment(
            Path(job.runtime),
            {"allow_virtual_devices": "1", f"ep_factory.{PROVIDER}.nv_target_sm": job.sm},
            lambda level, text: errors.extend(_errors(level, text)),
        )
        environment.register(PROVIDER, Path(job.provider))
        devices = environment.devices(PROVIDER)
        if not devices:
            raise OrtError(f"the provider offers no device to compile for {job.sm}")
        start = time.monotonic()
        environment.compile(Path(job.graph), Path(job.target), devices[0], job.options)
    except OrtError as error:
        errors.append(str(error))
    return Report(time.monotonic() - start, _peak_bytes(), errors)


def _switch_on(job: Job) -> None:
    """Has the provider offer a device to compile for, which it does of itself on Windows only.

    It asks whether Windows has locked graphics away from this process; the answer, which elsewhere
    is a fixed no, stands in a static variable with a byte beside it that says it is known.
    """
    importlib.import_module(PACKAGE)  # loads what the provider is linked against
    library = ctypes.CDLL(job.provider, mode=ctypes.RTLD_GLOBAL)
    anchor = ctypes.cast(library.CreateEpFactories, ctypes.c_void_p).value or 0
    for offset in job.switch:
        ctypes.c_ubyte.from_address(anchor + offset).value = 1


def _errors(level: int, text: str) -> list[str]:
    """A message, if it is one to fail for.

    A profile that the provider can't use is a warning to it: it goes on without.
    """
    if level < ERROR and "profile" not in text.lower():
        return []
    return [] if _NO_DRIVER in text else [_STAMP.sub("", text)]


def _peak_bytes() -> int:
    """Of this program alone: getrusage counts in what the process was before it became this."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    """Reads a job, writes its report."""
    stdout = os.dup(1)
    os.dup2(2, 1)  # what the libraries print is no part of the report
    report = compile_graph(Job(**json.load(sys.stdin)))
    with os.fdopen(stdout, "w") as file:
        json.dump(dataclasses.asdict(report), file)


if __name__ == "__main__":
    main()
