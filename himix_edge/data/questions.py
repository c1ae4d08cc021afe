"""What is asked about the pictures of a folder: about single ones, or else in general."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from himix_edge.data.pictures import PROMPTS, QUESTIONS
from himix_edge.data.text_lines import is_there, text_lines
from himix_edge.errors import ConfigError
from himix_edge.plain import dataclass_from_dict

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
    def read(cls, folder: Path, default: Sequence[str] = DEFAULT_PROMPTS) -> Questions:
        """A folder's QUESTIONS, about single pictures, and its PROMPTS, about all others.

        Args:
            default: what those others are asked if there is no PROMPTS.

        Raises:
            ConfigError: files that can't be read, are no UTF-8 text (see `text_lines`) or hold no
                prompt; a line of QUESTIONS that is no such object, is about a picture that is not
                in the folder, or is empty.
        """
        prompts, questions = folder / PROMPTS, folder / QUESTIONS
        general = _prompts(prompts) if is_there(prompts) else default
        own = _own_questions(questions) if is_there(questions) else {}
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
    if not (prompts := tuple(line for _, line in text_lines(path))):
        raise ConfigError(f"{path} holds no prompt", expected="a prompt a line")
    return prompts


def _own_questions(path: Path) -> dict[str, tuple[Question, ...]]:
    own: dict[str, tuple[Question, ...]] = {}
    for number, line in text_lines(path):
        said = _line(f"{path}, line {number}", line, path.parent)
        own[said.image] = (*own.get(said.image, ()), Question(said.prompt, said.answer))
    if not own:
        raise ConfigError(f"{path} holds no question", expected=f"lines like {LINE}")
    return own


def _line(where: str, text: str, folder: Path) -> _Line:
    try:
        data: Any = json.loads(text)
        json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
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
