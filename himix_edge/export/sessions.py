"""Finished graphs in ONNX Runtime, by the contract alone: what is checked and measured with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime  # type: ignore[import-untyped]

from himix_edge.config import HiMixConfig
from himix_edge.contract import (
    INPUT_IDS,
    LOGITS,
    PIXEL_VALUES,
    POSITION_IDS,
    past_names,
    present_names,
)
from himix_edge.errors import ExportError
from himix_edge.export.expected import Array

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


def _session(path: Path, entries: dict[str, str]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; they are raised as well
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's have no common base
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"ONNX Runtime can't run {path.name}", found=reason) from error


class VisionSession:
    """A vision graph in ONNX Runtime, by the contract alone."""

    def __init__(
        self, path: Path, config: HiMixConfig, open_session: Opener = lean_session
    ) -> None:
        self.names = present_names(config.decoder.num_hidden_layers)
        self.session = open_session(path)

    def encode(self, pixels: Array) -> list[Array]:
        """[B, 3, H, W] -> keys and values, flat, each [B, Hkv, N, D]"""
        kv: list[Array] = self.session.run(self.names, {PIXEL_VALUES: pixels})
        return kv


class DecoderSession:
    """A decoder graph in ONNX Runtime, by the contract alone."""

    def __init__(
        self, path: Path, config: HiMixConfig, open_session: Opener = lean_session
    ) -> None:
        self.config = config
        self.layers = config.decoder.num_hidden_layers
        self.session = open_session(path)

    def step(self, ids: Array, past: list[Array]) -> tuple[Array, list[Array]]:
        """M more tokens [B, M] -> logits [B, V] of the last, and the longer cache."""
        names = [LOGITS, *present_names(self.layers)]
        logits, *present = self.session.run(names, decoder_feeds(self.config, ids, past))
        return logits[:, 0], present


def decoder_feeds(config: HiMixConfig, ids: Array, past: list[Array]) -> dict[str, Array]:
    """The decoder graph's inputs for M more tokens [B, M] over a cache with an image in it."""
    first = past[0].shape[2] - config.vision.num_image_tokens + config.text_offset
    positions = np.broadcast_to(np.arange(first, first + ids.shape[1]), ids.shape)
    feeds = {INPUT_IDS: ids, POSITION_IDS: np.ascontiguousarray(positions)}
    feeds.update(zip(past_names(config.decoder.num_hidden_layers), past, strict=True))
    return feeds
