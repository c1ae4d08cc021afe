"""ONNX Runtime on the CPU, for bundles of the portable dialect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from himix_edge import contract
from himix_edge.errors import BundleError, ConfigError, DependencyError
from himix_edge.runtimes.base import FloatArray, IntArray, VisionKV
from himix_edge.runtimes.kvcache import Cache

Shape = tuple[int | None, ...]  # None where the contract leaves a dimension open
TENSOR_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int64": "tensor(int64)",
}


class OrtEngine:
    """Two sessions; the cache stays in ONNX Runtime's memory from one step to the next.

    A step's inputs are never written to, so many caches may begin with one image's tensors.
    """

    def __init__(
        self, bundle: Path, manifest: contract.Manifest, threads: int | None = None
    ) -> None:
        """Opens the graphs of a bundle.

        Args:
            threads: within one operator; None leaves it to ONNX Runtime, which takes all cores.

        Raises:
            DependencyError: no onnxruntime.
            BundleError: a graph that can't be opened, or that doesn't keep the contract.
            ConfigError: threads below 1.
        """
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ImportError as error:
            raise DependencyError(
                "ONNX Runtime is missing", fix="pip install onnxruntime"
            ) from error
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ConfigError(
                "threads is out of range", expected="a whole number from 1 up", found=repr(threads)
            )
        if manifest.dtype == "bfloat16":
            raise BundleError(
                f"ONNX Runtime on a CPU can't run {bundle}",
                expected="float32 or float16",
                found="bfloat16",
                fix="export it again with --dtype float32",
            )
        self._ort = onnxruntime
        self._cache_type = np.dtype(manifest.dtype)
        self._config = config = manifest.config
        decoder = config.decoder
        layers, slots = decoder.num_hidden_layers, config.vision.num_image_tokens
        size = config.vision.image_size
        self._past, self._present = contract.past_names(layers), contract.present_names(layers)

        def kv(names: list[str], length: int | None) -> dict[str, tuple[str, Shape]]:
            shape = (None, decoder.num_key_value_heads, length, decoder.head_dim)
            return dict.fromkeys(names, (manifest.dtype, shape))

        self._vision = self._session(
            bundle / contract.VISION_GRAPH,
            threads,
            inputs={contract.PIXEL_VALUES: ("float32", (None, 3, size, size))},
            outputs=kv(self._present, slots),
        )
        self._decoder = self._session(
            bundle / contract.DECODER_GRAPH,
            threads,
            inputs={
                contract.INPUT_IDS: ("int64", (None, None)),
                contract.POSITION_IDS: ("int64", (None, None)),
                **kv(self._past, None),
            },
            outputs={
                contract.LOGITS: ("float32", (None, 1, decoder.vocab_size)),
                **kv(self._present, None),
            },
        )

    def encode(self, pixel_values: FloatArray) -> VisionKV:
        """[B, 3, H, W] -> per layer keys and values [B, Hkv, N, D]"""
        tensors = self._vision.run_with_ort_values(
            self._present, {contract.PIXEL_VALUES: self._value(pixel_values)}
        )
        return VisionKV(tuple(tensors), self._config.vision.num_image_tokens)

    def open(self, image: VisionKV | None) -> Cache:
        """A fresh cache whose first N slots are the image, or none."""
        image = image or self._no_image()
        return Cache.after_image(self._config, image.tensors, image.slots)

    def step(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        """M tokens [B, M] go into the cache; the logits [B, V] of the last of them come out."""
        batch, count = input_ids.shape
        inputs = {
            contract.INPUT_IDS: self._value(input_ids),
            contract.POSITION_IDS: self._value(cache.next_positions(batch, count)),
            **dict(zip(self._past, cache.tensors, strict=True)),
        }
        logits, *present = self._decoder.run_with_ort_values(
            [contract.LOGITS, *self._present], inputs
        )
        cache.advance(tuple(present), count)
        last: FloatArray = logits.numpy()[:, 0]
        return last

    def _no_image(self) -> VisionKV:
        decoder = self._config.decoder
        empty = np.zeros((1, decoder.num_key_value_heads, 0, decoder.head_dim), self._cache_type)
        return VisionKV(tuple(self._value(empty) for _ in self._past), slots=0)

    def _value(self, array: FloatArray | IntArray) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def _session(
        self,
        path: Path,
        threads: int | None,
        inputs: dict[str, tuple[str, Shape]],
        outputs: dict[str, tuple[str, Shape]],
    ) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors; its warnings are of no use to who runs a bundle
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            session = self._ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its own exceptions share no other base
            raise BundleError(
                f"ONNX Runtime cannot open {path}",
                found=next(iter(str(error).splitlines()), type(error).__name__),
                fix="copy the bundle again, or export it again with: himix-edge export",
            ) from error
        _check_contract(path, "inputs", inputs, session.get_inputs())
        _check_contract(path, "outputs", outputs, session.get_outputs())
        return session


def _check_contract(
    path: Path, side: str, expected: dict[str, tuple[str, Shape]], nodes: Sequence[Any]
) -> None:
    """Names, dtypes and fixed dimensions of a graph's inputs or outputs, all misfits at once."""
    found = {node.name: node for node in nodes}
    misfits = [f"no {name}" for name in expected if name not in found]
    misfits += [f"an unknown {name}" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        dtype, shape = expected[name]
        node = found[name]
        if node.type != TENSOR_TYPES[dtype] or not _fits(node.shape, shape):
            misfits.append(f"{name} as {node.type} {node.shape}")
    if misfits:
        wanted = ", ".join(f"{name} {dtype} {_shown(s)}" for name, (dtype, s) in expected.items())
        raise BundleError(
            f"the {side} of {path} are not the contract's",
            expected=wanted if len(expected) <= 4 else f"{len(expected)} like {wanted[:120]}...",
            found="; ".join(sorted(misfits)[:4]),
            fix="export the bundle again with: himix-edge export",
        )


def _fits(found: Sequence[object], expected: Shape) -> bool:
    """Whether each dimension that both sides fix is the same on both."""
    return len(found) == len(expected) and all(
        not isinstance(there, int) or here is None or there == here
        for there, here in zip(found, expected, strict=True)
    )


def _shown(shape: Shape) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
