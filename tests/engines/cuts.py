"""Full-width cuts of the presets: two layers of each half that run, random weights, float16.

Widths, heads, head dimensions and image sizes are the presets' own; so is TinyLlama's vocabulary of
32,000. The others' vocabularies are cut to 4,096: a table of 128,000 rows and a head of as many
columns take an engine longer than all else in it, and are one Gather and one MatMul as before.

Tracing takes longest, so a decoder is traced once for all encoders, and an encoder once for all
decoders: of a pair's vision graph only the projections' width is the decoder's. Test processes
share a folder, and each graph is made in one of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.util
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir
import pytest
import torch
from torch import Tensor

from himix_edge.bundles import DEMO_CHECKPOINT
from himix_edge.config import HiMixConfig
from himix_edge.contract import (
    SCHEMA_VERSION,
    VISION_GRAPH,
    Chat,
    Dialect,
    Manifest,
)
from himix_edge.engines import rtx, rtx_driver
from himix_edge.export.onnx import (
    decoder_onnx_from_weights,
    vision_onnx_from_weights,
    write_graph,
)
from himix_edge.export.rewrites import native_decoder, native_vision
from himix_edge.export.weight_only import WeightOnly, quantize_weights
from himix_edge.models.checkpoints import read_checkpoint
from himix_edge.models.himix import hollow_model
from himix_edge.models.weights import Weights
from himix_edge.presets import DECODERS, ENCODERS

LAYERS = 2
VOCABULARY = 4096  # at most, but for the decoder below
WHOLE_VOCABULARY = "tinyllama-1.1b"
CACHE_SLOTS = 1024  # for every encoder's image, so that a decoder's graph is the same for all
DEMO_SLOTS = 256
TRACED_WITH = "qwen2-0.5b"  # the decoder whose projections an encoder is traced with
PROJECTIONS = "injection.weight.T"  # of all layers, keys and values [d_v, L * 2 * Hkv * D]

NEEDS_BUILDER = pytest.mark.skipif(
    importlib.util.find_spec(rtx.PACKAGE) is None or not all(map(shutil.which, rtx_driver.TOOLS)),
    reason=f"no builder of TensorRT for RTX: {rtx.INSTALL}, and cc and nm",
)

Stored = Literal["float16", "int8", "int4"]
STORED: tuple[Stored, ...] = ("float16", "int8", "int4")


@dataclass(frozen=True)
class TiledWeight:
    """Random numbers that repeat: drawing as many as a decoder has takes longer than an engine."""

    name: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        if len(self.shape) == 1 and self.name.endswith("weight"):
            return torch.ones(self.shape)
        size = math.prod(self.shape)
        seed = zlib.crc32(self.name.encode())  # alike, the builder would store them once
        some = torch.randn(8191, generator=torch.Generator().manual_seed(seed))
        some *= math.prod(self.shape[1:]) ** -0.5 if len(self.shape) > 1 else 0.02
        return some.repeat(-(-size // len(some)))[:size].reshape(self.shape)

    def problem(self) -> None:
        """Never any."""


def cut_config(encoder: str, decoder: str) -> HiMixConfig:
    """A pair of presets, with so many layers that `LAYERS` run."""
    eyes, words = ENCODERS[encoder], DECODERS[decoder]
    vocabulary = words.decoder.vocab_size
    if decoder != WHOLE_VOCABULARY:
        vocabulary = min(vocabulary, VOCABULARY)
    return HiMixConfig(
        dataclasses.replace(eyes.vision, num_hidden_layers=LAYERS - 1 - eyes.vision.feature_layer),
        dataclasses.replace(
            words.decoder,
            num_hidden_layers=LAYERS,
            vocab_size=vocabulary,
            eos_token_ids=(),
        ),
        eyes.preprocess,
    )


def manifest_of(config: HiMixConfig, cache_slots: int | None) -> Manifest:
    """As much of a bundle as profiles ask for; without slots, of the portable dialect."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name="cut",
        notice="",
        dialect="native" if cache_slots else "portable",
        dtype="float16",
        config=config,
        chat=Chat(),
        files={},
        tools={},
        parity={},
        cache_slots=cache_slots,
    )


def tiled_weights(config: HiMixConfig) -> Weights:
    """Weights for all of a model."""
    return {
        name: TiledWeight(name, tuple(tensor.shape))
        for name, tensor in hollow_model(config).state_dict().items()
    }


