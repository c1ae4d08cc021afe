from __future__ import annotations

import json
from pathlib import Path

import pytest

from himix_edge.data.pictures import PROMPTS, QUESTIONS
from himix_edge.data.questions import DEFAULT_PROMPTS, Question, Questions
from himix_edge.errors import ConfigError

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
        ([1], "line 2: _?Line is invalid"),
        ({**WHAT, "anwser": "No."}, "line 2: unknown key 'anwser'.*did you mean 'answer'"),
        ({"image": "a.png"}, "line 2: .*lacks prompt"),
        ({**WHAT, "prompt": 3}, "line 2: prompt is invalid"),
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
    (folder / PROMPTS).unlink()
    write_lines(folder, "")
    with pytest.raises(ConfigError, match=f"{QUESTIONS} holds no question"):
        Questions.read(folder)


def test_others_may_be_asked_something_else(folder: Path) -> None:
    assert Questions.read(folder, ["Why?"]).for_image("a.png") == (Question("Why?"),)
    (folder / PROMPTS).write_text("How?")
    assert Questions.read(folder, ["Why?"]).for_image("a.png") == (Question("How?"),)


@pytest.mark.parametrize("name", [PROMPTS, QUESTIONS])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{line}\nOù?\n".encode("latin-1"), "line 2 is no text: expected UTF-8, found byte 0xf9"),
        ("{line}\n".encode("utf-16"), "line 1 is no text: expected UTF-8"),
        (b"{line}\n\n a\0b\n", "line 3 is no text: .*a NUL character"),
        (b"{line}\r\n" + b"x" * 70_000, "line 2 is too long: expected at most 65,536 bytes"),
    ],
)
def test_what_is_no_text_is_refused_by_its_line(
    folder: Path, name: str, data: bytes, message: str
) -> None:
    line = json.dumps(WHAT).encode()
    if data.startswith(b"\xff\xfe"):
        data = data.decode("utf-16").replace("{line}", line.decode()).encode("utf-16")
    (folder / name).write_bytes(data.replace(b"{line}", line))
    with pytest.raises(ConfigError, match=f"{name}, {message}"):
        Questions.read(folder)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks_make_no_difference(
    folder: Path, end: str, mark: str
) -> None:
    (folder / PROMPTS).write_bytes((mark + end.join(["", "Où?", "", " B? "])).encode())
    lines = [json.dumps(WHAT), "", json.dumps({**WHAT, "prompt": "C?"}), ""]
    (folder / QUESTIONS).write_bytes((mark + end.join(lines)).encode())
    questions = Questions.read(folder)
    assert questions.general == (Question("Où?"), Question("B?"))
    assert questions.for_image("a.png") == (Question("What is it?"), Question("C?"))


@pytest.mark.parametrize("name", [PROMPTS, QUESTIONS])
def test_what_is_no_file_is_not_passed_over(folder: Path, name: str) -> None:
    (folder / name).symlink_to(folder / "gone.txt")
    with pytest.raises(ConfigError, match=f"{name} can't be read: found No such file"):
        Questions.read(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ConfigError, match=f"{name} can't be read: expected a text file"):
        Questions.read(folder)


def test_a_line_that_is_nested_too_deep_or_half_a_character(folder: Path) -> None:
    for line in ("[" * 20_000, '{"image": "a.png", "prompt": "\\ud83d"}'):
        write_lines(folder, WHAT, line)
        with pytest.raises(ConfigError, match=f"{QUESTIONS}, line 2 is no JSON"):
            Questions.read(folder)
