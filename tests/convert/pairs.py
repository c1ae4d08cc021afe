"""A tiny teacher with a fixed text ahead of the image, its student, and pictures to ask about."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from himix_edge.config import ProjectionConfig
from himix_edge.contract import Chat
from himix_edge.convert.teacher import Teacher, student_config, student_of
from himix_edge.data.questions import Question
from himix_edge.models.decoder import KV
from himix_edge.models.himix import HiMix
from himix_edge.models.injection import HiMixInjection
from himix_edge.runtimes.chat import ChatTemplate
from himix_edge.runtimes.tokenizer import Tokenizer
from tests.models.reference import randomized
from tests.tiny import CHAT_TEMPLATE, tiny_config, tiny_model, tiny_tokenizer

PREFIX_IDS = (1, 20, 33)
CHAT = ChatTemplate(CHAT_TEMPLATE, Chat({"eos_token": "<|end|>"}))
QUESTIONS = (Question("How many?"), Question("describe", "There is a small red circle."))

Picture = tuple[Path, NDArray[np.float32]]


def tiny_teacher() -> Teacher:
    return Teacher(tiny_model(tiny_config("vanilla")), PREFIX_IDS)


def random_student(teacher: Teacher) -> HiMix:
    """Its projections are random: it knows nothing of what the teacher makes of a picture."""
    config = student_config(teacher, (), ProjectionConfig(bias=True))
    student = student_of(teacher, config)
    injection = cast(HiMixInjection, student.injection)
    randomized(injection.layers, seed=5)
    return student


def tiny_pictures(many: int = 2) -> list[Picture]:
    random = np.random.default_rng(3)
    names = (Path(f"{letter}.png") for letter in "abcdefgh"[:many])
    return [(name, random.normal(size=(1, 3, 28, 28)).astype(np.float32)) for name in names]


def questions_for(_name: str) -> tuple[Question, ...]:
    return QUESTIONS


def silent(*_: object) -> None:
    """A watch that looks away."""


def tiny_encoder(folder: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer().to_str(), CHAT, folder)


def exact_caches(
    patch: pytest.MonkeyPatch, teacher: Teacher, student: HiMix, spoilt: dict[int, int]
) -> None:
    """Gives the student the teacher's own cache, but in the layers `spoilt` to keys (0) or values.

    What is spoilt there is the second key-value head.
    """

    def injected(features: torch.Tensor, _decoder: object) -> list[KV]:
        kvs = teacher.replayed(teacher.image_cache(features))
        for layer, part in spoilt.items():
            kvs[layer][part][:, 1] += 0.5 * torch.arange(7).view(7, 1)
        return kvs

    patch.setattr(student.injection, "forward", injected)
