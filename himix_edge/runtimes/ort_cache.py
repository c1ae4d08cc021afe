"""The cache in ONNX Runtime's memory: one that grows, one of fixed size, or one with room."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from himix_edge.contract import WRITE_INDICES, Manifest, present_names
from himix_edge.errors import BundleError
from himix_edge.runtimes.base import IntArray, VisionKV
from himix_edge.runtimes.kvcache import Cache
from himix_edge.runtimes.providers import Provider, import_onnxruntime

Tensors = tuple[Any, ...]  # OrtValues: key and value of every layer
# As ONNX numbers them: numpy has no bfloat16.
ELEMENT_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}
USUAL_TEXT = 256  # tokens of a usual conversation: so much room is made for it at once


class Tensorkeeper(Protocol):
    """How past and present of a bundle's graphs are made and bound."""

    def empty(self, batch: int) -> Tensors:
        """The cache before any token, and without an image."""
        ...

    def before_image(self, batch: int) -> Tensors:
        """What an image is written into: the past of a vision graph that has one."""
        ...

    def after_image(self, image: VisionKV, cache: Cache) -> Tensors:
        """What a conversation about an image begins with."""
        ...

    def with_room(self, cache: Cache, count: int) -> Tensors:
        """The cache's tensors, or longer ones, such that `count` more tokens go in."""
        ...

    def first_slots(self, cache: Cache, length: int) -> Tensors:
        """What a conversation begins with that has its first `length` slots from another."""
        ...

    def rewound(self, cache: Cache, length: int) -> Tensors:
        """The cache's tensors when it goes on from its first `length` slots."""
        ...

    def inputs(self, cache: Cache, batch: int) -> dict[str, IntArray]:
        """What the decoder graph must be told of the cache."""
        ...

    def bind_present(self, binding: Any, past: Tensors) -> None:
        """Says where a graph's present goes."""
        ...

    def present(self, binding: Any, past: Tensors) -> Tensors:
        """The cache after a run."""
        ...


class GrowingTensors:
    """A step returns longer tensors and never writes to its past.

    So any number of conversations may begin with one image's tensors.
    """

    def __init__(self, manifest: Manifest, provider: Provider) -> None:
        decoder = manifest.config.decoder
        self._shape = (decoder.num_key_value_heads, 0, decoder.head_dim)
        self._type = ELEMENT_TYPES[manifest.dtype]
        self._memory = provider.memory
        self._present = present_names(decoder.num_hidden_layers)

    def empty(self, batch: int) -> Tensors:
        """[B, Hkv, 0, D] each."""
        value = import_onnxruntime().OrtValue.ortvalue_from_shape_and_type
        shape = (batch, *self._shape)
        return tuple(value(shape, self._type, *self._memory) for _ in self._present)

    def before_image(self, batch: int) -> Tensors:
        """Nothing."""
        return ()

    def after_image(self, image: VisionKV, cache: Cache) -> Tensors:
        """The image's own tensors."""
        return image.tensors

    def with_room(self, cache: Cache, count: int) -> Tensors:
        """What there is: a step makes longer ones by itself."""
        return cache.tensors

    def first_slots(self, cache: Cache, length: int) -> Tensors:
        """Copies of those slots."""
        value = import_onnxruntime().OrtValue.ortvalue_from_numpy
        arrays = (tensor.numpy()[:, :, :length].copy() for tensor in cache.tensors)
        return tuple(value(array, *self._memory) for array in arrays)

    def rewound(self, cache: Cache, length: int) -> Tensors:
        """Copies, as the tensors' shape says how many slots are filled."""
        return self.first_slots(cache, length)

    def inputs(self, cache: Cache, batch: int) -> dict[str, IntArray]:
        """Nothing: the tensors' shapes say it all."""
        return {}

    def bind_present(self, binding: Any, past: Tensors) -> None:
        """ONNX Runtime makes them, where the cache is kept."""
        for name in self._present:
            binding.bind_output(name, *self._memory)

    def present(self, binding: Any, past: Tensors) -> Tensors:
        """The outputs, of which those that `bind_present` bound come first."""
        return tuple(binding.get_outputs()[: len(self._present)])


class _InPlace:
    """Past and present are one buffer [B, Hkv, S, D], in which a step writes only its own slots."""

    def __init__(self, manifest: Manifest, provider: Provider) -> None:
        if manifest.dtype == "bfloat16":
            raise BundleError(
                "ONNX Runtime can't keep a cache that is written in place in bfloat16",
                expected="float32 or float16",
                found="bfloat16",
                fix="export it again with --dtype float16",
            )
        decoder = manifest.config.decoder
        self._heads, self._head_dim = decoder.num_key_value_heads, decoder.head_dim
        self._dtype = np.dtype(manifest.dtype)
        self._memory = provider.memory
        self._present = present_names(decoder.num_hidden_layers)

    def rewound(self, cache: Cache, length: int) -> Tensors:
        """What there is: what stands in the slots after these doesn't matter."""
        return cache.tensors

    def inputs(self, cache: Cache, batch: int) -> dict[str, IntArray]:
        """The slot [B] that the next token goes into."""
        return {WRITE_INDICES: np.full(batch, cache.length, np.int64)}

    def bind_present(self, binding: Any, past: Tensors) -> None:
        """In place."""
        for name, value in zip(self._present, past, strict=True):
            binding.bind_ortvalue_output(name, value)

    def present(self, binding: Any, past: Tensors) -> Tensors:
        """The past: the outputs are views of it, and don't keep it alive."""
        return past

    def _value(self, array: Any) -> Any:
        return import_onnxruntime().OrtValue.ortvalue_from_numpy(array, *self._memory)


