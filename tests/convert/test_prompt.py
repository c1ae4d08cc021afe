"""Prompts cut at the image, in every way that tokenizers begin a piece of text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Tokenizers
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from himix_edge.convert.prompt import Conversation, Prompt, encoder_of, prompt_of
from himix_edge.convert.source import teacher_from_folder
from himix_edge.errors import CheckpointError
from himix_edge.export.chat import chat_from_template
from himix_edge.runtimes.tokenizer import Tokenizer
from tests.convert.llava import (
    CHATML,
    IMAGE,
    bytelevel_tokenizer,
    metaspace_tokenizer,
    write_tiny_llava,
)

QUESTIONS = ("Describe a red circle.", "a\n  b", "USER: 3 < 4?")


def conversation(tokenizer: Tokenizers, form: str = "vicuna") -> Conversation:
    """The simplest family: "vicuna", or with "</s>" after answers, or words right after tokens."""
    encoded, image_id = encoder_of(tokenizer.to_str()), tokenizer.token_to_id(IMAGE)

    def render(words: Sequence[str]) -> str:
        text = "System. "
        for i, word in enumerate(words):
            if i % 2:
                text += {"vicuna": f" {word} ", "eos": f" {word}</s>", "bare": f"{word}</s>"}[form]
            else:
                cue = "<s>" if form == "bare" else "ASSISTANT:"
                start = "" if form == "bare" else "USER: "
                text += f"{start}{IMAGE if i == 0 else ''}{word} {cue}"
        return text

    return Conversation(render, lambda text: encoded(text, True), IMAGE, image_id or -1)


def on_device(prompt: Prompt, folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(prompt.tokenizer_json, encoding="utf-8")
    return Tokenizer(path, chat_from_template(prompt.chat_template))


@pytest.mark.parametrize("scheme", ["legacy", "first", "always", "never"])
@pytest.mark.parametrize("form", ["vicuna", "eos", "bare"])
def test_turns_have_the_ids_of_the_whole(scheme: str, form: str, tmp_path: Path) -> None:
    original = metaspace_tokenizer([IMAGE], scheme)
    family = conversation(original, form)
    prompt = prompt_of(original.to_str(), family)
    device = on_device(prompt, tmp_path)
    for question in QUESTIONS:
        whole = original.encode(family.render([question])).ids
        turn = device.encode_turn(device.chat.first, question)
        assert [*prompt.prefix_ids, family.image_id, *turn] == whole
        text = family.render(["Q", "A red circle.", question])
        answered = original.encode(text[: text.index("circle.") + len("circle.")]).ids
        turn = device.encode_turn(device.chat.next, question)
        assert [*answered, *turn] == original.encode(text).ids


@pytest.mark.parametrize("scheme", ["legacy", "first"])
def test_text_encoded_by_itself(scheme: str, tmp_path: Path) -> None:
    """TinyLLaVA's way: each part as a text of its own, whatever the tokenizer's age."""
    original = metaspace_tokenizer(None, scheme)
    encode = original.encode

    def chunks(text: str) -> list[int]:
        before, after = text.split(IMAGE)
        return [*encode(before).ids, -200, *encode(after).ids[1:]]  # BOS but once

    render = conversation(metaspace_tokenizer([IMAGE]), "eos").render
    family = Conversation(render, chunks, IMAGE, -200, by_itself=True)
    prompt = prompt_of(original.to_str(), family)
    device = on_device(prompt, tmp_path)
    for question in QUESTIONS:
        turn = device.encode_turn(device.chat.first, question)
        assert [*prompt.prefix_ids, -200, *turn] == chunks(family.render([question]))
        assert str(original.id_to_token(turn[0])).startswith("▁")


def test_answers_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    """OneVision's kind: the prefix is ChatML's, the text begins with the image's token."""
    folder = write_tiny_llava(tmp_path / "llava_onevision")
    source = teacher_from_folder(folder)
    tokenizer_class: Any = PreTrainedTokenizerFast
    stock = tokenizer_class.from_pretrained(folder)
    prefix = "<|im_start|>system\nThere is a picture. Describe it.<|im_end|><|im_start|>user "
    assert list(source.prefix_ids) == stock(prefix).input_ids
    chat = chat_from_template(source.chat_template)
    assert chat.first.before == "<image>\n"
    assert chat.first.after == "<|im_end|><|im_start|>assistant\n"
    assert chat.next.before == "<|im_end|><|im_start|>user \n"


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
        ("{% for m in messages %}{{ m.content[-1].text }}{% endfor %}", "'<image>' in it once"),
        ("<image><image>{{ messages[0].content[-1].text }}", "'<image>' in it once"),
        ("<image>{{ messages[0].content[-1].text }}", "'ANSWER-0-SENTINEL' in it once"),
        ("{{ messages + 'text' }}", "can't be rendered.*TypeError"),
        (
            "<image>{% for m in messages %}{{ m.content[-1].text | upper }}{% endfor %}",
            "fixed text around|other|once",
        ),
    ],
)
def test_templates_that_cannot_be_cut(template: str, message: str, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "llava", "llava")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=message):
        teacher_from_folder(folder)


def test_a_tokenizer_that_cannot_be_adapted() -> None:
    """It strips what it is given, a whole prompt or a turn: we have no such, and find out."""
    original = bytelevel_tokenizer()
    original.normalizer = normalizers.Strip()
    original.add_special_tokens(["<s>", "</s>"])
    with pytest.raises(CheckpointError, match="by itself otherwise than within its prompt"):
        prompt_of(original.to_str(), conversation(original))
