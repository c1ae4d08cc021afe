"""The loop: prefill, sample, decode; then its tokens as text."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np

from himix_edge.runtimes.base import Engine, FloatArray
from himix_edge.runtimes.kvcache import Cache
from himix_edge.runtimes.tokenizer import Detokenizer

FinishReason = Literal["stop", "length"]
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

    Whatever of the text the cache has not seen is fed first: at the beginning the prompt, from then
    on the token chosen last. So a further turn is another `generate` on the same cache and text.

    Args:
        text: all token ids of the conversation; every token chosen is put at its end.
        sample: logits [V] and the text -> the next token.
        end: tokens that end the answer; they become no part of the text.
        max_tokens: at most as many as the cache has room for after the prompt.

    Yields:
        token ids; the generator's return value says why they ended.
    """
    feed = engine.prefill
    for _ in range(max_tokens):
        unseen = np.array([text[cache.text_length :]], dtype=np.int64)  # [1, M]
        logits = feed(unseen, cache)
        feed = engine.step
        token = sample(logits[0], text)
        if token in end:
            return "stop"
        text.append(token)
        yield token
    return "length"


class Answer(Iterator[str]):
    """An answer's text, piece by piece while it is made; the attributes are final when it ends.

    Attributes:
        text: the pieces so far.
        prompt_tokens: of this turn, template included.
        tokens: how many were generated, the end token not counted.
        finish_reason: "stop" (an end token or a stop string), "length" (max_tokens, or the context
            is full), or None while it is not at its end.
        milliseconds: by phase; "prefill" up to the first token, "decode" all later ones.
    """

    def __init__(
        self,
        token_stream: TokenStream,
        detokenizer: Detokenizer,
        stop: Sequence[str],
        prompt_tokens: int,
    ) -> None:
        self.text = ""
        self.prompt_tokens = prompt_tokens
        self.tokens = 0
        self.finish_reason: FinishReason | None = None
        self.milliseconds = {"prefill": 0.0, "decode": 0.0}
        self._pieces = self._stream(token_stream, detokenizer, StopStrings(stop))

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def read(self) -> str:
        """The whole text, once it is all there."""
        for _ in self:
            pass
        return self.text

    def close(self) -> None:
        """Ends the answer where it is."""
        self._pieces.close()

    def _stream(
        self, token_stream: TokenStream, detokenizer: Detokenizer, stop: StopStrings
    ) -> Generator[str, None, None]:
        phase = "prefill"
        while self.finish_reason is None:
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
    strings overlap, the one that is complete first counts, whichever way the text comes in pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.found = False
        self._stop = stop
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is safe to show, after one more piece."""
        text, self._held = self._held + piece, ""
        matches = [(start + len(s), start) for s in self._stop if (start := text.find(s)) >= 0]
        if matches:
            self.found = True
            return text[: min(matches)[1]]
        beginnings = (s[:n] for s in self._stop for n in range(1, len(s)))
        held = max((len(b) for b in beginnings if text.endswith(b)), default=0)
        cut = len(text) - held
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
