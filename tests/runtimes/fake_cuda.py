"""A GPU that can be looked into: CUDA's runtime as far as we use it, on the host's memory.

Work on a stream is done when something waits for it and no sooner, or, on an `eager` GPU, as soon
as it may, before whatever is waited for: what one stream owes to another and is not told to wait
for comes out as wrong numbers on one of the two. Fresh memory is full of bytes that are no numbers.
"""
# ruff: noqa: N801, N802, N803, N815 - the names are theirs

from __future__ import annotations

import enum
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Work = Callable[[], None]


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyDefault = 4


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


OK = cudaError_t.cudaSuccess
BAD = cudaError_t.cudaErrorInvalidValue


class Handle:
    """What the bindings give: opaque, but for its number."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number


class FakeStream:
    """Work in order; how much of it is done."""

    def __init__(self) -> None:
        self.work: list[Work] = []
        self.done = 0
        self.recording: list[Work] | None = None

    def put(self, work: Work) -> None:
        (self.work if self.recording is None else self.recording).append(work)

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.work[self.done - 1]()


class FakeGpu:
    """The device, its memory and all that is going on; the tests' own view.

    Attributes:
        memory_limit: bytes that can be allocated.
        recordable: whether work can be recorded.
        launches: how many recordings were launched.
        copied: (from the host, bytes) of every copy, in the order in which they were done.
    """

    def __init__(self, *, eager: bool = False) -> None:
        self.eager = eager
        self.count = 1
        self.name = "Orin"
        self.capability = (8, 7)
        self.memory_limit = 1 << 30
        self.recordable = True
        self.launches = 0
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.pinned: dict[int, NDArray[np.uint8]] = {}
        self.streams = {0: FakeStream()}  # the default one
        self.events: dict[int, tuple[FakeStream, int]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self._number = 1000

    def number(self) -> int:
        self._number += 1
        return self._number

    def bytes_at(self, address: int, size: int) -> NDArray[np.uint8]:
        """A view of memory that is allocated, all of it in one piece."""
        for start, block in {**self.memory, **self.pinned}.items():
            if start <= address and address + size <= start + block.size:
                return block[address - start :][:size]
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated")

    def allocate(self, size: int) -> NDArray[np.uint8]:
        raw = np.full(size + 512, 0xFF, np.uint8)
        start = -raw.ctypes.data % 512
        return raw[start : start + size]

    def wait_for(self, stream: FakeStream, until: int) -> None:
        if self.eager:
            for other in self.streams.values():
                if other is not stream:
                    other.run(len(other.work))
        stream.run(until)


def runtime_of(gpu: FakeGpu) -> types.ModuleType:
    """`cuda.bindings.runtime` for that GPU: nothing in it that isn't in the real one."""
    module = types.ModuleType("cuda.bindings.runtime")
    for name, value in {**_constants(), **_memory(gpu), **_streams(gpu), **_graphs(gpu)}.items():
        setattr(module, name, value)
    return module


def _constants() -> dict[str, Any]:
    return {
        "cudaError_t": cudaError_t,
        "cudaMemcpyKind": cudaMemcpyKind,
        "cudaStreamCaptureMode": cudaStreamCaptureMode,
        "cudaHostAllocDefault": 0,
        "cudaStreamNonBlocking": 1,
        "cudaEventDisableTiming": 2,
    }


def _memory(gpu: FakeGpu) -> dict[str, Any]:
    def cudaGetDeviceCount() -> tuple[Any, ...]:
        return (OK, gpu.count) if gpu.count else (cudaError_t.cudaErrorNoDevice, None)

    def cudaGetDeviceProperties(device: int) -> tuple[Any, ...]:
        if device >= gpu.count:
            return cudaError_t.cudaErrorNoDevice, None
        major, minor = gpu.capability
        name = gpu.name.encode() + b"\0"
        return OK, types.SimpleNamespace(
            name=name, major=major, minor=minor, multiProcessorCount=8, integrated=1
        )

    def cudaMemGetInfo() -> tuple[Any, ...]:
        return OK, gpu.memory_limit, gpu.memory_limit

    def cudaMalloc(size: int) -> tuple[Any, ...]:
        if sum(block.size for block in gpu.memory.values()) + size > gpu.memory_limit:
            return cudaError_t.cudaErrorMemoryAllocation, None
        block = gpu.allocate(size)
        gpu.memory[block.ctypes.data] = block
        return OK, block.ctypes.data

    def cudaFree(devPtr: int) -> tuple[Any, ...]:
        return (OK,) if gpu.memory.pop(devPtr, None) is not None else (BAD,)

    def cudaHostAlloc(size: int, flags: int) -> tuple[Any, ...]:
        assert flags == 0
        block = gpu.allocate(size)
        gpu.pinned[block.ctypes.data] = block
        return OK, block.ctypes.data

    def cudaFreeHost(ptr: int) -> tuple[Any, ...]:
        return (OK,) if gpu.pinned.pop(ptr, None) is not None else (BAD,)

    def cudaMemset(devPtr: int, value: int, count: int) -> tuple[Any, ...]:
        gpu.streams[0].put(lambda: gpu.bytes_at(devPtr, count).fill(value))
        return (OK,)

    def cudaDeviceSynchronize() -> tuple[Any, ...]:
        for stream in gpu.streams.values():
            stream.run(len(stream.work))
        return (OK,)

    def cudaMemcpyAsync(
        dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: Handle
    ) -> tuple[Any, ...]:
        assert kind is cudaMemcpyKind.cudaMemcpyDefault

        def copy() -> None:
            gpu.bytes_at(dst, count)[...] = gpu.bytes_at(src, count)

        gpu.streams[int(stream)].put(copy)
        return (OK,)

    return locals()