class FixedTensors(_InPlace):
    """As many slots as the graph says, both graphs writing into them.

    One conversation goes on in the image's buffers, any others in copies.
    """

    def __init__(self, manifest: Manifest, provider: Provider, slots: int) -> None:
        super().__init__(manifest, provider)
        self._slots = slots

    def empty(self, batch: int) -> Tensors:
        """[B, Hkv, S, D] each, of zeros.

        Not of what the memory held: what is no number stays none, even where it counts for nothing.
        """
        shape = (batch, self._heads, self._slots, self._head_dim)
        return tuple(self._value(np.zeros(shape, self._dtype)) for _ in self._present)

    def before_image(self, batch: int) -> Tensors:
        """Buffers that become the image's."""
        return self.empty(batch)

    def after_image(self, image: VisionKV, cache: Cache) -> Tensors:
        """The image's own buffers, or copies where another conversation goes on in them."""
        if image.lend(cache):
            return image.tensors
        return self._copies(image.tensors)

    def with_room(self, cache: Cache, count: int) -> Tensors:
        """What there is: the engine has checked that they fit."""
        return cache.tensors

    def first_slots(self, cache: Cache, length: int) -> Tensors:
        """Copies of all slots: what stands in the others doesn't matter."""
        return self._copies(cache.tensors)

    def _copies(self, tensors: Tensors) -> Tensors:
        return tuple(self._value(tensor.numpy().copy()) for tensor in tensors)


class RoomyTensors(_InPlace):
    """As many slots as a conversation needs: more are made where it outgrows them.

    The decoder graph looks at filled slots only, so what stands in the others doesn't matter.
    """

    def __init__(self, manifest: Manifest, provider: Provider) -> None:
        super().__init__(manifest, provider)
        self._image_slots = manifest.config.image_slots

    def empty(self, batch: int) -> Tensors:
        """[B, Hkv, S, D] each."""
        return self._roomy((), 0, batch, USUAL_TEXT)

    def before_image(self, batch: int) -> Tensors:
        """Tensors [B, Hkv, P + N, D] of its own, which no conversation writes to."""
        return self._roomy((), 0, batch, self._image_slots)

    def after_image(self, image: VisionKV, cache: Cache) -> Tensors:
        """Copies of the image's tensors, with room for text."""
        return self._begun(image.tensors, image.slots, cache.capacity)

    def with_room(self, cache: Cache, count: int) -> Tensors:
        """What there is, or copies at least twice as long, up to the model's positions."""
        batch, _, slots, _ = cache.tensors[0].shape()
        needed = cache.length + count
        if needed <= slots:
            return cache.tensors
        slots = min(max(2 * slots, needed), cache.capacity)
        return self._roomy(cache.tensors, cache.length, batch, slots)

    def first_slots(self, cache: Cache, length: int) -> Tensors:
        """Copies of those slots, with room for more."""
        return self._begun(cache.tensors, length, cache.capacity)

    def _begun(self, tensors: Tensors, filled: int, capacity: int) -> Tensors:
        batch = tensors[0].shape()[0]
        return self._roomy(tensors, filled, batch, min(filled + USUAL_TEXT, capacity))

    def _roomy(self, tensors: Tensors, filled: int, batch: int, slots: int) -> Tensors:
        """Buffers of so many slots; the first `filled` of them are those of the tensors."""
        # One allocation for all of them, which the system can map in large pages.
        shape = (len(self._present), batch, self._heads, slots, self._head_dim)
        buffers = np.empty(shape, self._dtype)
        for buffer, tensor in zip(buffers, tensors, strict=bool(tensors)):
            buffer[:, :, :filled] = tensor.numpy()[:, :, :filled]
        return tuple(self._value(buffer) for buffer in buffers)


def tensorkeeper(manifest: Manifest, provider: Provider) -> Tensorkeeper:
    """Which of the three a bundle's graphs are made for.

    Raises:
        BundleError: a type that ONNX Runtime can't keep the cache in.
    """
    if manifest.dialect == "ort":
        return RoomyTensors(manifest, provider)
    if manifest.cache_slots is None:
        return GrowingTensors(manifest, provider)
    return FixedTensors(manifest, provider, manifest.cache_slots)
