"""The caches of a TensorRT runtime: all allocated at the start, lent, and given back.

A cache set is the keys and values of every layer of one image or conversation. Whoever holds a
lease has the set; it is free again when the last holder lets go of the lease, by no more than
forgetting it.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator

from himix_edge.errors import EngineError
from himix_edge.runtimes.cuda import Cuda, Event, Graph, Memory, Stream

ALIGNMENT = 256  # bytes; what TensorRT asks of a tensor's address


class CacheSet:
    """One allocation, of a buffer for each key and value.

    Attributes:
        addresses: of the buffers, in the order of `contract.past_names`.
        size: bytes, of all of them.
        decode: a decode step on this set, recorded.
    """

    def __init__(self, cuda: Cuda, buffers: int, buffer_size: int) -> None:
        stride = -(-buffer_size // ALIGNMENT) * ALIGNMENT
        self.size = buffers * stride
        self._memory: Memory = cuda.memory(self.size)
        self.addresses = [self._memory.address + i * stride for i in range(buffers)]
        self.decode: Graph | None = None
        self._used: Event = cuda.event()

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Work on this set, after whatever was put on any stream to be done on it before."""
        stream.wait(self._used)
        try:
            yield
        finally:
            self._used.record(stream)

    def wait(self) -> None:
        """Returns when the work on it is done."""
        self._used.synchronize()

    def copy_from(self, other: CacheSet, stream: Stream) -> None:
        """Takes over all that another set of the same pool holds."""
        stream.copy(self.addresses[0], other.addresses[0], self.size)

    def copy_first(
        self, other: CacheSet, rows: int, size: int, stride: int, stream: Stream
    ) -> None:
        """Takes over the first `size` bytes of each of the rows that every buffer holds.

        Args:
            stride: bytes of a row in the other set; here rows lie one after another.
        """
        for target, source in zip(self.addresses, other.addresses, strict=True):
            for row in range(rows):
                stream.copy(target + row * size, source + row * stride, size)


class Lease:
    """A set in use."""

    def __init__(self, pool: CachePool, cache_set: CacheSet) -> None:
        self.set = cache_set
        weakref.finalize(self, pool.take_back, cache_set).atexit = False


class CachePool:
    """A fixed number of cache sets."""

    def __init__(self, cuda: Cuda, count: int, buffers: int, buffer_size: int) -> None:
        """Allocates them all.

        Args:
            buffers: how many keys and values there are.
            buffer_size: bytes of each.

        Raises:
            EngineError: the GPU's memory is full.
        """
        self._count = count
        self._free = [CacheSet(cuda, buffers, buffer_size) for _ in range(count)]

    def lease(self) -> Lease:
        """A free set; the one given back last, whose decode step may be recorded already.

        Raises:
            EngineError: none is free.
        """
        if not self._free:
            gc.collect()  # whoever holds one in a cycle
        if not self._free:
            raise EngineError(
                "all caches are in use",
                expected=f"no more than {self._count} held by images and conversations at a time",
                fix="let go of an image or a conversation that has ended, or load the bundle with "
                "more caches: load(bundle, caches=N)",
            )
        return Lease(self, self._free.pop())

    def take_back(self, cache_set: CacheSet) -> None:
        """A set is free again."""
        self._free.append(cache_set)
