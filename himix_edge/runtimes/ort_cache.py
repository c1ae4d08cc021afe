"""The cache in ONNX Runtime's memory: one that grows, or one of fixed size."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from himix_edge.contract import WRITE_INDICES, Manifest, past_names, present_names
from himix_edge.errors import BundleError
from himix_edge.runtimes.base import IntArray, VisionKV
from himix_edge.runtimes.kvcache import Cache
from himix_edge.runtimes.providers import Provider, import_onnxruntime

Tensors = tuple[Any, ...]  # OrtValues: key and value of every layer
# As ONNX numbers them: numpy has no bfloat16.
ELEMENT_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}


class Tensorkeeper(Protocol):
    """How past and present of a bundle's graphs are made and bound."""

    def empty(self, batch: int) -> Tensors:
        """The cache before any token, and without an image."""
        ...

    def before_image(self, batch: int) -> Tensors:
        """What the vision graph takes as its past."""
        ...

    def after_image(self, image: VisionKV, cache: Cache) -> Tensors:
        """What a conversation about an image begins with."""
        ...

    def inputs(self, cache: Cache, batch: int) -> dict[str, IntArray]:
        """What the decoder graph must be told of the cache."""
        ...

    def bind_present(self, binding: Any, past: Tensors) -> None:
        """Says where a graph's present goes."""
        ...

    def present(self, outputs: Tensors, past: Tensors) -> Tensors:
        """The cache after a run, given what ONNX Runtime calls its outputs."""
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

    def inputs(self, cache: Cache, batch: int) -> dict[str, IntArray]:
        """Nothing: the tensors' shapes say it all."""
        return {}

    def bind_present(self, binding: Any, past: Tensors) -> None:
        """ONNX Runtime makes them, where the cache is kept."""
        for name in self._present:
            binding.bind_output(name, *self._memory)

    def present(self, outputs: Tensors, past: Tensors) -> Tensors:
        """The outputs."""
        return outputs


class FixedTensors:
    """Past and present are one buffer of S slots, in which a step writes no more than its own.

    One conversation goes on in the image's buffers, any others in copies.
    """

    def __init__(self, manifest: Manifest, provider: Provider, slots: int) -> None:
        if manifest.dtype == "bfloat16":
            raise BundleError(
                "ONNX Runtime can't keep a cache of fixed size in bfloat16",
                expected="float32 or float16",
                found="bfloat16",
                fix="export it again with --dtype float16",
            )
        decoder = manifest.config.decoder
        self._shape = (decoder.num_key_value_heads, slots, decoder.head_dim)
        self._dtype = np.dtype(manifest.dtype)
        self._memory = provider.memory
        self._past = past_names(decoder.num_hidden_layers)
        self._present = present_names(decoder.num_hidden_layers)

    def empty(self, batch: int) -> Tensors:
        """[B, Hkv, S, D] each, of zeros.

        Not of what the memory held: what is no number stays none, even where it counts for nothing.
        """
        return tuple(self._value(np.zeros((batch, *self._shape), self._dtype)) for _ in self._past)

    def before_image(self, batch: int) -> Tensors:
        """Buffers that become the image's."""
        return self.empty(batch)

    def after_image(self, image: VisionKV, cache: Cache) -> Tensors:
        """The image's own buffers, or copies where another conversation goes on in them."""
        if image.lend(cache):
            return image.tensors
        return tuple(self._value(tensor.numpy().copy()) for tensor in image.tensors)

    def inputs(self, cache: Cache, batch: int) -> dict[str, IntArray]:
        """The slot [B] that the next token goes into."""
        return {WRITE_INDICES: np.full(batch, cache.length, np.int64)}

    def bind_present(self, binding: Any, past: Tensors) -> None:
        """In place."""
        for name, value in zip(self._present, past, strict=True):
            binding.bind_ortvalue_output(name, value)

    def present(self, outputs: Tensors, past: Tensors) -> Tensors:
        """The past: the outputs are views of it, and don't keep it alive."""
        return past

    def _value(self, array: Any) -> Any:
        return import_onnxruntime().OrtValue.ortvalue_from_numpy(array, *self._memory)


def tensorkeeper(manifest: Manifest, provider: Provider) -> Tensorkeeper:
    """Which of the two a bundle's graphs are made for.

    Raises:
        BundleError: a type that ONNX Runtime can't keep the cache in.
    """
    if manifest.cache_slots is None:
        return GrowingTensors(manifest, provider)
    return FixedTensors(manifest, provider, manifest.cache_slots)
