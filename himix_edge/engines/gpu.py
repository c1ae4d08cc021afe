"""The GPU of this machine, as far as engines depend on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from himix_edge.errors import DependencyError, EngineError

CUDA_PYTHON = "12.6.1 or later, no newer than this device's CUDA"
CUDA_PYTHON_FIX = (
    "pip install 'cuda-python==12.6.*' on JetPack 6.2, 'cuda-python==13.2.*' on JetPack 7.2"
)


@dataclass(frozen=True)
class Gpu:
    """What an engine is tied to, and what a build has to spend.

    Attributes:
        name: the driver's, with the number of multiprocessors: all boards of a Jetson family call
            their GPU "Orin", and an engine of the largest is not for the smallest.
        compute_capability: "8.7".
        free_bytes: of its memory.
        unified: its memory is the CPU's, as on a Jetson.
    """

    name: str
    compute_capability: str
    free_bytes: int
    unified: bool


def gpu_here() -> Gpu:
    """The first GPU.

    Raises:
        DependencyError: no cuda-python.
        EngineError: no GPU that CUDA can use.
    """
    try:
        from cuda.bindings import runtime as cudart
    except ImportError as error:
        raise DependencyError(
            "cuda-python is missing", expected=CUDA_PYTHON, fix=CUDA_PYTHON_FIX
        ) from error

    def called(result: tuple[Any, ...]) -> Any:
        code, *values = result
        if code != cudart.cudaError_t.cudaSuccess:
            raise EngineError(
                "CUDA finds no GPU here",
                found=code.name,
                fix="build on the device, or for another with --target rtx-sm89; see: "
                "himix-edge doctor",
            )
        return values

    [properties] = called(cudart.cudaGetDeviceProperties(0))
    free, _ = called(cudart.cudaMemGetInfo())
    name = properties.name.decode().strip("\0 ")
    return Gpu(
        name=f"{name}, {properties.multiProcessorCount} SMs",
        compute_capability=f"{properties.major}.{properties.minor}",
        free_bytes=int(free),
        unified=bool(properties.integrated),
    )
