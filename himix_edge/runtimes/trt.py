"""TensorRT: the engines of a bundle on an NVIDIA GPU. TensorRT and cuda-python, nothing else.

Two streams: the next image is encoded on one while the last answer is decoded on the other. What
each does on a cache set waits for what the other did there before, on the device; the host waits
for the logits alone.

    portable   the cache grows: a step reads one set and writes another
    native     the cache has a fixed size: every step, the vision engine's too, writes its slots in
               place; one of one token is recorded as a CUDA graph
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import numpy as np

from himix_edge import contract
from himix_edge.engines.progress import Report
from himix_edge.errors import ConfigError, EngineError
from himix_edge.runtimes.base import FloatArray, IntArray, VisionKV, in_parts
from himix_edge.runtimes.cuda import Cuda, Graph
from himix_edge.runtimes.kvcache import Cache
from himix_edge.runtimes.trt_cache import ALIGNMENT, CachePool, CacheSet, Lease
from himix_edge.runtimes.trt_context import Context, Library, engines_here

if TYPE_CHECKING:
    from himix_edge.bundle.signature import Trusted

PREFILL, DECODE = 0, 1  # the decoder engine's profiles
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
CACHES = 4  # two images, and a conversation about each

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _alone(
    method: Callable[Concatenate[TrtEngine, Arguments], Result],
) -> Callable[Concatenate[TrtEngine, Arguments], Result]:
    """One thread at a time: the execution contexts and the pinned memory are the engine's own."""

    @functools.wraps(method)
    def locked(engine: TrtEngine, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with engine.lock:
            return method(engine, *args, **kwargs)

    return locked


class TrtEngine:
    """Two engines, three execution contexts, and all memory that they will ever use.

    Attributes:
        lock: held by the thread that computes.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: contract.Manifest,
        *,
        caches: int = CACHES,
        auto_build: bool = False,
        trusted: Trusted | None = None,
        report: Report = lambda *_: None,
    ) -> None:
        """Loads the engines of a bundle that were built for this device.

        Args:
            caches: how many images and conversations can be held at a time; a conversation in a
                cache of fixed size shares that of its image.
            auto_build: build the engines first where none fits.
            trusted: whose signature makes an engine as good as one that was built here.
            report: called while they are built.

        Raises:
            DependencyError: no TensorRT, or no cuda-python.
            EngineError: no GPU, no engine that fits it, or not enough memory.
            ConfigError: less than one cache.
        """
        if type(caches) is not int or caches < 1:
            raise ConfigError(
                "caches is out of range", expected="a whole number from 1 up", found=repr(caches)
            )
        self.lock = threading.RLock()
        engines = engines_here(
            bundle, manifest, trusted=trusted, build=report if auto_build else None
        )
        sizes = engines.key.sizes
        self._config, decoder = manifest.config, manifest.config.decoder
        self._sizes, self._fixed = sizes, manifest.cache_slots is not None
        self._heads, self._head_dim = decoder.num_key_value_heads, decoder.head_dim
        self._past = contract.past_names(decoder.num_hidden_layers)
        self._present = contract.present_names(decoder.num_hidden_layers)

        cuda = Cuda()
        self._stream, self._vision_stream = cuda.stream(), cuda.stream()
        library = Library()
        vision = library.engine_from_plan(engines, engines.vision, bundle / contract.VISION_GRAPH)
        loaded = library.engine_from_plan(engines, engines.decoder, bundle / contract.DECODER_GRAPH)
        self._vision = Context(library, vision, PREFILL, self._vision_stream)
        self._prefill = Context(library, loaded, PREFILL, self._stream)
        self._decode = Context(library, loaded, DECODE, self._stream)

        size = manifest.config.vision.image_size
        self._pixels, self._uploaded = cuda.mirrored((1, 3, size, size), np.float32), cuda.event()
        row = -(-sizes.max_prompt * 8 // ALIGNMENT) * ALIGNMENT // 8
        # Token ids, position ids and the write index, a row each: one copy takes them all.
        self._tokens = cuda.mirrored((3, row), np.int64)
        self._logits = cuda.mirrored((1, decoder.vocab_size), np.float32)
        self._slot_bytes = self._head_dim * BYTES[manifest.dtype]  # of one head
        spare = 0 if self._fixed else 1  # what a growing step writes while it reads another
        buffer_size = sizes.max_cache * self._heads * self._slot_bytes
        self._pool = CachePool(cuda, caches + spare, len(self._past), buffer_size)
        self.unrecordable: EngineError | None = None  # why decode steps can't be recorded

    @_alone
    def encode(self, pixel_values: FloatArray) -> VisionKV:
        """[1, 3, H, W] -> per layer keys and values [1, Hkv, N, D]; returns before they are there.

        Raises:
            EngineError: no cache is free, or more than one image.
        """
        _require_one(len(pixel_values))
        lease, stream, context = self._pool.lease(), self._vision_stream, self._vision
        self._uploaded.synchronize()  # the image before has left the pinned memory
        self._pixels.host[...] = pixel_values
        with lease.set.on(stream):
            self._pixels.upload(stream)
            self._uploaded.record(stream)
            context.bind(contract.PIXEL_VALUES, self._pixels.address, pixel_values.shape)
            if self._fixed:
                self._bind_past(context, lease.set, self._sizes.max_cache)
            self._bind_present(context, lease.set)
            context.enqueue(stream)
        return VisionKV((lease,), self._config.image_slots, wait=lease.set.wait)

    @_alone
    def open(self, image: VisionKV | None) -> Cache:
        """A fresh cache whose first P + N slots are the image, or none.

        Raises:
            EngineError: no cache is free; or no image, for engines whose cache grows.
        """
        slots = image.slots if image else 0
        cache = Cache.after_image(self._config, (), slots, self._sizes.max_cache)
        if image is None:
            if not self._fixed:
                raise EngineError("engines whose cache grows begin with an image")
            cache.tensors = (self._pool.lease(),)
        elif not self._fixed or image.lend(cache):
            cache.tensors = image.tensors
        else:
            cache.tensors = (self._copied(image.tensors[0]),)
        return cache

    def prefill(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        """M tokens of a prompt [1, M] go into the cache; the logits [1, V] of the last come out.

        Raises:
            PromptError: the cache has less than M slots left; it is then unchanged.
            EngineError: no cache is free for what a growing one becomes, or more than one row.
        """
        return self._feed(input_ids, cache, self._prefill)

    def step(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        """M generated tokens [1, M] go into the cache; the logits [1, V] of the last come out.

        Raises:
            PromptError: the cache has less than M slots left; it is then unchanged.
            EngineError: no cache is free for what a growing one becomes, or more than one row.
        """
        one = input_ids.shape[1] == 1
        return self._feed(input_ids, cache, self._decode if one else self._prefill)

    @_alone
    def rewind(self, cache: Cache, count: int) -> None:
        """Forgets all text but the first `count` tokens.

        Raises:
            EngineError: no cache is free for what is left of a growing one.
        """
        if count == cache.text_length:
            return
        if not self._fixed:
            cache.move_to((self._first_slots(cache, cache.image_slots + count),))
        cache.rewind(count)

    @_alone
    def _feed(self, input_ids: IntArray, cache: Cache, context: Context) -> FloatArray:
        _require_one(len(input_ids))
        cache.require_room(input_ids.shape[1])
        for part in in_parts(input_ids, self._sizes.max_prompt):
            self._feed_part(part, cache, context)
        return self._logits.host.copy()

    def _feed_part(self, input_ids: IntArray, cache: Cache, context: Context) -> None:
        count = input_ids.shape[1]
        past: Lease = cache.tensors[0]
        present = past if self._fixed else self._pool.lease()
        ids, positions, write_index = self._tokens.host
        ids[:count] = input_ids[0]
        positions[:count] = cache.next_positions(1, count)[0]
        write_index[0] = cache.length
        slots = self._sizes.max_cache if self._fixed else cache.length
        may_record = self._fixed and context is self._decode
        recorded = past.set.decode if may_record else None
        with past.set.on(self._stream), present.set.on(self._stream):
            if recorded:
                self._stream.launch(recorded)
            else:
                self._bind(context, count, past.set, present.set, slots)
                self._enqueue(context)
        self._stream.synchronize()
        cache.advance((present,), count)
        if may_record and not recorded:
            past.set.decode = self._recorded()

    def _bind(
        self, context: Context, count: int, past: CacheSet, present: CacheSet, slots: int
    ) -> None:
        """Everything in its place, for so many tokens."""
        row = self._tokens.host.strides[0]
        context.bind(contract.INPUT_IDS, self._tokens.address, (1, count))
        context.bind(contract.POSITION_IDS, self._tokens.address + row, (1, count))
        if self._fixed:
            context.bind(contract.WRITE_INDICES, self._tokens.address + 2 * row, (1,))
        self._bind_past(context, past, slots)
        self._bind_present(context, present)
        context.bind(contract.LOGITS, self._logits.address)

    def _bind_past(self, context: Context, cache_set: CacheSet, slots: int) -> None:
        for name, address in zip(self._past, cache_set.addresses, strict=True):
            context.bind(name, address, (1, self._heads, slots, self._head_dim))

    def _bind_present(self, context: Context, cache_set: CacheSet) -> None:
        for name, address in zip(self._present, cache_set.addresses, strict=True):
            context.bind(name, address)

    def _enqueue(self, context: Context) -> None:
        """A whole step: what is known up, the engine, the logits down."""
        self._tokens.upload(self._stream)
        context.enqueue(self._stream)
        self._logits.download(self._stream)

    def _recorded(self) -> Graph | None:
        """The decode step that has just run, with its addresses; None where that can't be done.

        It has to have run once: what TensorRT does at the first run of a shape can't be recorded.
        """
        if self.unrecordable:
            return None
        try:
            with self._stream.recording() as recording:
                self._enqueue(self._decode)
        except EngineError as error:
            self.unrecordable = error
            return None
        return recording.graph

    def _copied(self, lease: Lease) -> Lease:
        """Another set with the same in it."""
        copy = self._pool.lease()
        with lease.set.on(self._stream), copy.set.on(self._stream):
            copy.set.copy_from(lease.set, self._stream)
        return copy

    def _first_slots(self, cache: Cache, length: int) -> Lease:
        """Another set, with the first `length` slots of a growing cache."""
        lease, copy = cache.tensors[0], self._pool.lease()
        slot = self._slot_bytes
        with lease.set.on(self._stream), copy.set.on(self._stream):
            copy.set.copy_first(
                lease.set, self._heads, length * slot, cache.length * slot, self._stream
            )
        return copy


def _require_one(batch: int) -> None:
    if batch != 1:
        raise EngineError(
            "engines take one image and one conversation at a time", expected="1", found=str(batch)
        )
