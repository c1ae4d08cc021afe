from __future__ import annotations

import json
from pathlib import Path

import pytest

from himix_edge.convert.questions import DEFAULT_PROMPTS, Question, Questions, prompt_encoder
from himix_edge.convert.teacher import TeacherSource
from himix_edge.errors import CheckpointError, ConfigError, ExportError
from himix_edge.pictures import PROMPTS, QUESTIONS
from tests.tiny import CHAT_TEMPLATE, tiny_config, tiny_tokenizer

WHAT = {"image": "a.png", "prompt": "What is it?"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"a picture")
    return tmp_path


def write_lines(folder: Path, *lines: object) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / QUESTIONS).write_text("\n".join(texts), encoding="utf-8")


def test_each_picture_has_its_own_questions_or_else_the_folders(folder: Path) -> None:
    write_lines(folder, WHAT, "", {**WHAT, "prompt": "Où?\u2028", "answer": "Là."})
    (folder / PROMPTS).write_text("  Describe it.\n\nWhat now?\n", encoding="utf-8")
    questions = Questions.read(folder)
    assert questions.for_image("a.png") == (
        Question("What is it?", None),
        Question("Où?\u2028", "Là."),
    )
    assert questions.for_image("b.png") == (Question("Describe it."), Question("What now?"))


def test_a_folder_of_pictures_alone_is_asked_the_default_prompts(folder: Path) -> None:
    asked = Questions.read(folder).for_image("a.png")
    assert asked == tuple(Question(prompt) for prompt in DEFAULT_PROMPTS)
    assert len(asked) > 1


def test_a_line_separator_within_a_prompt_ends_no_line(folder: Path) -> None:
    line = json.dumps({**WHAT, "prompt": "one\u2028two"}, ensure_ascii=False)
    write_lines(folder, line)
    assert Questions.read(folder).for_image("a.png") == (Question("one\u2028two"),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 is no JSON: expected \{\"image\""),
        ([1], "line 2: _?Line is off"),
        ({**WHAT, "anwser": "No."}, "line 2: unknown key 'anwser'.*did you mean 'answer'"),
        ({"image": "a.png"}, "line 2: .*lacks prompt"),
        ({**WHAT, "prompt": 3}, "line 2: prompt is off"),
        ({**WHAT, "prompt": " "}, "line 2 is empty"),
        ({**WHAT, "answer": ""}, "line 2 is empty"),
        ({**WHAT, "image": "c.png"}, "line 2 is about a picture that is not there.*'c.png'"),
        ({**WHAT, "image": "../b.png"}, "line 2 is about a picture that is not there"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(folder: Path, line: object, message: str) -> None:
    write_lines(folder, WHAT, line)
    with pytest.raises(ConfigError, match=f"{QUESTIONS}, {message}"):
        Questions.read(folder)


def test_files_without_a_question_are_refused(folder: Path) -> None:
    (folder / PROMPTS).write_text("\n \n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{PROMPTS} holds no prompt"):
        Questions.read(folder)
    (folder / PROMPTS).write_bytes(b"What?\xff")
    with pytest.raises(ConfigError, match=f"{PROMPTS} is no text: expected UTF-8"):
        Questions.read(folder)
    (folder / PROMPTS).unlink()
    write_lines(folder, "")
    with pytest.raises(ConfigError, match=f"{QUESTIONS} holds no question"):
        Questions.read(folder)


def source(**changes: str) -> TeacherSource:
    texts = {"tokenizer_json": tiny_tokenizer().to_str(), "chat_template": CHAT_TEMPLATE, **changes}
    config, json_, template = (
        tiny_config("vanilla"),
        texts["tokenizer_json"],
        texts["chat_template"],
    )
    return TeacherSource("tiny", "llava", "", "", config, {}, (), json_, template)


def test_a_prompt_is_encoded_within_the_chat_template() -> None:
    encoder = prompt_encoder(source())
    expected = tiny_tokenizer().encode("<|user|>How many?<|assistant|>").ids
    assert encoder.encode_turn(encoder.chat.first, "How many?") == expected
    assert encoder.chat.next.before == "<|end|><|user|>"  # its eos_token is that of the config


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"tokenizer_json": "{}"}, CheckpointError), ({"chat_template": "{{ 1"}, ExportError)],
)
def test_a_source_without_a_usable_tokenizer_is_refused(
    changes: dict[str, str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        prompt_encoder(source(**changes))
