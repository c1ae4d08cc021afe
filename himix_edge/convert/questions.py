"""What is asked about calibration pictures: by their folder, or else in general."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from himix_edge.convert.teacher import TeacherSource
from himix_edge.errors import ConfigError
from himix_edge.export.bundle import manifest_of
from himix_edge.export.reference import tokenizer_of
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.pictures import PROMPTS, QUESTIONS
from himix_edge.plain import dataclass_from_dict
from himix_edge.runtimes.tokenizer import Tokenizer

DEFAULT_PROMPTS = (
    "Describe the image.",
    "What is in the picture?",
    "How many objects are there, and what are their colours?",
    "Where in the picture is each thing?",
    "Is there any text in the image? What does it say?",
)
LINE = '{"image": "a.png", "prompt": "What is it?", "answer": "A cat."}, the answer optional'


@dataclass(frozen=True)
class Question:
    """A prompt, and the right answer if it is known."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class Questions:
    """What is asked about the pictures of a folder.

    Attributes:
        general: about every picture that has no questions of its own.
        own: by the picture's file name.
    """

    general: tuple[Question, ...]
    own: Mapping[str, tuple[Question, ...]]

    @classmethod
    def read(cls, folder: Path) -> Questions:
        """A folder's QUESTIONS, about single pictures, and its PROMPTS, about all others.

        Without PROMPTS those others are asked DEFAULT_PROMPTS.

        Raises:
            ConfigError: files that are no UTF-8 text or hold no prompt; a line of QUESTIONS that is
                no such object, is about a picture that is not in the folder, or is empty.
        """
        prompts, questions = folder / PROMPTS, folder / QUESTIONS
        general = _prompts(prompts) if prompts.is_file() else DEFAULT_PROMPTS
        own = _own_questions(questions) if questions.is_file() else {}
        return cls(tuple(Question(prompt) for prompt in general), own)

    def for_image(self, name: str) -> tuple[Question, ...]:
        """What is asked about the picture of that file name; at least one question."""
        return self.own.get(name, self.general)


@dataclass(frozen=True)
class _Line:
    image: str
    prompt: str
    answer: str | None = None


def _prompts(path: Path) -> tuple[str, ...]:
    lines = (line.strip() for line in _text(path).splitlines())
    if not (prompts := tuple(line for line in lines if line)):
        raise ConfigError(f"{path} holds no prompt", expected="a prompt a line")
    return prompts


def _own_questions(path: Path) -> dict[str, tuple[Question, ...]]:
    own: dict[str, tuple[Question, ...]] = {}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            said = _line(f"{path}, line {number}", line, path.parent)
            own[said.image] = (*own.get(said.image, ()), Question(said.prompt, said.answer))
    if not own:
        raise ConfigError(f"{path} holds no question", expected=f"lines like {LINE}")
    return own


def _line(where: str, text: str, folder: Path) -> _Line:
    try:
        data: Any = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON", expected=LINE, found=str(error)) from error
    try:
        line = dataclass_from_dict(_Line, data)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.failed}", expected=LINE, fix=error.fix) from error
    if not line.prompt.strip() or (line.answer is not None and not line.answer.strip()):
        raise ConfigError(f"{where} is empty", expected=LINE, found=text)
    if Path(line.image).name != line.image or not (folder / line.image).is_file():
        raise ConfigError(
            f"{where} is about a picture that is not there",
            expected=f"the name of a file in {folder}",
            found=repr(line.image),
        )
    return line


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ConfigError(f"{path} is no text", expected="UTF-8", found=str(error)) from error


def prompt_encoder(source: TeacherSource) -> Tokenizer:
    """The tokenizer of what comes after the image, with its chat template.

    Raises:
        CheckpointError: a tokenizer that can't be read, or has more tokens than the decoder.
        ExportError: a chat template that can't be rendered.
    """
    checkpoint = _as_checkpoint(source)
    manifest_of(checkpoint)
    return tokenizer_of(checkpoint)


def _as_checkpoint(source: TeacherSource) -> Checkpoint:
    return Checkpoint(
        name=source.name,
        notice=source.notice,
        config=source.config,
        weights=source.weights,
        tokenizer_json=source.tokenizer_json,
        chat_template=source.chat_template,
        model_card="",
        files={},
        chat=source.chat,
    )
