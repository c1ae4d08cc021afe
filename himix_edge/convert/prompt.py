"""A vanilla model's prompts, cut at the image: ids ahead of it, a chat template for what follows.

On the device no text stands before the image's slots but the fixed one, and each turn is encoded by
itself. Tokenizers of Llama's kind write a "▁" before a piece of text, where it is the first or
follows a special token: here none does, and the template says where the model's own prompts have
one. Whether that gives the model's own ids is tried, not believed.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from himix_edge.contract import TOKENIZER, Chat
from himix_edge.errors import CheckpointError, HimixError
from himix_edge.export.chat import chat_from_template
from himix_edge.runtimes.tokenizer import Tokenizer

QUESTION, ANSWER, FURTHER = "QUESTION-0-SENTINEL", "ANSWER-0-SENTINEL", "QUESTION-1-SENTINEL"
TRIALS = (
    ("What is it?", "A red circle.", "And below it?"),
    ("<b>Où?</b>  {{ 1 }}\nSay it twice.", "At the top", "3 + 4 = ?"),
)


@dataclass(frozen=True)
class Conversation:
    """How a family writes a conversation about an image, and encodes it.

    Attributes:
        render: question, answer, question, ... -> the prompt for the next answer.
        encode: a prompt -> its ids, with `image_id` where the image is to be.
        image: what stands for the image in a prompt.
        opening: what the text after the image begins with beside what `render` writes there.
        by_itself: whether what follows the image is encoded apart from what precedes it.
    """

    render: Callable[[Sequence[str]], str]
    encode: Callable[[str], list[int]]
    image: str
    image_id: int
    opening: str = ""
    by_itself: bool = False


@dataclass(frozen=True)
class Prompt:
    """What a checkpoint must have so that a device writes a family's prompts.

    Attributes:
        prefix_ids: ahead of the image.
        tokenizer_json, chat_template: of what follows it.
    """

    prefix_ids: tuple[int, ...]
    tokenizer_json: str
    chat_template: str


def prompt_of(tokenizer_json: str, conversation: Conversation) -> Prompt:
    """Cuts a family's prompts at the image.

    Raises:
        CheckpointError: prompts that are more than fixed text around words, without the image or
            with several; or a tokenizer by which turns encoded one by one have other ids.
    """
    description: dict[str, Any] = json.loads(tokenizer_json)
    before, cue, space, between = _pieces(conversation)
    spaced = _Spaces(description, by_itself=conversation.by_itself)
    template = _template(
        spaced.at_start(spaced.within(conversation.opening + before)),
        spaced.before_answer(cue),
        space,
        spaced.within(between),
    )
    prompt = Prompt(
        prefix_ids=tuple(_ids_around_image(conversation, conversation.render([QUESTION]))[0]),
        tokenizer_json=json.dumps(_without_prepending(description), ensure_ascii=False),
        chat_template=template,
    )
    _try(prompt, conversation)
    return prompt


def encoder_of(tokenizer_json: str) -> Callable[[str, bool], list[int]]:
    """The tokenizer as it is: (text, whether BOS and the like are added) -> ids."""
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    return encode


def _pieces(conversation: Conversation) -> tuple[str, str, str, str]:
    """The text after the image: before a question, after it, before and after an answer."""
    first, cue = _split(_after_image(conversation, [QUESTION]), QUESTION)
    whole = _after_image(conversation, [QUESTION, ANSWER, FURTHER])
    _, rest = _split(whole, QUESTION)
    answered, rest = _split(rest, ANSWER)
    between, last = _split(rest, FURTHER)
    if last != cue:
        raise _unusable(f"{cue!r} after every question", whole)
    # Some templates write an old answer's role otherwise than that of the answer to come. On the
    # device the answer stays as it came, so there the latter is what stands before both.
    space = answered.removeprefix(cue) if answered.startswith(cue) else ""
    return first, cue, space, between


def _after_image(conversation: Conversation, words: Sequence[str]) -> str:
    return _split(conversation.render(words), conversation.image)[1]


def _split(text: str, words: str) -> tuple[str, str]:
    if text.count(words) != 1:
        raise _unusable(f"{words!r} in it once", text)
    before, _, after = text.partition(words)
    return before, after


class _Spaces:
    """Where a tokenizer that writes a "▁" of its own would do so in a turn.

    "▁" is what such tokenizers make of a space, so a space in the template stands for it.
    """

    def __init__(self, description: dict[str, Any], *, by_itself: bool) -> None:
        schemes = {_scheme(part) for part in _parts(description)} - {None}
        special = sorted((t["content"] for t in description["added_tokens"]), key=len, reverse=True)
        follows = "" if "prepend" in schemes else r"(?! )"  # Metaspace adds none to a space
        pattern = "|".join(map(re.escape, special))
        everywhere = bool(schemes & {"prepend", "always"}) and pattern
        self._after_special = re.compile(f"({pattern}){follows}") if everywhere else None
        self._at_start = bool(everywhere) or ("first" in schemes and by_itself)
        self._doubled = "prepend" in schemes

    def at_start(self, text: str) -> str:
        """What follows the image; when a special token does, the tokenizer adds nothing."""
        if not self._at_start or (self._after_special and self._after_special.match(text)):
            return text
        return text if text.startswith(" ") and not self._doubled else f" {text}"

    def within(self, text: str) -> str:
        """What words, or a further special token, follow."""
        return self._after_special.sub(r"\1 ", text) if self._after_special else text

    def before_answer(self, text: str) -> str:
        """What ends a prompt: the answer has its own "▁"."""
        spaced = self.within(text)
        return spaced if text.endswith(" ") else spaced.removesuffix(" ")


def _parts(description: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of normalizer and pre-tokenizer."""
    found: list[dict[str, Any]] = []
    for part in (description.get("normalizer"), description.get("pre_tokenizer")):
        if part is not None:
            found += part.get("normalizers", part.get("pretokenizers", [part]))
    return found


