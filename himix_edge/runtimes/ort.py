"""ONNX Runtime: on a CPU, or on a GPU by one of its providers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from himix_edge import contract
from himix_edge.engines.profiles import decoder_profiles, vision_profile
from himix_edge.engines.store import Engines
from himix_edge.errors import BundleError, ConfigError
from himix_edge.runtimes.base import FloatArray, IntArray, VisionKV, in_parts
from himix_edge.runtimes.kvcache import Cache
from himix_edge.runtimes.ort_cache import Tensors, tensorkeeper
from himix_edge.runtimes.providers import CPU, Provider, import_onnxruntime, open_session

Shape = tuple[int | None, ...]  # None where the contract leaves a dimension open
Nodes = dict[str, tuple[str, Shape]]  # dtype and shape of a graph's inputs or outputs, by name
TENSOR_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int64": "tensor(int64)",
}
PREFILL, DECODE = "0", "1"  # the order in which engines have their profiles


class OrtEngine:
    """Two sessions; the cache stays in ONNX Runtime's memory from one step to the next."""

    def __init__(
        self,
        bundle: Path,
        manifest: contract.Manifest,
        threads: int | None = None,
        provider: Provider = CPU,
        compiled: Engines | None = None,
    ) -> None:
        """Opens the graphs of a bundle.

        Args:
            threads: within one operator; None leaves it to ONNX Runtime, which takes all cores.
            provider: where to compute, and keep the cache.
            compiled: engines to open in the place of the graphs.

        Raises:
            DependencyError: no onnxruntime, or a provider that it hasn't got.
            BundleError: a graph that can't be opened, or that doesn't keep the contract.
            ConfigError: threads below 1.
        """
        self._ort = import_onnxruntime()
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ConfigError(
                "threads is out of range", expected="a whole number from 1 up", found=repr(threads)
            )
        if provider.on_cpu and manifest.dtype == "bfloat16":
            raise BundleError(
                f"ONNX Runtime on a CPU can't run {bundle}",
                expected="float32 or float16",
                found="bfloat16",
                fix="export it again with --dtype float32",
            )
        self._threads = threads
        self._config = config = manifest.config
        self._keeper = tensorkeeper(manifest, provider)
        sizes = compiled.key.sizes if compiled else provider.sizes(manifest)
        self._most_slots = sizes.max_cache if sizes else manifest.cache_slots
        self._most_tokens = sizes.max_prompt if sizes else config.max_text_tokens
        self._profile_entry = provider.profile_entry if compiled else None
        self._past = contract.past_names(config.decoder.num_hidden_layers)
        graphs = bundle / contract.VISION_GRAPH, bundle / contract.DECODER_GRAPH
        providers = provider, provider
        if compiled:
            graphs = compiled.vision, compiled.decoder
        elif sizes:
            prefill, _ = decoder_profiles(manifest, sizes)
            providers = provider.shaped(vision_profile(manifest)), provider.shaped(prefill)
        nodes = _vision_nodes(manifest), _decoder_nodes(manifest)
        self._vision, self._decoder = map(self._session, graphs, providers, nodes)

    def encode(self, pixel_values: FloatArray) -> VisionKV:
        """[B, 3, H, W] -> per layer keys and values [B, Hkv, N, D]"""
        past = self._keeper.before_image(len(pixel_values))
        inputs = {contract.PIXEL_VALUES: pixel_values}
        _, present = self._run(self._vision, PREFILL, inputs, past, [])
        return VisionKV(present, self._config.vision.num_image_tokens)

    def open(self, image: VisionKV | None) -> Cache:
        """A fresh cache whose first N slots are the image, or none."""
        slots = image.slots if image else 0
        cache = Cache.after_image(self._config, (), slots, self._most_slots)
        keeper = self._keeper
        cache.tensors = keeper.after_image(image, cache) if image else keeper.empty(batch=1)
        return cache

    def step(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        """M tokens [B, M] go into the cache; the logits [B, V] of the last of them come out."""
        cache.require_room(input_ids.shape[1])
        for part in in_parts(input_ids, self._most_tokens):
            logits = self._step(part, cache)
        return logits

    def _step(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        batch, count = input_ids.shape
        inputs = {
            contract.INPUT_IDS: input_ids,
            contract.POSITION_IDS: cache.next_positions(batch, count),
            **self._keeper.inputs(cache, batch),
        }
        profile = DECODE if count == 1 else PREFILL
        outputs = [contract.LOGITS]
        (logits,), present = self._run(self._decoder, profile, inputs, cache.tensors, outputs)
        cache.advance(present, count)
        last: FloatArray = logits.numpy()[:, 0]
        return last

    def _run(
        self,
        session: Any,
        profile: str,
        inputs: dict[str, Any],
        past: Tensors,
        outputs: list[str],
    ) -> tuple[list[Any], Tensors]:
        """Runs a graph over a cache -> outputs in the host's memory, and the cache after it."""
        binding = session.io_binding()
        for name, array in inputs.items():
            value = self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            binding.bind_ortvalue_input(name, value)
        for name, value in zip(self._past[: len(past)], past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name)
        self._keeper.bind_present(binding, past)
        options = None
        if self._profile_entry is not None:
            options = self._ort.RunOptions()
            options.add_run_config_entry(self._profile_entry, profile)
        session.run_with_iobinding(binding, options)
        values = binding.get_outputs()
        return values[: len(outputs)], self._keeper.present(tuple(values[len(outputs) :]), past)

    def _session(self, path: Path, provider: Provider, nodes: tuple[Nodes, Nodes]) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors; its warnings are of no use to who runs a bundle
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        session = open_session(provider, path, options)
        inputs, outputs = nodes
        _check_contract(path, "inputs", inputs, session.get_inputs())
        _check_contract(path, "outputs", outputs, session.get_outputs())
        return session


def _vision_nodes(manifest: contract.Manifest) -> tuple[Nodes, Nodes]:
    """Inputs and outputs of the vision graph by the contract."""
    size = manifest.config.vision.image_size
    inputs: Nodes = {contract.PIXEL_VALUES: ("float32", (None, 3, size, size))}
    layers = manifest.config.decoder.num_hidden_layers
    slots = manifest.cache_slots
    if slots is not None:
        inputs |= _cache_nodes(manifest, contract.past_names(layers), slots)
    written = slots or manifest.config.vision.num_image_tokens
    return inputs, _cache_nodes(manifest, contract.present_names(layers), written)


def _decoder_nodes(manifest: contract.Manifest) -> tuple[Nodes, Nodes]:
    """Inputs and outputs of the decoder graph by the contract."""
    decoder, slots = manifest.config.decoder, manifest.cache_slots
    layers = decoder.num_hidden_layers
    inputs: Nodes = dict.fromkeys(
        (contract.INPUT_IDS, contract.POSITION_IDS), ("int64", (None, None))
    )
    if slots is not None:
        inputs[contract.WRITE_INDICES] = ("int64", (None,))
    outputs: Nodes = {contract.LOGITS: ("float32", (None, 1, decoder.vocab_size))}
    return (
        inputs | _cache_nodes(manifest, contract.past_names(layers), slots),
        outputs | _cache_nodes(manifest, contract.present_names(layers), slots),
    )


def _cache_nodes(manifest: contract.Manifest, names: list[str], slots: int | None) -> Nodes:
    decoder = manifest.config.decoder
    shape = (None, decoder.num_key_value_heads, slots, decoder.head_dim)
    return dict.fromkeys(names, (manifest.dtype, shape))


def _check_contract(path: Path, side: str, expected: Nodes, nodes: Sequence[Any]) -> None:
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
