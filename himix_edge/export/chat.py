"""A Jinja chat template taken apart, so that a device puts prompts together without Jinja."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from himix_edge.contract import Chat, Turn
from himix_edge.errors import ExportError

Render = Callable[[Sequence[str]], str]  # question, answer, question, ... -> the prompt

SENTINELS = ("QUESTION-0-SENTINEL", "ANSWER-0-SENTINEL", "QUESTION-1-SENTINEL")
# What the pieces must reproduce: three turns, with words a template might treat in its own way.
TRIAL = (
    "What is it?",
    "A red circle.\nAnd, below it, a blue one.",
    "<b>Où?</b> {{ 1 }}",
    "It's at the top.",
    "system",
)


def chat_from_template(template: str, *, bos_token: str = "", eos_token: str = "") -> Chat:
    """What a chat template writes around a conversation's first question, and around later ones.

    The template is rendered as transformers' `apply_chat_template` renders it, for the next answer
    and without tools. A date in it becomes that of the export.

    Args:
        bos_token, eos_token: what the template calls by these names.

    Raises:
        ExportError: a template that can't be rendered, or that is more than pieces around words:
            put together again, they don't give what it gives for one, two and three turns.
    """
    render = _renderer(template, bos_token, eos_token)
    first, answer, second = SENTINELS
    before, cue = _split(render([first]), first)
    whole = render([first, answer, second])
    opening, rest = _split(whole, first)
    answered, rest = _split(rest, answer)
    chat = Chat(Turn(before, cue), Turn(*_split(rest, second)))

    # A cue like Vicuna's "ASSISTANT:" leaves it to the answer to begin with a space.
    space = answered.removeprefix(cue)
    if opening != before or not answered.startswith(cue) or space.strip():
        raise _inseparable(f"around the first question {before!r} and {cue!r}", whole)
    for turns in (1, 2, 3):
        words = TRIAL[: 2 * turns - 1]
        if (rendered := render(words)) != (pieces := _joined(chat, space, words)):
            raise _inseparable(repr(pieces), rendered)
    return chat


def _joined(chat: Chat, space: str, words: Sequence[str]) -> str:
    """The whole conversation as a runtime writes it, turn after turn."""
    text = chat.first.before + words[0] + chat.first.after
    for answer, question in zip(words[1::2], words[2::2], strict=True):
        text += space + answer + chat.next.before + question + chat.next.after
    return text


def _renderer(template: str, bos_token: str, eos_token: str) -> Render:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)

    def render(words: Sequence[str]) -> str:
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": content}
            for i, content in enumerate(words)
        ]
        context: dict[str, Any] = {
            "messages": messages,
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
            "bos_token": bos_token,
            "eos_token": eos_token,
        }
        try:
            return environment.from_string(template).render(context)
        except Exception as error:  # a template is a program, it may raise anything
            raise ExportError(
                "the chat template can't be rendered",
                expected="one that takes user and assistant messages in turn",
                found=f"{type(error).__name__}: {error}",
            ) from error

    return render


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _split(text: str, words: str) -> tuple[str, str]:
    """What stands before and after `words`, which must stand in `text` exactly once."""
    if text.count(words) != 1:
        raise _inseparable("every message in it exactly once, in order", text)
    before, _, after = text.partition(words)
    return before, after


def _inseparable(expected: str, rendered: str) -> ExportError:
    return ExportError(
        "the chat template is more than fixed text around the messages",
        expected=expected,
        found=repr(rendered),
        fix="write one that puts the same text around every later turn, or drop its special cases",
    )
