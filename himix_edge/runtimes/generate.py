"""The loop: prefill, sample, decode; then its tokens as text."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np

from himix_edge.runtimes.base import Engine, FloatArray
from himix_edge.runtimes.kvcache import Cache
from himix_edge.runtimes.tokenizer import Detokenizer

FinishReason = Literal["stop", "length", "cancelled"]
TokenStream: TypeAlias = Generator[int, None, FinishReason]


def generate(
    engine: Engine,
    cache: Cache,
    text: list[int],
    sample: Callable[[FloatArray, Sequence[int]], int],
    end: Collection[int],
    max_tokens: int,
) -> TokenStream:
    """Goes on with a text about the image in the cache.

    What the cache has not seen of the text is its prompt: prefill takes it at once, decode then
    each token chosen last. So a further turn is another `generate` on the same cache and a longer
    text.

    Args:
        text: all token ids of the conversation, at least one more than the cache has seen; every
            token chosen is put at its end.
        sample: logits [V] and the text -> the next token.
        end: tokens that end the answer; they become no part of the text.
        max_tokens: at most as many as the cache has room for after the prompt.

    Yields:
        token ids; the generator's return value says why they ended.
    """
    unseen = np.array([text[cache.text_length :]], dtype=np.int64)  # [1, M]
    logits = engine.prefill(unseen, cache)
    for count in range(1, max_tokens + 1):
        token = sample(logits[0], text)
        if token in end:
            return "stop"
        text.append(token)
        yield token
        if count < max_tokens:
            logits = engine.step(np.array([[token]], dtype=np.int64), cache)  # decode
    return "length"


class Answer(Iterator[str]):
    """An answer's text, piece by piece while it is made; the attributes are final when it ends.

    `for piece in answer` makes it in the thread that reads it, `async for piece in answer` in a
    thread of asyncio's. `cancel` and `close` may be called from any thread.

    Attributes:
        text: the pieces so far.
        prompt_tokens: of the whole conversation up to this answer, template included, image not.
        cached_tokens: how many of them were in the cache from an earlier turn or question.
        tokens: how many were generated, the end token not counted.
        finish_reason: "stop" (an end token or a stop string), "length" (max_tokens, or the context
            is full), "cancelled", or None while it is not at its end.
        milliseconds: by phase; "prefill" up to the first token, "decode" all later ones.
    """

    def __init__(
        self,
        token_stream: TokenStream,
        detokenizer: Detokenizer,
        stop: Sequence[str],
        prompt_tokens: int,
        cached_tokens: int = 0,
    ) -> None:
        self.text = ""
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = cached_tokens
        self.tokens = 0
        self.finish_reason: FinishReason | None = None
        self.milliseconds = {"prefill": 0.0, "decode": 0.0}
        self._pieces = self._stream(token_stream, detokenizer, StopStrings(stop))
        self._cancelled = False
        # Held while a piece is made. Reentrant, as a signal's handler may cancel within `next`.
        self._making = threading.RLock()
        self._is_making = False

    def __repr__(self) -> str:
        return f"<Answer {self.text!r}, finish_reason={self.finish_reason!r}>"

    def __next__(self) -> str:
        with self._making:
            self._is_making = True
            try:
                piece = next(self._pieces)
            finally:
                self._is_making = False
                if self._cancelled:
                    self._end()
            self.text += piece
            return piece

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        """The pieces, each made in another thread; a task that is cancelled cancels the answer."""
        import asyncio

        try:
            while (piece := await asyncio.to_thread(next, self, None)) is not None:
                yield piece
        except asyncio.CancelledError:
            self.cancel()
            raise

    def read(self) -> str:
        """The whole text, once it is all there."""
        for _ in self:
            pass
        return self.text

    def cancel(self) -> None:
        """Ends the answer before its next token, and returns at once."""
        self._cancelled = True
        if self._making.acquire(blocking=False):  # nobody makes a piece that would see it
            try:
                self._end()
            finally:
                self._making.release()

    def close(self) -> None:
        """Ends the answer where it is, and returns when the token in the making is done."""
        self._cancelled = True
        with self._making:
            self._end()

    def _end(self) -> None:
        if self._is_making:  # called within this thread's own `next`, which ends it
            return
        self._pieces.close()
        self.finish_reason = self.finish_reason or "cancelled"

    def _stream(
        self, token_stream: TokenStream, detokenizer: Detokenizer, stop: StopStrings
    ) -> Generator[str, None, None]:
        phase = "prefill"
        while self.finish_reason is None:
            if self._cancelled:
                self.finish_reason = "cancelled"
                return
            try:
                with timed(self.milliseconds, phase):
                    token = next(token_stream)
                phase = "decode"
                self.tokens += 1
                piece = stop.push(detokenizer.push(token))
            except StopIteration as end:
                self.finish_reason = end.value
                piece = stop.push(detokenizer.flush()) + stop.flush()
            if stop.found:
                self.finish_reason = "stop"
            if piece:
                yield piece


class StopStrings:
    """Lets text through up to the first stop string; `found` then says so.

    A text that may be the beginning of a stop string is held back until that is decided. Where stop
    strings overlap, the one that is complete first counts, whichever way the text comes in pieces;
    of several that are complete at once, the longest.

    The beginnings of all stop strings are the states of an automaton (Aho and Corasick, 1975): each
    character of a text costs the same, whatever the number and length of the stop strings.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.found = False
        self._held = ""
        self._state = 0  # the longest beginning of a stop string that the text ends in
        self._next: list[dict[str, int]] = [{}]  # by character: the beginning that is one longer
        self._length = [0]  # of each beginning
        self._shorter = [0]  # the next shorter beginning that it ends in
        self._complete = [0]  # the length of the longest stop string that it ends in
        for string in stop:
            self._add(string)
        self._link()

    def _add(self, string: str) -> None:
        state = 0
        for character in string:
            following = self._next[state].setdefault(character, len(self._next))
            if following == len(self._next):
                self._next.append({})
                self._length.append(self._length[state] + 1)
                self._shorter.append(0)
                self._complete.append(0)
            state = following
        self._complete[state] = len(string)

    def _link(self) -> None:
        states = list(self._next[0].values())
        for state in states:  # the list grows: shorter beginnings first
            for character, longer in self._next[state].items():
                shorter = self._shorter[longer] = self._after(self._shorter[state], character)
                self._complete[longer] = self._complete[longer] or self._complete[shorter]
                states.append(longer)

    def _after(self, state: int, character: str) -> int:
        """The longest beginning that a text ends in after one more character."""
        while state and character not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(character, 0)

    def push(self, piece: str) -> str:
        """The text that is safe to show, after one more piece."""
        text = self._held + piece
        for end, character in enumerate(piece, len(self._held) + 1):
            self._state = self._after(self._state, character)
            if complete := self._complete[self._state]:
                self.found = True
                self._held = ""
                return text[: end - complete]
        cut = len(text) - self._length[self._state]
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return text


@contextlib.contextmanager
def timed(milliseconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the block's duration to its phase."""
    start = time.perf_counter()
    try:
        yield
    finally:
        milliseconds[phase] = milliseconds.get(phase, 0.0) + 1e3 * (time.perf_counter() - start)
