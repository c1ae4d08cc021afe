"""Text to token ids within the chat template, and token ids back to text as they come."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from himix_edge.contract import CHAT_TEMPLATE, TOKENIZER, Chat, ImagePlace
from himix_edge.errors import BundleError, HimixError, PromptError
from himix_edge.runtimes.chat import ChatTemplate, History, user_message

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders make of part of a character
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # one byte of a character that the vocabulary lacks


class Tokenizer:
    """A bundle's tokenizer and chat template.

    Attributes:
        chat: the chat template, and what goes with it.
        vocab_size: one more than the largest id.
    """

    def __init__(self, path: Path, chat: ChatTemplate) -> None:
        """Reads `tokenizer.json`.

        Raises:
            BundleError: a file that isn't one.
        """
        try:
            text = path.read_text(encoding="utf-8")
            description = json.loads(text)
            added = description["added_tokens"]
            self._hidden = {token["id"] for token in added if token["special"]}
            self.vocab_size = 1 + max([*_ids(description["model"]), *(t["id"] for t in added)])
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode_special_tokens = chat.chat.split_special_tokens
        except Exception as error:  # of a bad file, `tokenizers` raises bare Exceptions
            raise BundleError(
                f"cannot read {path}",
                expected="a tokenizer.json of the tokenizers package",
                found=next(iter(str(error).splitlines()), type(error).__name__),
                fix="copy the bundle again, or export it again with: himix-edge export",
            ) from error
        self.chat = chat

    @classmethod
    def from_folder(cls, folder: Path, chat: Chat) -> Tokenizer:
        """Reads the tokenizer and the chat template of a bundle.

        Raises:
            BundleError: files that are missing or can't be used.
        """
        try:
            template = (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(
                f"cannot read {folder / CHAT_TEMPLATE}",
                found=str(error),
                fix="copy the bundle again, or export it again with: himix-edge export",
            ) from error
        return cls(folder / TOKENIZER, ChatTemplate(template, chat))

    def encode_turn(self, history: History, words: str) -> list[int]:
        """The ids of the prompt that asks `words` after these messages; see `encode_chat`."""
        return self.encode_chat([*history, user_message(words)])

    def encode_chat(self, messages: History) -> list[int]:
        """The ids that a conversation puts into the decoder after the image.

        They equal those of transformers' `apply_chat_template`, or where the template places an
        image, of the model's own processor, without what stands ahead of the image and for it.

        Raises:
            PromptError: text that is not Unicode; messages that the template refuses; or that write
                another image, or change the text ahead of it.
        """
        try:
            text = self.chat.render(messages)
            place = self.chat.chat.image
            return self._ids_after_image(text, place) if place else self.encode(text)
        except (TypeError, UnicodeEncodeError) as error:  # lone surrogates
            raise PromptError(
                "the prompt is no text", expected="Unicode", fix="write it in UTF-8"
            ) from error
        except HimixError:
            raise
        except Exception as error:  # of words that it lacks, `tokenizers` raises bare Exceptions
            raise PromptError(
                "the tokenizer can't encode the prompt",
                expected="words of its vocabulary",
                found=next(iter(str(error).splitlines()), type(error).__name__),
            ) from error

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text by itself."""
        text.encode("utf-8")  # raises where tokenizers 0.20 would encode something else
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _ids_after_image(self, text: str, place: ImagePlace) -> list[int]:
        prefix, rest = self.split_at_image(text, place)
        if prefix != list(place.prefix_ids):
            raise PromptError(
                "this bundle can't change the text ahead of the image",
                expected=repr(self._tokenizer.decode(place.prefix_ids, skip_special_tokens=False)),
                found=repr(self._tokenizer.decode(prefix, skip_special_tokens=False)),
                fix="leave out the system prompt, or put it into the question",
            )
        return [*place.opening_ids, *rest]

    def split_at_image(self, text: str, place: ImagePlace) -> tuple[list[int], list[int]]:
        """The ids of a rendered conversation before and after the image.

        Raises:
            PromptError: no image in it, or more than one.
        """
        if place.token_id is None:
            parts = text.split(place.placeholder)
            ids = [
                self.encode(part, add_special_tokens=place.adds_special_tokens and i == 0)
                for i, part in enumerate(parts)
            ]
        else:
            ids = [[]]
            for token in self.encode(
                text, add_special_tokens=self._adds_special_tokens(text, place)
            ):
                if token == place.token_id:
                    ids.append([])
                else:
                    ids[-1].append(token)
        if len(ids) != 2:
            raise PromptError(
                "a conversation has one image, ahead of the first question",
                expected=f"{place.placeholder!r} once, written by the chat template",
                found=f"{len(ids) - 1} times",
                fix=f"ask without writing {place.placeholder!r}",
            )
        return ids[0], ids[1]

    def _adds_special_tokens(self, text: str, place: ImagePlace) -> bool:
        bos = self.chat.chat.special_tokens.get("bos_token")
        return place.adds_special_tokens and not (bos is not None and text.startswith(bos))

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


def _ids(model: dict[str, Any]) -> Iterable[int]:
    vocab = model["vocab"]
    return vocab.values() if isinstance(vocab, dict) else range(len(vocab))  # Unigram's is a list
