"""Batches of the shapes world, each a pure function of (seed, phase, step): a run can stop anywhere
and go on exactly, and no data set lies on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from himix_edge.config import HiMixConfig
from himix_edge.runtimes.preprocess import pixel_values
from himix_edge.shapes.questions import KINDS, Question, ask
from himix_edge.shapes.render import render
from himix_edge.shapes.scenes import Scene, random_scene
from himix_edge.training.labels import Labels, labels_of
from himix_edge.training.tokens import casual, token_ids

ALWAYS_ASKABLE = "exists"  # in place of a kind of which a scene has no question
NO_LOSS = -100  # the label of a token that is given, not predicted
RENDERED_SIZES = (1.0, 1.5, 2.0)  # of the encoder's image size: pictures of several resolutions


@dataclass(frozen=True)
class TextBatch:
    """Q questions about each of B scenes, those of one scene after each other."""

    kinds: list[str]
    input_ids: Tensor  # [B * Q, M]: prompt and answer, filled up with end tokens
    labels: Tensor  # [B * Q, M]: the token that follows, or NO_LOSS outside the answer


def scene_batch(rng: np.random.Generator, size: int) -> list[Scene]:
    return [random_scene(rng) for _ in range(size)]


def image_batch(scenes: list[Scene], config: HiMixConfig, rng: np.random.Generator) -> Tensor:
    """[B, 3, H, W], rendered at various resolutions and preprocessed as at run time."""
    sizes = rng.choice(RENDERED_SIZES, size=len(scenes)) * config.vision.image_size
    pictures = [render(scene, int(size)) for scene, size in zip(scenes, sizes, strict=True)]
    values = [pixel_values(picture, config.preprocess) for picture in pictures]
    return torch.from_numpy(np.concatenate(values))


def label_batch(scenes: list[Scene], config: HiMixConfig) -> Labels:
    return labels_of(scenes, config.vision.image_size, config.vision.patch_size)


def text_batch(
    scenes: list[Scene], kinds: Sequence[str], tokenizer: Tokenizer, rng: np.random.Generator
) -> TextBatch:
    """Questions of the given kinds about each scene; `exists` where a scene has none of a kind."""
    questions = [_question(kind, scene, rng) for scene in scenes for kind in kinds]
    sequences = []
    for question in questions:
        text = casual(question.text) if rng.random() < 0.25 else question.text
        sequences.append(token_ids(tokenizer, text, question.answer))
    input_ids, labels = padded(sequences)
    return TextBatch(
        [question.kind for question in questions],
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
    )


def _question(kind: str, scene: Scene, rng: np.random.Generator) -> Question:
    question = ask(kind, scene, rng) or KINDS[ALWAYS_ASKABLE](scene, rng)
    if question is None:  # never: every scene has such a question
        raise ValueError(f"a scene without a question of kind {ALWAYS_ASKABLE!r}")
    return question


def padded(
    sequences: list[tuple[list[int], list[int]]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Inputs and labels: each row is prompt + answer, its last token only ever predicted."""
    length = max(len(prompt) + len(answer) for prompt, answer in sequences) - 1
    input_ids = np.zeros((len(sequences), length), dtype=np.int64)
    labels = np.full((len(sequences), length), NO_LOSS, dtype=np.int64)
    for row, (prompt, answer) in enumerate(sequences):
        whole = prompt + answer
        input_ids[row, : len(whole) - 1] = whole[:-1]
        labels[row, len(prompt) - 1 : len(whole) - 1] = answer
    return input_ids, labels
