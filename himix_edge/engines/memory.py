"""How much memory a build takes, and whether there is so much.

An estimate, not a measurement. NVIDIA's guide says of the build phase ("How TensorRT Works",
Memory) that the host holds at least two copies of the weights, the network's and the engine's, and
more for a time where weights are combined; and that timing needs buffers on the device for inputs,
outputs and weights, beside a workspace that can be limited. Hence three copies, the workspace that
`engines/trt.py` allows, and what CUDA and TensorRT take themselves. People's experience of small
Jetsons, three to four times the weights, agrees.
"""

from __future__ import annotations

from pathlib import Path

from himix_edge.contract import Manifest
from himix_edge.engines.gpu import Gpu
from himix_edge.errors import EngineError

HOST_COPIES = 2
DEVICE_COPIES = 1
LEAST_WORKSPACE = 256 << 20  # bytes
LIBRARIES = 512 << 20  # bytes: the CUDA context, and TensorRT's kernels


def weight_bytes(manifest: Manifest, graph: str) -> int:
    """The size of a graph's file and of those of its weights."""
    return sum(
        record.size
        for name, record in manifest.files.items()
        if name == graph or name.startswith(f"{graph}.")
    )


def workspace_bytes(weight_bytes: int) -> int:
    """How much the builder may use to try a kernel."""
    return max(LEAST_WORKSPACE, weight_bytes // 2)


def build_memory_bytes(weight_bytes: int) -> int:
    """What building an engine takes at its height, host and device together: an estimate.

    Args:
        weight_bytes: of the graph; graphs are built one after another, so the larger counts.
    """
    return HOST_COPIES * weight_bytes + device_memory_bytes(weight_bytes)


def device_memory_bytes(weight_bytes: int) -> int:
    """The part of it that a GPU with memory of its own must have."""
    return DEVICE_COPIES * weight_bytes + workspace_bytes(weight_bytes) + LIBRARIES


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that programs can still get without swapping; None where the system doesn't say."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return None


def require_memory(what: str, weight_bytes: int, gpu: Gpu | None) -> None:
    """Refuses a build that would not fit.

    Args:
        what: is to be built, for the error.
        gpu: where; None is a build on the CPU alone.

    Raises:
        EngineError: it needs more memory than there is.
    """
    needs = [("memory", build_memory_bytes(weight_bytes), available_bytes())]
    if gpu is not None and not gpu.unified:
        needs = [
            ("memory", HOST_COPIES * weight_bytes + LIBRARIES, available_bytes()),
            ("GPU memory", device_memory_bytes(weight_bytes), gpu.free_bytes),
        ]
    for kind, needed, there in needs:
        if there is not None and there < needed:
            raise EngineError(
                f"building {what} takes more {kind} than there is",
                expected=f"about {needed / 1e9:.1f} GB free",
                found=f"{there / 1e9:.1f} GB",
                fix="close what else runs; or try it anyway, with swap, by --force",
            )
