"""The finished graphs in ONNX Runtime against the model in torch, on images and prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray

from himix_edge.config import HiMixConfig, PreprocessConfig
from himix_edge.contract import (
    DECODER_GRAPH,
    INPUT_IDS,
    LOGITS,
    PIXEL_VALUES,
    POSITION_IDS,
    VISION_GRAPH,
    past_names,
    present_names,
)
from himix_edge.errors import ExportError, ParityError
from himix_edge.models.decoder import KV
from himix_edge.models.himix import HiMix
from himix_edge.runtimes.preprocess import pixel_values
from himix_edge.shapes.render import render
from himix_edge.shapes.scenes import random_scene

Array = NDArray[Any]

# Measured: 1e-6 and 1 - 1e-12 for a model of 5 million parameters; deeper ones need some room, and
# a wrong weight, position or mask is off by a hundred times as much.
MAX_ERROR = 1e-4  # of any value, in units of its tensor's largest
MIN_COSINE = 1 - 1e-7
MAX_NEW_TOKENS = 24
_FIX = (
    "export with the versions that this release was tested with: pip install 'himix-edge[export]'"
)
QUESTIONS = ("describe", "How many objects are there?", "Is there a red circle in the picture?")
IMAGES = 4


@dataclass(frozen=True)
class Closeness:
    """How far a graph's tensor is from the model's, at worst.

    Attributes:
        error: the largest difference of a value, over the largest magnitude in the model's tensor.
        cosine: between the two tensors as vectors.
    """

    error: float
    cosine: float

    @classmethod
    def of(cls, found: Array, expected: Array) -> Closeness:
        if found.shape != expected.shape or not np.isfinite([found, expected]).all():
            return cls(np.inf, 0.0)
        a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
        scale = np.abs(b).max() or 1.0
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        return cls(
            float(np.abs(a - b).max() / scale),
            float(a @ b / norms) if norms else float((a == b).all()),
        )

    def worst(self, other: Closeness) -> Closeness:
        return Closeness(max(self.error, other.error), min(self.cosine, other.cosine))


Closenesses: TypeAlias = dict[str, Closeness]  # by the name of a graph's output


@dataclass(frozen=True)
class Parity:
    """What was compared, and how close it came.

    Attributes:
        max_error, min_cosine: the bounds that every tensor kept.
        vision, decoder: by the names of the graphs' outputs.
        greedy_tokens: how many were compared; one where the model itself wavers between two (their
            logits closer than `max_error`) may differ, and ends the comparison of its answer.
    """

    images: int
    prompts: int
    max_error: float
    min_cosine: float
    vision: Closenesses
    decoder: Closenesses
    greedy_tokens: int
    greedy_tokens_equal: int


def trial_images(config: PreprocessConfig) -> list[Array]:
    """Rendered scenes, preprocessed as a device does it, each [1, 3, H, W]."""
    rng = np.random.default_rng(0)
    return [pixel_values(render(random_scene(rng)), config) for _ in range(IMAGES)]


def verify(
    model: HiMix, folder: Path, images: Sequence[Array], prompts: Sequence[list[int]]
) -> Parity:
    """Compares the two graphs in a folder with the model they were made from.

    Image and prompt are paired in turn, one pair at a time and then two together; the decoder graph
    begins with the vision graph's own keys and values.

    Args:
        images: at least two, each [1, 3, H, W].
        prompts: token ids.

    Raises:
        ParityError: a tensor, or a greedy token, that differs by more than the bounds.
        ExportError: a graph that ONNX Runtime can't run.
    """
    graphs = Graphs(folder, model.config)
    pairs = [(image, prompts[i % len(prompts)]) for i, image in enumerate(images)]
    vision: Closenesses = {}
    decoder: Closenesses = {}
    for image, prompt in pairs:
        _compare_tensors(vision, decoder, graphs, model, image, np.array([prompt]))
    shortest = min(len(prompt) for _, prompt in pairs[:2])
    both = np.array([prompt[-shortest:] for _, prompt in pairs[:2]])
    _compare_tensors(vision, decoder, graphs, model, np.concatenate(images[:2]), both)
    _require_close(VISION_GRAPH, vision)  # first: the decoder inherits its errors
    _require_close(DECODER_GRAPH, decoder)

    counts = [_compare_tokens(graphs, model, image, prompt) for image, prompt in pairs]
    return Parity(
        images=len(images),
        prompts=len({tuple(prompt) for _, prompt in pairs}),
        max_error=MAX_ERROR,
        min_cosine=MIN_COSINE,
        vision=vision,
        decoder=decoder,
        greedy_tokens=sum(compared for compared, _ in counts),
        greedy_tokens_equal=sum(equal for _, equal in counts),
    )


class Graphs:
    """A folder's two graphs in ONNX Runtime, by the contract alone."""

    def __init__(self, folder: Path, config: HiMixConfig) -> None:
        self.config = config
        self.layers = config.decoder.num_hidden_layers
        self.vision, self.decoder = (
            _session(folder / VISION_GRAPH),
            _session(folder / DECODER_GRAPH),
        )

    def encode(self, pixels: Array) -> list[Array]:
        """[B, 3, H, W] -> keys and values, flat, each [B, Hkv, N, D]"""
        kv: list[Array] = self.vision.run(present_names(self.layers), {PIXEL_VALUES: pixels})
        return kv

    def step(self, ids: Array, past: list[Array]) -> tuple[Array, list[Array]]:
        """M more tokens [B, M] -> logits [B, V] of the last, and the longer cache."""
        slots = past[0].shape[2]
        first = slots - self.config.vision.num_image_tokens + self.config.text_offset
        positions = np.broadcast_to(np.arange(first, first + ids.shape[1]), ids.shape)
        feeds = {INPUT_IDS: ids, POSITION_IDS: np.ascontiguousarray(positions)}
        feeds.update(zip(past_names(self.layers), past, strict=True))
        logits, *present = self.decoder.run([LOGITS, *present_names(self.layers)], feeds)
        return logits[:, 0], present

    def generate_greedy(self, pixels: Array, prompt: list[int], max_new_tokens: int) -> list[int]:
        """`HiMix.generate_greedy` with the graphs."""
        logits, cache = self.step(np.array([prompt]), self.encode(pixels))
        tokens = [int(logits.argmax())]
        while len(tokens) < max_new_tokens and tokens[-1] not in self.config.decoder.eos_token_ids:
            logits, cache = self.step(np.array([tokens[-1:]]), cache)
            tokens.append(int(logits.argmax()))
        return tokens


