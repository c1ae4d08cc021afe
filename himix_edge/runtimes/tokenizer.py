"""Text to token ids within the chat template, and token ids back to text as they come."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from himix_edge.contract import Chat, Turn
from himix_edge.errors import BundleError, PromptError

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders make of part of a character
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # one byte of a character that the vocabulary lacks


class Tokenizer:
    """A bundle's tokenizer and chat template.

    A control token is one that is special (save that for unknown characters), or that the template
    uses. Only the template writes them: what looks like one in the user's words is plain text.

    Attributes:
        vocab_size: one more than the largest id.
    """

    def __init__(self, path: Path, chat: Chat) -> None:
        """Reads `tokenizer.json`.

        Raises:
            BundleError: a file that isn't one.
        """
        template = "".join((chat.first.before, chat.first.after, chat.next.before, chat.next.after))
        try:
            text = path.read_text(encoding="utf-8")
            description = json.loads(text)
            added, unknown = description["added_tokens"], _unknown_token(description["model"])
            controls = [
                token
                for token in added
                if (token["special"] or token["content"] in template)
                and token["content"] != unknown
            ]
            self._hidden = {token["id"] for token in added if token["special"]}
            self._controls = {token["id"] for token in controls}
            self.vocab_size = 1 + max([*_ids(description["model"]), *(t["id"] for t in added)])
            self._text = text
            self._tokenizer = _tokenizer_from(text)
        except Exception as error:  # of a bad file, `tokenizers` raises bare Exceptions
            raise BundleError(
                f"cannot read {path}",
                expected="a tokenizer.json of the tokenizers package",
                found=next(iter(str(error).splitlines()), type(error).__name__),
                fix="copy the bundle again, or export it again with: himix-edge export",
            ) from error
        self.chat = chat

    @functools.cached_property
    def _plain_tokenizer(self) -> tokenizers.Tokenizer:
        """The same, by which control tokens are plain text; made for the first who writes one."""
        description = json.loads(self._text)
        for token in description["added_tokens"]:
            token["special"] |= token["id"] in self._controls
        tokenizer = _tokenizer_from(json.dumps(description))
        tokenizer.encode_special_tokens = True
        return tokenizer

    def encode_turn(self, turn: Turn, words: str) -> list[int]:
        """The user's words as one turn of a conversation.

        Without control tokens in the words these are the ids of `before + words + after` in one
        piece, as in training; with some, the words are encoded by themselves, as plain text.

        Raises:
            PromptError: words that spell a control token and can't be encoded in another way, or
                that are not Unicode.
        """
        try:
            whole = turn.before + words + turn.after
            encoding = self._tokenizer.encode(whole, add_special_tokens=False)
        except TypeError as error:  # lone surrogates
            raise PromptError(
                "the prompt is no text", expected="Unicode", fix="write it in UTF-8"
            ) from error
        start, end = len(turn.before), len(turn.before) + len(words)
        if not any(
            token in self._controls and left < end and right > start
            for token, (left, right) in zip(encoding.ids, encoding.offsets, strict=True)
        ):
            return encoding.ids
        plain = self._plain_tokenizer.encode(words, add_special_tokens=False)
        if smuggled := [t for t in plain.ids if t in self._controls]:
            raise PromptError(
                "the prompt holds a control token of the model",
                found=repr(self._tokenizer.id_to_token(smuggled[0])),
                fix="write it in another way",
            )
        before, after = (
            self._tokenizer.encode(text, add_special_tokens=False).ids
            for text in (turn.before, turn.after)
        )
        return [*before, *plain.ids, *after]

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def is_hidden(self, token: int) -> bool:
        """Whether `decode` leaves the token out."""
        return token in self._hidden

    def is_byte(self, token: int) -> bool:
        """Whether the token is one byte of a character, in vocabularies that fall back to bytes."""
        return BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token) or "") is not None


class Detokenizer:
    """Token ids to text as they come; the pieces together are the text of all ids together.

    No piece ends within a character. What a token means depends on those before it (a leading
    space, the bytes of one character), so each piece is the difference between two decodings that
    begin at the same token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the tokens of the last piece, then those without a piece yet
        self._shown = 0  # how many of them are of the last piece

    def push(self, token: int) -> str:
        """The text that one more token completes, "" while a character is incomplete."""
        if self._tokenizer.is_hidden(token):
            return ""
        self._ids.append(token)
        return "" if self._tokenizer.is_byte(token) else self._piece(whole=False)

    def flush(self) -> str:
        """What is left when no more tokens come."""
        return self._piece(whole=True)

    def _piece(self, *, whole: bool) -> str:
        text = self._tokenizer.decode(self._ids)
        if text.endswith(INCOMPLETE) and not whole:
            return ""
        piece = text[len(self._tokenizer.decode(self._ids[: self._shown])) :]
        if piece:
            self._ids = self._ids[self._shown :]
            self._shown = len(self._ids)
        return piece


def _unknown_token(model: dict[str, Any]) -> str | None:
    """What the model writes for a character it lacks: no way to control anything."""
    if model.get("unk_id") is not None:  # Unigram
        return str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")


def _ids(model: dict[str, Any]) -> Iterable[int]:
    vocab = model["vocab"]
    return vocab.values() if isinstance(vocab, dict) else range(len(vocab))  # Unigram's is a list


def _tokenizer_from(text: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
