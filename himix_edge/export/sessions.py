"""Finished graphs in ONNX Runtime, by the contract alone: what is checked and measured with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir

from himix_edge.config import HiMixConfig
from himix_edge.contract import (
    INPUT_IDS,
    LOGITS,
    PIXEL_VALUES,
    POSITION_IDS,
    WRITE_INDICES,
    past_names,
    present_names,
)
from himix_edge.errors import ExportError
from himix_edge.export.expected import Array
from himix_edge.runtimes.providers import import_onnxruntime

onnxruntime = import_onnxruntime()

# What the slots of a cache hold that nothing was written into: a graph that looks at them shows it.
UNWRITTEN = 3.0
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# S, where a graph's cache has a fixed size; "any" where whoever runs it chooses; None where it
# grows, or there is no cache.
CacheSlots: TypeAlias = int | Literal["any"] | None
Opener: TypeAlias = Callable[[Path], Any]  # a graph's file -> an InferenceSession


def lean_session(path: Path) -> Any:
    """A float graph in as little memory as it takes.

    A second copy of the weights, laid out for speed, is not worth its memory for a few tokens.

    Raises:
        ExportError: ONNX Runtime can't run it.
    """
    return _session(path, {"session.disable_prepacking": "1"})


def packed_session(path: Path) -> Any:
    """As a device opens it: quantized kernels need their weights packed beforehand.

    Raises:
        ExportError: ONNX Runtime can't run it.
    """
    return _session(path, {})


def changed_session(path: Path, change: Callable[[onnx_ir.Model], None], *, packed: bool) -> Any:
    """A graph that is changed in memory; its weights stay in their file.

    Args:
        packed: as `packed_session` opens it, or as `lean_session` does.

    Raises:
        ExportError: ONNX Runtime can't run it.
    """
    graph = onnx_ir.load(path)
    change(graph)
    entries = {"session.model_external_initializers_file_folder_path": str(path.parent)}
    if not packed:
        entries["session.disable_prepacking"] = "1"
    return _session(path, entries, onnx_ir.to_proto(graph).SerializeToString())


def _session(path: Path, entries: dict[str, str], graph: bytes | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; they are raised as well
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    try:
        return onnxruntime.InferenceSession(
            path if graph is None else graph, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's have no common base
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"ONNX Runtime can't run {path.name}", found=reason) from error


class VisionSession:
    """A vision graph in ONNX Runtime, by the contract alone."""

    def __init__(
        self, path: Path, config: HiMixConfig, open_session: Opener = lean_session
    ) -> None:
        self.config = config
        self.names = present_names(config.decoder.num_hidden_layers)
        self.session = open_session(path)
        self.cache_slots = cache_slots(self.session)

    def encode(self, pixels: Array) -> list[Array]:
        """[B, 3, H, W] -> keys and values, flat, each [B, Hkv, P + N, D]"""
        feeds = {PIXEL_VALUES: pixels}
        if isinstance(self.cache_slots, int):
            decoder = self.config.decoder
            dtype = DTYPES[self.session.get_inputs()[-1].type]
            shape = (len(pixels), decoder.num_key_value_heads, self.cache_slots, decoder.head_dim)
            empty = np.full(shape, UNWRITTEN, dtype)
            feeds.update(dict.fromkeys(past_names(decoder.num_hidden_layers), empty))
        kv: list[Array] = self.session.run(self.names, feeds)
        return [part[:, :, : self.config.image_slots] for part in kv]


class DecoderSession:
    """A decoder graph in ONNX Runtime, by the contract alone."""

    def __init__(
        self, path: Path, config: HiMixConfig, open_session: Opener = lean_session
    ) -> None:
        self.config = config
        self.layers = config.decoder.num_hidden_layers
        self.session = open_session(path)
        self.cache_slots = cache_slots(self.session)

    def step(self, ids: Array, past: list[Array]) -> tuple[Array, list[Array]]:
        """M more tokens [B, M] -> logits [B, V] of the last, and the cache with M more slots."""
        if self.cache_slots == "any":  # whose graphs go on from a cache one by one
            rows = [
                self._step(ids[i : i + 1], [part[i : i + 1] for part in past])
                for i in range(len(ids))
            ]
            logits, presents = zip(*rows, strict=True)
            return np.concatenate(logits), [np.concatenate(p) for p in zip(*presents, strict=True)]
        return self._step(ids, past)

    def _step(self, ids: Array, past: list[Array]) -> tuple[Array, list[Array]]:
        names = [LOGITS, *present_names(self.layers)]
        feeds = decoder_feeds(self.config, ids, past, self.cache_slots)
        logits, *present = self.session.run(names, feeds)
        length = past[0].shape[2] + ids.shape[1]
        return logits[:, 0], [part[:, :, :length] for part in present]


def cache_slots(session: Any) -> CacheSlots:
    """Of a graph in ONNX Runtime."""
    shapes = {node.name: node.shape for node in session.get_inputs()}
    slots = shapes.get(past_names(1)[0], [None] * 4)[2]
    if isinstance(slots, int):
        return slots
    return "any" if WRITE_INDICES in shapes else None


def decoder_feeds(
    config: HiMixConfig, ids: Array, past: list[Array], slots: CacheSlots = None
) -> dict[str, Array]:
    """The decoder graph's inputs for M more tokens [B, M] over a cache with an image in it.

    Args:
        past: flat, each [B, Hkv, P, D].
        slots: of the graph's cache.
    """
    filled = past[0].shape[2]
    first = filled - config.image_slots + config.text_offset
    positions = np.broadcast_to(np.arange(first, first + ids.shape[1]), ids.shape)
    feeds = {INPUT_IDS: ids, POSITION_IDS: np.ascontiguousarray(positions)}
    if slots is not None:
        size = filled + ids.shape[1] + 1 if slots == "any" else slots
        feeds[WRITE_INDICES] = np.full(len(ids), filled)
        room = ((0, 0), (0, 0), (0, size - filled), (0, 0))
        past = [np.pad(part, room, constant_values=UNWRITTEN) for part in past]
    feeds.update(zip(past_names(config.decoder.num_hidden_layers), past, strict=True))
    return feeds
