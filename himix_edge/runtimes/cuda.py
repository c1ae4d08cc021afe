"""The part of CUDA's runtime that an engine needs: memory, streams, events, graphs.

Each call's error code is checked. `cuda.bindings.runtime` is the name in cuda-python 12.6.1 and
every later one.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from himix_edge.engines.gpu import CUDA_PYTHON, CUDA_PYTHON_FIX
from himix_edge.errors import DependencyError, EngineError


class Cuda:
    """The device, by its driver.

    Raises:
        DependencyError: no cuda-python.
        EngineError: no driver, or no GPU; and so for every method whose call fails.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise DependencyError(
                "cuda-python is missing", expected=CUDA_PYTHON, fix=CUDA_PYTHON_FIX
            ) from error
        self.runtime: Any = runtime
        if self.call("cudaGetDeviceCount") < 1:
            raise EngineError("CUDA finds no GPU", fix="run with --device cpu")

    def call(self, name: str, *arguments: object) -> Any:
        """Calls a function of the runtime and returns what it gives beside the error code.

        Raises:
            EngineError: it failed.
        """
        error, *values = getattr(self.runtime, name)(*arguments)
        if int(error):
            raise EngineError(
                f"{name} failed",
                found=getattr(error, "name", str(error)),
                fix="himix-edge doctor says what this device has",
            )
        return values[0] if values else None

    def stream(self) -> Stream:
        """A new stream, which doesn't wait for the default one."""
        return Stream(self)

    def event(self) -> Event:
        """A new event; who waits for one that was never recorded waits for nothing."""
        return Event(self)

    def memory(self, size: int) -> Memory:
        """So many bytes on the device, zeros all of them."""
        return Memory(self, size)

    def mirrored(self, shape: tuple[int, ...], dtype: DTypeLike) -> Mirrored:
        """An array on the device and one in the host's memory, zeros both."""
        return Mirrored(self, shape, dtype)


class Memory:
    """Bytes on the device.

    Attributes:
        address: aligned to at least 256.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        try:
            self.address = int(cuda.call("cudaMalloc", size))
        except EngineError as error:
            raise EngineError(
                "the GPU's memory is full",
                expected=f"{size / 1e6:,.0f} MB more",
                found=str(error.found),
                fix="end other programs, hold fewer caches, or build with a smaller --max-cache",
            ) from error
        _freed_with(self, cuda, "cudaFree", self.address)
        cuda.call("cudaMemset", self.address, 0, size)
        cuda.call("cudaDeviceSynchronize")  # streams of ours don't wait for the default one


class Mirrored:
    """An array on the device, and its twin in pinned memory, which copies pass at full speed.

    Attributes:
        host: the twin.
        address: of the device's.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        size = np.empty(shape, dtype).nbytes
        self._memory = cuda.memory(size)
        self.address = self._memory.address
        pinned = int(cuda.call("cudaHostAlloc", size, cuda.runtime.cudaHostAllocDefault))
        raw = (ctypes.c_byte * size).from_address(pinned)
        _freed_with(raw, cuda, "cudaFreeHost", pinned)
        self.host: NDArray[Any] = np.frombuffer(memoryview(raw), dtype).reshape(shape)
        self.host[...] = 0

    def upload(self, stream: Stream) -> None:
        """Host to device, in a stream's order: the host's must stay as it is until then."""
        stream.copy(self.address, self.host.ctypes.data, self.host.nbytes)

    def download(self, stream: Stream) -> None:
        """Device to host, in a stream's order."""
        stream.copy(self.host.ctypes.data, self.address, self.host.nbytes)


class Stream:
    """Work that the device does in order."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        flags = cuda.runtime.cudaStreamNonBlocking
        self._stream = cuda.call("cudaStreamCreateWithFlags", flags)
        _freed_with(self, cuda, "cudaStreamDestroy", self._stream)

    @property
    def handle(self) -> int:
        """For TensorRT."""
        return int(self._stream)

    def synchronize(self) -> None:
        """Returns when all of its work is done."""
        self._cuda.call("cudaStreamSynchronize", self._stream)

    def wait(self, event: Event) -> None:
        """Work from now on begins after what the event stands for."""
        self._cuda.call("cudaStreamWaitEvent", self._stream, event.handle, 0)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copies bytes between two addresses, on the device or in pinned memory."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._cuda.call("cudaMemcpyAsync", target, source, size, kind, self._stream)

    def launch(self, graph: Graph) -> None:
        """Does what was recorded once more."""
        self._cuda.call("cudaGraphLaunch", graph.handle, self._stream)

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        """What the block puts on this stream is recorded, not done.

        Raises:
            EngineError: it can't be recorded; the stream is then as it was.
        """
        recording = Recording()
        mode = self._cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._cuda.call("cudaStreamBeginCapture", self._stream, mode)
        try:
            yield recording
        except BaseException:
            with contextlib.suppress(EngineError):  # in any case, it ends the recording
                self._cuda.call("cudaStreamEndCapture", self._stream)
            raise
        captured = self._cuda.call("cudaStreamEndCapture", self._stream)
        try:
            recording.graph = Graph(self._cuda, captured)
        finally:
            self._cuda.call("cudaGraphDestroy", captured)


class Recording:
    """What becomes of a recorded block; `graph` is there when the block has ended."""

    graph: Graph


class Graph:
    """Work that was recorded, with all its addresses, and can be launched in one call."""

    def __init__(self, cuda: Cuda, captured: Any) -> None:
        self.handle = cuda.call("cudaGraphInstantiate", captured, 0)
        _freed_with(self, cuda, "cudaGraphExecDestroy", self.handle)


class Event:
    """A point in a stream's work."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        flags = cuda.runtime.cudaEventDisableTiming
        self.handle = cuda.call("cudaEventCreateWithFlags", flags)
        _freed_with(self, cuda, "cudaEventDestroy", self.handle)

    def record(self, stream: Stream) -> None:
        """From now on it stands for all that is on that stream so far."""
        self._cuda.call("cudaEventRecord", self.handle, stream._stream)

    def synchronize(self) -> None:
        """Returns when what it stands for is done."""
        self._cuda.call("cudaEventSynchronize", self.handle)


def _freed_with(owner: object, cuda: Cuda, function: str, handle: object) -> None:
    """Frees what an object holds when the object goes; the end of the process frees it anyway."""
    weakref.finalize(owner, getattr(cuda.runtime, function), handle).atexit = False
