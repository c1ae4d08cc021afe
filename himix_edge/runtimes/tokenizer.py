"""Text to token ids within the chat template, and token ids back to text as they come."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from himix_edge.bundle.files import BundleFiles
from himix_edge.contract import (
    CHAT_TEMPLATE,
    TOKENIZER,
    Chat,
    ImagePlace,
)
from himix_edge.errors import BundleError, HimixError, PromptError
from himix_edge.runtimes.chat import ChatTemplate, History, user_message
from himix_edge.tokenizer_json import MAX_BYTES, panics_as_exceptions, read_tokenizer_json

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders make of part of a character
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # one byte of a character that the vocabulary lacks
MAX_PROMPT = 1_000_000  # characters of a text that is tokenized, at about 200 bytes of memory each
MAX_NORMALIZED = 20_000_000  # ... after a normalizer that lengthens it


class Tokenizer:
    """A bundle's tokenizer and chat template.

    Attributes:
        chat: the chat template, and what goes with it.
        vocab_size: one more than the largest id.
    """

    def __init__(self, data: bytes | str, chat: ChatTemplate, where: Path) -> None:
        """Reads the contents of a `tokenizer.json`.

        Args:
            where: the file that has them, for errors.

        Raises:
            BundleError: they are no tokenizer, or one that no device should read.
        """
        try:
            self._read = read_tokenizer_json(data)
            self._read.tokenizer.encode_special_tokens = chat.chat.split_special_tokens
        except ValueError as error:
            raise _unreadable(where, error) from error
        self._text = (
            data if isinstance(data, str) else data.decode()
        )  # what is used, for whoever asks
        self._tokenizer = self._read.tokenizer
        self.vocab_size = self._read.size
        self.chat = chat

    @classmethod
    def from_folder(cls, folder: Path, chat: Chat) -> Tokenizer:
        """Reads the tokenizer and the chat template of a bundle.

        Raises:
            BundleError: files that are missing or can't be used.
        """
        data = _read(folder / TOKENIZER)
        try:
            template = _read(folder / CHAT_TEMPLATE).decode()
        except UnicodeDecodeError as error:
            raise _unreadable(folder / CHAT_TEMPLATE, error) from error
        return cls(data, ChatTemplate(template, chat), folder / TOKENIZER)

    @classmethod
    def from_bundle(cls, files: BundleFiles) -> Tokenizer:
        """Likewise, of files that are compared with the manifest.

        Raises:
            BundleError: files that are corrupt or can't be used.
        """
        try:
            template = files.read(CHAT_TEMPLATE).decode()
        except UnicodeDecodeError as error:
            raise _unreadable(files.path / CHAT_TEMPLATE, error) from error
        chat = ChatTemplate(template, files.manifest.chat)
        return cls(files.read(TOKENIZER), chat, files.path / TOKENIZER)

    def encode_turn(
        self, history: History, words: str, most_tokens: int | None = None
    ) -> list[int]:
        """The ids of the prompt that asks `words` after these messages; see `encode_chat`."""
        return self.encode_chat([*history, user_message(words)], most_tokens)

    def encode_chat(self, messages: History, most_tokens: int | None = None) -> list[int]:
        """The ids that a conversation puts into the decoder after the image.

        They equal those of transformers' `apply_chat_template`, or where the template places an
        image, of the model's own processor, without what stands ahead of the image and for it.

        Args:
            most_tokens: how many the context holds. A text that can't be as few is refused before
                it is tokenized.

        Raises:
            PromptError: text that is not Unicode, or too long; messages that the template refuses;
                or that write another image, or change the text ahead of it.
        """
        try:
            self._require_short(sum(len(message["content"]) for message in messages), MAX_PROMPT)
            text = self.chat.render(messages)
            self._require_short(len(text), self.most_characters(most_tokens))
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
        """The ids of a text by itself.

        Raises:
            PromptError: a text that is too long.
            Exception: whatever tokenizers raises, of a text that it can't encode.
        """
        self._require_short(len(text), self.most_characters())
        text.encode("utf-8")  # raises where tokenizers 0.20 would encode something else
        with panics_as_exceptions():
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def most_characters(self, tokens: int | None = None) -> int:
        """How long a text may be that is tokenized.

        A text of so many tokens is never longer. Of most tokenizers nothing better than
        MAX_PROMPT is known: one token may stand for a long unknown word, or for none of its spaces.

        Args:
            tokens: how many it may become; None for any number.
        """
        most = min(MAX_PROMPT, MAX_NORMALIZED // self._read.growth)
        if tokens is None or not self._read.keeps_text:
            return most
        return min(most, tokens * self._read.longest)

    def _require_short(self, length: int, most: int) -> None:
        if length > most:
            raise PromptError(
                "the prompt is too long",
                expected=f"at most {most:,} characters, template and earlier turns included",
                found=f"{length:,}",
                fix="shorten it, or begin a new conversation",
            )

    def _ids_after_image(self, text: str, place: ImagePlace) -> list[int]:
        prefix, rest = self.split_at_image(text, place)
        if prefix != list(place.prefix_ids):
            raise PromptError(
                "this bundle can't change the text ahead of the image",
                expected=repr(self._decoded(place.prefix_ids)),
                found=repr(self._decoded(prefix)),
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
        return self._decoded(ids, skip_special_tokens=True)

    def _decoded(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        try:
            with panics_as_exceptions():
                text: str = self._tokenizer.decode(
                    list(ids), skip_special_tokens=skip_special_tokens
                )
                return text
        except Exception as error:
            raise BundleError(
                "the tokenizer can't decode an answer",
                expected="token ids that its decoder takes",
                found=next(iter(str(error).splitlines()), type(error).__name__),
                fix="export the checkpoint again with the tokenizer it was trained with",
            ) from error

    def is_hidden(self, token: int) -> bool:
        """Whether `decode` leaves the token out."""
        return token in self._read.special

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


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> BundleError:
    return BundleError(
        f"cannot read {path}",
        expected="a tokenizer.json of the tokenizers package" if path.name == TOKENIZER else None,
        found=str(error),
        fix="copy the bundle again, or export it again with: himix-edge export",
    )