@dataclass(frozen=True)
class Cuts:
    """The graphs of cuts in a folder, each made when it is first asked for."""

    folder: Path

    def vision(self, encoder: str, decoder: str, dialect: Dialect, stored: Stored) -> Path:
        """A pair's vision graph."""
        first, config = cut_config(encoder, TRACED_WITH), cut_config(encoder, decoder)

        def trace(path: Path) -> None:
            write_graph(vision_onnx_from_weights(first, tiled_weights(first), "float16"), path)

        def rewrite(path: Path) -> None:
            graph = onnx_ir.load(self._made(encoder, trace))
            project_for(graph, config)
            if dialect == "native":
                native_vision(graph, config, CACHE_SLOTS)
            onnx_ir.save(graph, path)  # its weights stay where they are

        return self._stored(f"{encoder}.{decoder}.{dialect}", rewrite, stored)

    def decoder(self, decoder: str, dialect: Dialect, stored: Stored) -> Path:
        """A decoder's graph, the same for every encoder."""
        config = cut_config(next(iter(ENCODERS)), decoder)

        def trace(path: Path) -> None:
            write_graph(decoder_onnx_from_weights(config, tiled_weights(config), "float16"), path)

        def rewrite(path: Path) -> None:
            graph = onnx_ir.load(self._made(decoder, trace))
            native_decoder(graph, config, CACHE_SLOTS)
            onnx_ir.save(graph, path)

        if dialect == "portable":
            return self._stored(decoder, trace, stored)
        return self._stored(f"{decoder}.{dialect}", rewrite, stored)

    def demo(self, graph: str, stored: Stored) -> Path:
        """A graph of the demo model, whole and native."""
        demo = read_checkpoint(DEMO_CHECKPOINT)
        config = demo.config

        def make(path: Path) -> None:
            if graph == VISION_GRAPH:
                made = vision_onnx_from_weights(config, demo.weights, "float16")
                native_vision(made, config, DEMO_SLOTS)
            else:
                made = decoder_onnx_from_weights(config, demo.weights, "float16")
                native_decoder(made, config, DEMO_SLOTS)
            write_graph(made, path)

        return self._stored(f"demo.{Path(graph).stem}", make, stored)

    def demo_manifest(self) -> Manifest:
        """As much of the demo model's bundle as profiles ask for."""
        return manifest_of(read_checkpoint(DEMO_CHECKPOINT).config, DEMO_SLOTS)

    def _stored(self, name: str, make: Callable[[Path], None], stored: Stored) -> Path:
        source = self._made(name, make)
        if stored == "float16":
            return source
        how = WeightOnly(stored)
        return self._made(f"{name}.{stored}", lambda path: quantize_weights(source, path, how))

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        path = self.folder / f"{name}.onnx"
        with _alone(self.folder / f"{name}.lock"):
            if not path.exists():
                make(path)
        return path


def project_for(graph: onnx_ir.Model, config: HiMixConfig) -> None:
    """Gives a traced vision graph the projections of another decoder, in place."""
    heads, dim = config.decoder.num_key_value_heads, config.decoder.head_dim
    old = graph.graph.initializers[PROJECTIONS]
    shape = (config.vision.hidden_size, 2 * LAYERS * heads * dim)
    weight = TiledWeight(PROJECTIONS, shape).read().to(torch.float16).numpy()
    old.const_value = onnx_ir.tensor(weight, name=PROJECTIONS)
    old.shape = onnx_ir.Shape(shape)
    ((product, _),) = old.uses()
    ((reshape, _),) = product.outputs[0].uses()
    sizes = reshape.inputs[1]
    assert reshape.op_type == "Reshape"
    assert sizes is not None
    assert sizes.const_value is not None
    before = sizes.const_value.numpy()  # [B, N, 2 * L * Hkv, D]
    sizes.const_value = onnx_ir.tensor(
        np.array([*before[:2], 2 * LAYERS * heads, dim]), name=sizes.name
    )
    for output in graph.graph.outputs:
        assert output.shape is not None
        batch, _, tokens, _ = output.shape
        output.shape = onnx_ir.Shape([batch, heads, tokens, dim])


@contextlib.contextmanager
def shared_cuts(folder: Path) -> Iterator[Cuts]:
    """Cuts that several processes make together; gigabytes, which the last of them takes away."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "users").open("w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        yield Cuts(folder)
        with contextlib.suppress(BlockingIOError):  # others are still at it
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in folder.glob("*.onnx*"):
                path.unlink()


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Lets one process in at a time."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
