"""Prompts split at the image; tests/models/test_chat_files.py compares more of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from himix_edge.convert.questions import prompt_encoder
from himix_edge.convert.source import teacher_from_folder
from himix_edge.convert.tinyllava import SYSTEM
from himix_edge.errors import CheckpointError, PromptError
from himix_edge.runtimes.chat import Message
from tests.convert.llava import CHATML, IMAGE, image_id, metaspace_tokenizer, write_tiny_llava

QUESTIONS = ("Describe a red circle.", " a\n  b ", "USER: 3 < 4?", "\nOù? ")


def turns(question: str) -> list[list[Message]]:
    first: Message = {"role": "user", "content": question}
    answer: Message = {"role": "assistant", "content": "A red circle."}
    return [[first], [first, answer, {"role": "user", "content": f"{question} again"}]]


@pytest.mark.parametrize("scheme", ["legacy", "first"])
def test_tinyllava_encodes_the_text_around_the_image_apart(scheme: str, tmp_path: Path) -> None:
    """Its `prompt_formatters` and `tokenizer_image`, restated: BOS once, each part a text."""
    folder = write_tiny_llava(tmp_path / "tiny", "tinyllava")
    stock = metaspace_tokenizer(None, scheme)
    stock.save(str(folder / "tokenizer.json"))
    source = teacher_from_folder(folder)
    assert list(source.prefix_ids) == stock.encode(f"{SYSTEM} USER: ").ids
    device = prompt_encoder(source)
    for question in QUESTIONS:
        one, three = turns(question)
        text = f"\n{question} ASSISTANT:"
        assert device.encode_chat(one) == stock.encode(text, add_special_tokens=False).ids
        text += f" A red circle.</s>USER: {question} again ASSISTANT:"
        assert device.encode_chat(three) == stock.encode(text, add_special_tokens=False).ids
    with pytest.raises(PromptError, match="the system prompt is fixed"):
        device.encode_chat([{"role": "system", "content": "Obey."}, *one])
    with pytest.raises(PromptError, match="found 2 times"):
        device.encode_turn((), f"{IMAGE}?")


@pytest.mark.parametrize("family", ["llava", "llava_siglip", "llava_onevision"])
def test_every_turn_has_the_ids_of_the_whole(family: str, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / family, family)
    source, image = teacher_from_folder(folder), image_id(family)
    tokenizer_class: Any = PreTrainedTokenizerFast
    stock = tokenizer_class.from_pretrained(folder)
    device = prompt_encoder(source)
    opening = [image] if family == "llava_onevision" else []
    for question in QUESTIONS:
        for messages in turns(question):
            typed = [
                {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
                for m in messages
            ]
            typed[0]["content"].insert(0, {"type": "image"})  # type: ignore[attr-defined]
            text = stock.apply_chat_template(typed, add_generation_prompt=True, tokenize=False)
            ids = stock(text).input_ids  # what the processor does, where no BOS opens the text
            place = ids.index(image)
            assert ids[:place] == list(source.prefix_ids)
            assert device.encode_chat(messages) == opening + ids[place + 1 :]


@pytest.mark.parametrize("place", ["chat_template.json", "processor_config.json"])
def test_a_processors_template_outweighs_the_tokenizers(place: str, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "llava", "llava_siglip")
    expected = teacher_from_folder(folder).chat_template
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0].content }}"  # of text alone
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / place).write_text(json.dumps({"chat_template": CHATML}))
    assert teacher_from_folder(folder).chat_template == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content[-1].text }}{% endfor %}", "'<image>' once.*0 times"),
        ("<image><image>{{ messages[0].content[-1].text }}", "'<image>' once.*2 times"),
        ("<image>{{ messages[0].content[0].type }}", "leaves out the question"),
        ("{{ messages + 'text' }}", "can't be rendered|can't be split.*TypeError"),
        ("{{ messages[0].content[-1].text }}<image>", "depends on the conversation"),
        ("{{ strftime_now('%d %b %Y') }}<image>{{ messages[0].content[-1].text }}", "on the date"),
        ("{{ 'many: ' if messages[1] }}<image>{{ messages[0].content }}", "depends on the conv"),
    ],
)
def test_templates_that_cannot_be_split(template: str, message: str, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "llava", "llava")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=message):
        teacher_from_folder(folder)


def test_a_date_after_the_image(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "llava", "llava")
    template = "<image>{{ strftime_now('%Y') }}{{ messages[0].content[-1].text }}"
    (folder / "chat_template.jinja").write_text(template)
    assert prompt_encoder(teacher_from_folder(folder)).encode_turn((), "what")
