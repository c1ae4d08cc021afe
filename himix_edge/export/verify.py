"""The finished graphs in ONNX Runtime against what the model in torch said."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from himix_edge.config import HiMixConfig
from himix_edge.contract import (
    DECODER_GRAPH,
    LOGITS,
    VISION_GRAPH,
    Dtype,
    present_names,
)
from himix_edge.errors import ParityError
from himix_edge.export.expected import Array, Expected, Greedy, Step
from himix_edge.export.sessions import DecoderSession, VisionSession
from himix_edge.export.widen import write_widened


class Bounds(NamedTuple):
    """How close every tensor must come: see `Closeness`."""

    error: float
    cosine: float


# Measured in fp32: 1e-6 and 1 - 1e-12 for a model of 5 million parameters; deeper ones need some
# room, and a wrong weight, position or mask gives a hundred times as much. In half precision
# the rounding of each of a deep model's layers adds up.
BOUNDS: dict[Dtype, Bounds] = {
    "float32": Bounds(1e-4, 1 - 1e-7),
    "float16": Bounds(2e-2, 1 - 1e-4),
    "bfloat16": Bounds(1e-1, 1 - 5e-3),
}
_FIX = (
    "export with the versions that this release was tested with: pip install 'himix-edge[export]'"
)


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
        if found.shape != expected.shape:
            return cls(np.inf, 0.0)
        a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return cls(np.inf, 0.0)
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


def verify(expected: Expected, folder: Path, config: HiMixConfig, dtype: Dtype) -> Parity:
    """Compares the two graphs in a folder with what the model said.

    One graph is open at a time; the decoder graph begins with the vision graph's own keys and
    values. ONNX Runtime's CPU kernels don't know bfloat16: such graphs are compared as the same
    nodes over the same rounded weights in float32.

    Raises:
        ParityError: a tensor, or a greedy token, that differs by more than the bounds.
        ExportError: a graph that ONNX Runtime can't run.
    """
    if dtype == "bfloat16":
        with tempfile.TemporaryDirectory(dir=folder) as widened:
            for graph in (VISION_GRAPH, DECODER_GRAPH):
                write_widened(folder / graph, Path(widened) / graph)
            return _verify(expected, Path(widened), config, BOUNDS[dtype])
    return _verify(expected, folder, config, BOUNDS[dtype])


def _verify(expected: Expected, folder: Path, config: HiMixConfig, bounds: Bounds) -> Parity:
    vision = VisionSession(folder / VISION_GRAPH, config)
    images = [vision.encode(case.pixels) for case in expected.cases]
    del vision
    names = present_names(config.decoder.num_hidden_layers)
    seen: Closenesses = {}
    for image, case in zip(images, expected.cases, strict=True):
        _note(seen, zip(names, image, case.image, strict=True))
    _require_close(VISION_GRAPH, seen, bounds)  # first: the decoder inherits its errors

    decoder = DecoderSession(folder / DECODER_GRAPH, config)
    said: Closenesses = {}
    for image, case in zip(images, expected.cases, strict=True):
        cache = image
        for step in (case.prefill, case.decode):
            cache = _compare_step(said, decoder, step, cache)
    _require_close(DECODER_GRAPH, said, bounds)
    counts = [
        _compare_greedy(decoder, greedy, image, bounds.error)
        for greedy, image in zip(expected.greedy, images, strict=False)
    ]
    return Parity(
        images=len(expected.greedy),
        prompts=len({tuple(greedy.prompt) for greedy in expected.greedy}),
        max_error=bounds.error,
        min_cosine=bounds.cosine,
        vision=seen,
        decoder=said,
        greedy_tokens=sum(compared for compared, _ in counts),
        greedy_tokens_equal=sum(equal for _, equal in counts),
    )


def _compare_step(
    worst: Closenesses, decoder: DecoderSession, step: Step, past: list[Array]
) -> list[Array]:
    """Runs one step; `worst` keeps the worst of each output."""
    logits, present = decoder.step(step.ids, past)
    count, names = step.ids.shape[1], present_names(decoder.layers)
    kept = [
        np.array_equal(
            new[:, :, :-count], old, equal_nan=True
        )  # numbers that are none are no change
        for new, old in zip(present, past, strict=True)
    ]
    if not all(kept):
        raise ParityError(
            f"{DECODER_GRAPH} changes what the cache already held",
            expected="past slots as they were",
            found=f"others in {names[kept.index(False)]}",
            fix=_FIX,
        )
    logits, expected = (comparable(each, decoder.config) for each in (logits, step.logits))
    _note(worst, [(LOGITS, logits, expected)])
    new = [part[:, :, -count:] for part in present]
    _note(worst, zip(names, new, step.present, strict=True))
    return present


def _compare_greedy(
    decoder: DecoderSession, greedy: Greedy, image: list[Array], max_error: float
) -> tuple[int, int]:
    """How many tokens of an answer were compared, and how many are equal."""
    ids, cache = np.array([greedy.prompt]), image
    for equal, (token, expected) in enumerate(zip(greedy.tokens, greedy.logits, strict=True)):
        logits, cache = decoder.step(ids, cache)
        if (found := int(logits.argmax())) != token:
            scale = float(np.abs(comparable(expected, decoder.config)).max())
            gap = float(expected[token] - expected[found]) / scale
            if gap > max_error:
                raise ParityError(
                    f"{DECODER_GRAPH} gives other tokens than the model",
                    expected=f"token {token} after {equal} tokens of the answer",
                    found=f"token {found}, whose logit is {gap:.1e} of the largest below",
                    fix=_FIX,
                )
            return equal + 1, equal
        ids = np.array([[token]])
    return len(greedy.tokens), len(greedy.tokens)


def comparable(logits: Array, config: HiMixConfig) -> Array:
    """[..., V] -> [..., V]: suppressed tokens no lower than the lowest of the others.

    As they are, tens of thousands below, they would be all the scale that errors are measured on.
    One that a graph fails to suppress stays as high as it is, and is an error.
    """
    ids = list(config.decoder.suppressed_token_ids)
    if not ids:
        return logits
    lowest = np.delete(logits, ids, axis=-1).min(-1, keepdims=True)
    raised = logits.copy()
    raised[..., ids] = np.maximum(logits[..., ids], lowest)
    return raised


def _require_close(graph: str, tensors: Closenesses, bounds: Bounds) -> None:
    off = {
        name: closeness
        for name, closeness in tensors.items()
        if closeness.error > bounds.error or closeness.cosine < bounds.cosine
    }
    if off:
        worst = max(off, key=lambda name: off[name].error)
        raise ParityError(
            f"{graph} gives other numbers than the model",
            expected=f"at most {bounds.error:g} of a tensor's largest value, "
            f"cosine {bounds.cosine:.7f}",
            found=f"{off[worst].error:.1e} and {off[worst].cosine:.7f} in {worst}, the worst",
            fix=_FIX,
        )


def _note(worst: Closenesses, tensors: Iterable[tuple[str, Array, Array]]) -> None:
    for name, found, expected in tensors:
        closeness = Closeness.of(found, expected)
        worst[name] = closeness.worst(worst.get(name, closeness))