def _streams(gpu: FakeGpu) -> dict[str, Any]:
    def cudaStreamCreateWithFlags(flags: int) -> tuple[Any, ...]:
        assert flags == 1
        handle = Handle(gpu.number())
        gpu.streams[int(handle)] = FakeStream()
        return OK, handle

    def cudaStreamDestroy(stream: Handle) -> tuple[Any, ...]:
        return (OK,) if gpu.streams.pop(int(stream), None) else (BAD,)

    def cudaStreamSynchronize(stream: Handle) -> tuple[Any, ...]:
        queue = gpu.streams[int(stream)]
        if queue.recording is not None:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        gpu.wait_for(queue, len(queue.work))
        return (OK,)

    def cudaStreamWaitEvent(stream: Handle, event: Handle, flags: int) -> tuple[Any, ...]:
        assert flags == 0
        if point := gpu.events[int(event)]:
            other, until = point
            gpu.streams[int(stream)].put(lambda: other.run(until))
        return (OK,)

    def cudaEventCreateWithFlags(flags: int) -> tuple[Any, ...]:
        assert flags == 2
        handle = Handle(gpu.number())
        gpu.events[int(handle)] = (FakeStream(), 0)  # never recorded: nothing to wait for
        return OK, handle

    def cudaEventDestroy(event: Handle) -> tuple[Any, ...]:
        return (OK,) if gpu.events.pop(int(event), None) else (BAD,)

    def cudaEventRecord(event: Handle, stream: Handle) -> tuple[Any, ...]:
        queue = gpu.streams[int(stream)]
        gpu.events[int(event)] = (queue, len(queue.work))
        return (OK,)

    def cudaEventSynchronize(event: Handle) -> tuple[Any, ...]:
        gpu.wait_for(*gpu.events[int(event)])
        return (OK,)

    return locals()


def _graphs(gpu: FakeGpu) -> dict[str, Any]:
    def cudaStreamBeginCapture(stream: Handle, mode: cudaStreamCaptureMode) -> tuple[Any, ...]:
        assert mode is cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        gpu.streams[int(stream)].recording = []
        return (OK,)

    def cudaStreamEndCapture(stream: Handle) -> tuple[Any, ...]:
        queue = gpu.streams[int(stream)]
        recorded, queue.recording = queue.recording, None
        if recorded is None or not gpu.recordable:
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        handle = Handle(gpu.number())
        gpu.graphs[int(handle)] = recorded
        return OK, handle

    def cudaGraphInstantiate(graph: Handle, flags: int) -> tuple[Any, ...]:
        assert flags == 0
        handle = Handle(gpu.number())
        gpu.graphs[int(handle)] = list(gpu.graphs[int(graph)])
        return OK, handle

    def cudaGraphDestroy(graph: Handle) -> tuple[Any, ...]:
        return (OK,) if gpu.graphs.pop(int(graph), None) is not None else (BAD,)

    def cudaGraphExecDestroy(graphExec: Handle) -> tuple[Any, ...]:
        return (OK,) if gpu.graphs.pop(int(graphExec), None) is not None else (BAD,)

    def cudaGraphLaunch(graphExec: Handle, stream: Handle) -> tuple[Any, ...]:
        gpu.launches += 1
        for work in gpu.graphs[int(graphExec)]:
            gpu.streams[int(stream)].put(work)
        return (OK,)

    return locals()
