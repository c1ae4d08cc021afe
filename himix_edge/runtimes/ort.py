"""ONNX Runtime: on a CPU, or on a GPU by one of its providers."""

from __future__ import annotations

import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from himix_edge import contract
from himix_edge.bundle.files import BundleFiles
from himix_edge.engines.profiles import decoder_profiles, vision_profile
from himix_edge.engines.store import Engines
from himix_edge.errors import BundleError
from himix_edge.runtimes.base import FloatArray, IntArray, VisionKV, in_parts
from himix_edge.runtimes.kvcache import Cache
from himix_edge.runtimes.ort_cache import Tensors, tensorkeeper
from himix_edge.runtimes.ort_contract import Nodes, check_nodes, decoder_nodes, vision_nodes
from himix_edge.runtimes.providers import (
    CPU,
    Provider,
    import_onnxruntime,
    open_graph,
    open_session,
)
from himix_edge.runtimes.threads import checked_threads

PREFILL, DECODE = "0", "1"  # the order in which engines have their profiles


class OrtEngine:
    """Two sessions; the cache stays where it is from one step to the next, and so does its binding.

    A third one, where the bundle has a second copy of the decoder for prompts.

    Attributes:
        branches: whether `branch` is worth its copies: it is where the memory is the host's.
    """

    def __init__(
        self,
        files: BundleFiles,
        threads: int | None = None,
        provider: Provider = CPU,
        compiled: Engines | None = None,
    ) -> None:
        """Opens the graphs of a bundle.

        Args:
            files: the bundle's; they may be closed afterwards.
            threads: within one operator; None leaves it to ONNX Runtime, which takes all cores.
            provider: where to compute, and keep the cache.
            compiled: engines to open in the place of the graphs.

        Raises:
            DependencyError: no onnxruntime, or a provider that it hasn't got.
            BundleError: a graph that can't be opened, or that doesn't keep the contract.
            EngineError: an engine that is damaged, or names a file that is not of its record.
            OutputError: no room for a copy of the engines, which is what the provider opens.
            ConfigError: threads below 1, or far more than cores.
        """
        self._ort = import_onnxruntime()
        bundle, manifest = files.path, files.manifest
        if provider.on_cpu and manifest.dtype == "bfloat16":
            raise BundleError(
                f"ONNX Runtime on a CPU can't run {bundle}",
                expected="float32 or float16",
                found="bfloat16",
                fix="export it again with --dtype float32",
            )
        self.branches = provider.on_cpu
        self._threads = checked_threads(threads)
        self._config = config = manifest.config
        self._keeper = tensorkeeper(manifest, provider)
        sizes = compiled.key.sizes if compiled else provider.sizes(manifest)
        self._most_slots = sizes.max_cache if sizes else manifest.cache_slots
        self._most_tokens = sizes.max_prompt if sizes else config.max_text_tokens
        # GroupQueryAttention takes many tokens of one conversation, or one token of many.
        self._most_of_several = 1 if manifest.dialect == "ort" else self._most_tokens
        self._profile_entry = provider.profile_entry if compiled else None
        self._past = contract.past_names(config.decoder.num_hidden_layers)
        self._vision_past = [] if manifest.cache_slots is None else self._past
        graphs = [bundle / contract.VISION_GRAPH, bundle / contract.DECODER_GRAPH]
        if contract.PREFILL_GRAPH in manifest.files:
            graphs.append(bundle / contract.PREFILL_GRAPH)
        providers = [provider] * len(graphs)
        if sizes and not compiled:
            prefill, _ = decoder_profiles(manifest, sizes)
            providers = [provider.shaped(vision_profile(manifest)), provider.shaped(prefill)]
        nodes = [vision_nodes(manifest), *[decoder_nodes(manifest)] * (len(graphs) - 1)]
        with contextlib.ExitStack() as stack:
            if compiled:  # what was checked must be what the provider opens
                copies = stack.enter_context(compiled.copied())
                graphs = [copies.vision, copies.decoder]
            # Most of the time goes into laying weights out anew, which a session does on one core.
            pool = stack.enter_context(ThreadPoolExecutor(2 if provider.on_cpu else 1))
            opened_of = None if compiled else files
            sessions = list(pool.map(self._session, graphs, providers, nodes, [opened_of] * 3))
        self._vision, self._decoder, *prompts = sessions
        self._prompts = prompts[0] if prompts else self._decoder

    def encode(self, pixel_values: FloatArray) -> VisionKV:
        """[B, 3, H, W] -> per layer keys and values [B, Hkv, P + N, D]"""
        past = self._keeper.before_image(len(pixel_values))
        binding = self._binding(self._vision, self._vision_past, past)
        pixels = np.ascontiguousarray(pixel_values)  # a binding does not keep it alive
        self._bind_inputs(binding, {contract.PIXEL_VALUES: pixels})
        self._run(self._vision, PREFILL, binding)
        return VisionKV(self._keeper.present(binding, past), self._config.image_slots)

    def open(self, image: VisionKV | None) -> Cache:
        """A fresh cache whose first P + N slots are the image, or none."""
        slots = image.slots if image else 0
        cache = Cache.after_image(self._config, (), slots, self._most_slots)
        keeper = self._keeper
        cache.tensors = keeper.after_image(image, cache) if image else keeper.empty(batch=1)
        return cache

    def branch(self, cache: Cache, count: int) -> Cache:
        """A fresh cache that begins as another: with its image and first `count` text tokens."""
        length = cache.image_slots + count
        tensors = self._keeper.first_slots(cache, length)
        begun = dataclasses.replace(cache, tensors=tensors, binding=None)
        begun.rewind(count)
        return begun

    def rewind(self, cache: Cache, count: int) -> None:
        """Forgets all text but the first `count` tokens."""
        if count < cache.text_length:
            cache.move_to(self._keeper.rewound(cache, cache.image_slots + count))
            cache.rewind(count)

    def prefill(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        """M tokens of a prompt [B, M] go into the cache; the logits [B, V] of the last come out."""
        return self._feed(input_ids, cache, self._prompts, PREFILL)

    def step(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        """M generated tokens [B, M] go into the cache; the logits [B, V] of the last come out."""
        profile = DECODE if input_ids.shape[1] == 1 else PREFILL
        return self._feed(input_ids, cache, self._decoder, profile)

    def _feed(self, input_ids: IntArray, cache: Cache, session: Any, profile: str) -> FloatArray:
        cache.require_room(input_ids.shape[1])
        most = self._most_tokens if len(input_ids) == 1 else self._most_of_several
        for part in in_parts(input_ids, most):
            logits = self._feed_part(part, cache, session, profile)
        return logits

    def _feed_part(
        self, input_ids: IntArray, cache: Cache, session: Any, profile: str
    ) -> FloatArray:
        batch, count = input_ids.shape
        cache.move_to(self._keeper.with_room(cache, count))
        binding, past = self._bound(session, cache), cache.tensors
        inputs = {
            contract.INPUT_IDS: np.ascontiguousarray(input_ids),
            contract.POSITION_IDS: cache.next_positions(batch, count),
            **self._keeper.inputs(cache, batch),
        }
        self._bind_inputs(binding, inputs)
        logits = np.empty((batch, 1, self._config.decoder.vocab_size), np.float32)
        binding.bind_ortvalue_output(contract.LOGITS, self._value(logits))
        self._run(session, profile, binding)
        present = self._keeper.present(binding, past)
        cache.advance(present, count, reusable=session is self._prompts)
        return logits[:, 0]

    def _bound(self, session: Any, cache: Cache) -> Any:
        """A session's binding to the cache; the decoder's is kept for its next step."""
        if session is not self._decoder:
            return self._binding(session, self._past, cache.tensors)
        if cache.binding is None:
            cache.binding = self._binding(session, self._past, cache.tensors)
        return cache.binding

    def _binding(self, session: Any, names: list[str], past: Tensors) -> Any:
        """A session's binding with the cache in its place, its past under these names."""
        binding = session.io_binding()
        for name, value in zip(names, past, strict=bool(names)):
            binding.bind_ortvalue_input(name, value)
        self._keeper.bind_present(binding, past)
        return binding

    def _bind_inputs(self, binding: Any, inputs: dict[str, Any]) -> None:
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, self._value(array))

    def _value(self, array: Any) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array)

    def _run(self, session: Any, profile: str, binding: Any) -> None:
        options = None
        if self._profile_entry is not None:
            options = self._ort.RunOptions()
            options.add_run_config_entry(self._profile_entry, profile)
        session.run_with_iobinding(binding, options)

    def _session(
        self,
        path: Path,
        provider: Provider,
        nodes: tuple[Nodes, Nodes],
        files: BundleFiles | None,
    ) -> Any:
        """A graph of the bundle; where there are no files of it, an engine of its own."""
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors; its warnings are of no use to who runs a bundle
        # Idle workers wait for work in a loop, for milliseconds: one session's would take a core
        # from the other's. With this they end it with the run.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if files is None:
            session = open_session(provider, path, options)
        else:
            session = open_graph(provider, files, path.name, options)
        inputs, outputs = nodes
        check_nodes(path, "inputs", inputs, session.get_inputs())
        check_nodes(path, "outputs", outputs, session.get_outputs())
        return session