def _scheme(part: dict[str, Any]) -> str | None:
    """Which texts a step writes a "▁" before."""
    if part["type"] == "Prepend":
        return "prepend"
    if part["type"] == "Metaspace":
        old = "always" if part.get("add_prefix_space", True) else "never"
        scheme: str = part.get("prepend_scheme", old)
        return scheme
    return None


def _without_prepending(description: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer that writes no "▁" but for a space."""
    changed: dict[str, Any] = json.loads(json.dumps(description))
    for part in _parts(changed):
        if part["type"] == "Metaspace":
            part.pop("add_prefix_space", None)
            part["prepend_scheme"] = "never"
    normalizer = changed.get("normalizer")
    if normalizer and normalizer["type"] == "Prepend":
        changed["normalizer"] = None
    elif normalizer and "normalizers" in normalizer:
        kept = [part for part in normalizer["normalizers"] if part["type"] != "Prepend"]
        normalizer["normalizers"] = kept
    return changed


def _template(before: str, cue: str, space: str, between: str) -> str:
    """The pieces as a Jinja chat template, for plain texts as contents."""
    before, cue, space, between = (
        json.dumps(piece, ensure_ascii=False) for piece in (before, cue, space, between)
    )
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ " + space + " + message['content'] }}"
        "{% else %}{{ " + before + " if loop.first else " + between + " }}"
        "{{ message['content'] }}{{ " + cue + " }}{% endif %}{% endfor %}"
    )


def _try(prompt: Prompt, conversation: Conversation) -> None:
    """Encodes some conversations as the device will, and as the family does."""
    tokenizer, chat = _on_device(prompt)
    opening = [conversation.image_id] if conversation.opening else []
    for question, answer, further in TRIALS:
        prefix, text = _ids_around_image(conversation, conversation.render([question]))
        turn = tokenizer.encode_turn(chat.first, question)
        if (prefix, opening + text) != (list(prompt.prefix_ids), turn):
            raise _other_ids(question, prefix + text, [*prompt.prefix_ids, *turn])
        whole = conversation.render([question, answer, further])
        answered = conversation.encode(whole[: whole.rindex(answer) + len(answer)])
        turn = tokenizer.encode_turn(chat.next, further)
        if (ids := conversation.encode(whole)) != [*answered, *turn]:
            raise _other_ids(further, ids, [*answered, *turn])


def _on_device(prompt: Prompt) -> tuple[Tokenizer, Chat]:
    try:
        chat = chat_from_template(prompt.chat_template)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / TOKENIZER
            path.write_text(prompt.tokenizer_json, encoding="utf-8")
            return Tokenizer(path, chat), chat
    except HimixError as error:
        raise _unusable("fixed text around the words", str(error)) from error


def _ids_around_image(conversation: Conversation, text: str) -> tuple[list[int], list[int]]:
    ids = conversation.encode(text)
    if ids.count(conversation.image_id) != 1:
        raise _unusable(f"the image's id {conversation.image_id} once", str(ids))
    place = ids.index(conversation.image_id)
    return ids[:place], ids[place + 1 :]


def _unusable(expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        "the model's prompts can't be cut at the image",
        expected=expected,
        found=found if found.startswith("[") else repr(found),
        fix="give the folder a chat_template.jinja that puts one image before the first question, "
        "and the same text around every question",
    )


def _other_ids(words: str, expected: list[int], found: list[int]) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer encodes {words!r} by itself otherwise than within its prompt",
        expected=str(expected),
        found=str(found),
        fix="none: himix-edge does not have this kind of tokenizer",
    )