@torch.inference_mode()
def _compare_tensors(
    vision: Closenesses,
    decoder: Closenesses,
    graphs: Graphs,
    model: HiMix,
    pixels: Array,
    ids: Array,
) -> None:
    """Encode, prefill, and one token more; `vision` and `decoder` keep the worst of each output."""
    names = present_names(graphs.layers)
    kv, reference = graphs.encode(pixels), model.encode(torch.from_numpy(pixels))
    _note(vision, zip(names, kv, _flat_arrays(reference), strict=True))
    for _ in ("prefill", "decode"):
        logits, kv = graphs.step(ids, kv)
        all_logits, reference = model.decode(torch.from_numpy(ids), reference)
        expected = all_logits[:, -1].numpy()
        _note(decoder, [(LOGITS, logits, expected)])
        _note(decoder, zip(names, kv, _flat_arrays(reference), strict=True))
        ids = expected.argmax(-1)[:, None]


def _compare_tokens(
    graphs: Graphs, model: HiMix, pixels: Array, prompt: list[int]
) -> tuple[int, int]:
    """How many tokens of an answer were compared, and how many are equal."""
    image = torch.from_numpy(pixels)
    expected = model.generate_greedy(image, torch.tensor([prompt]), MAX_NEW_TOKENS)
    found = graphs.generate_greedy(pixels, prompt, MAX_NEW_TOKENS)
    if found == expected:
        return len(found), len(found)
    equal = next(
        i for i, pair in enumerate(zip(expected, found, strict=False)) if len(set(pair)) > 1
    )
    with torch.inference_mode():
        logits = model(image, torch.tensor([prompt + expected[:equal]]))[0, -1]
    gap = float(logits[expected[equal]] - logits[found[equal]]) / float(logits.abs().max())
    if gap > MAX_ERROR:
        raise ParityError(
            f"{DECODER_GRAPH} gives other tokens than the model",
            expected=f"token {expected[equal]} after {equal} tokens of the answer",
            found=f"token {found[equal]}, whose logit is {gap:.1e} of the largest below",
            fix=_FIX,
        )
    return equal + 1, equal


def _require_close(graph: str, tensors: Closenesses) -> None:
    off = {
        name: closeness
        for name, closeness in tensors.items()
        if closeness.error > MAX_ERROR or closeness.cosine < MIN_COSINE
    }
    if off:
        worst = max(off, key=lambda name: off[name].error)
        raise ParityError(
            f"{graph} gives other numbers than the model",
            expected=f"at most {MAX_ERROR:g} of a tensor's largest value, cosine {MIN_COSINE:.7f}",
            found=f"{off[worst].error:.1e} and {off[worst].cosine:.7f} in {worst}, the worst",
            fix=_FIX,
        )


def _note(worst: Closenesses, tensors: Iterable[tuple[str, Array, Array]]) -> None:
    for name, found, expected in tensors:
        closeness = Closeness.of(found, expected)
        worst[name] = closeness.worst(worst.get(name, closeness))


def _flat_arrays(cache: list[KV]) -> list[Array]:
    return [part.numpy() for kv in cache for part in kv]


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; they are raised as well
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's have no common base
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"ONNX Runtime can't run {path.name}", found=reason) from error
