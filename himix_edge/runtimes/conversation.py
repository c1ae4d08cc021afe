"""Turn after turn about an image, on one cache.

Every turn renders the whole conversation with the chat template, as if it were asked for the first
time. Of its ids the cache keeps the longest prefix that it has already seen, and the rest is
prefilled.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from himix_edge.contract import Chat
from himix_edge.errors import ConfigError, PromptError
from himix_edge.runtimes.base import BranchingEngine, FloatArray, VisionKV
from himix_edge.runtimes.chat import Message, assistant_message, user_message
from himix_edge.runtimes.generate import Answer, generate
from himix_edge.runtimes.kvcache import Cache
from himix_edge.runtimes.sampling import Sampler, SamplingOptions
from himix_edge.runtimes.tokenizer import Detokenizer

if TYPE_CHECKING:
    from himix_edge.runtimes.model import Model


class Begun(NamedTuple):
    """A conversation about an image, from which others may take a beginning.

    Attributes:
        cache: its first tokens are those of `prompt`, as far as it has seen them, and stay so: who
            goes on with it never writes over them.
        prompt: token ids.
    """

    cache: Cache
    prompt: tuple[int, ...]


@dataclass(eq=False)
class Latest:
    """The conversation about an image that was begun last; replaced whole, so that threads may."""

    begun: Begun | None = None


@dataclass(frozen=True, repr=False)
class EncodedImage:
    """An image as the decoder sees it, good for any number of questions, from any threads.

    Attributes:
        milliseconds: by phase, "preprocess" (reading and resizing) and "vision" (the graph).
        origin: which bundle encoded it, and where.
        notices: why the model may see too little of it; empty for most images.
        latest: the conversation about it that was begun last.
    """

    kv: VisionKV
    milliseconds: dict[str, float]
    origin: tuple[str, str] = ("", "")
    notices: tuple[str, ...] = ()
    latest: Latest = field(default_factory=Latest)

    def __repr__(self) -> str:
        return f"<EncodedImage of {self.kv.slots} tokens>"


class Conversation:
    """Turn after turn on one cache; one thread asks at a time.

    Its cache begins as that of the conversation about the image before it, as far as their first
    prompts begin alike: with the head of the chat template, if with nothing else. What such tokens
    leave in a cache depends on the image and each other alone.
    """

    def __init__(self, model: Model, image: EncodedImage, history: Sequence[Message] = ()) -> None:
        self._model = model
        self._image = image
        self._messages = list(history)  # before the last question
        self._question = ""
        self._answer: Answer | None = None
        self._cache: Cache | None = None
        self._text: list[int] = []  # of all turns; the cache has seen a beginning of it
        self._shared = 0  # how many of its first tokens other conversations may read in this cache
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Conversation of {len(self.messages)} messages>"

    @property
    def messages(self) -> list[Message]:
        """What was said so far; of an answer that is being read, what was read."""
        if self._answer is None:
            return list(self._messages)
        last = [user_message(self._question), assistant_message(self._answer.text)]
        return [*self._messages, *last]

    def ask(self, prompt: str, options: SamplingOptions | None = None, **changes: Any) -> Answer:
        """The next turn; arguments, result and errors are those of `Model.generate`.

        An earlier answer that was not read to its end ends where it was left. Later turns see the
        text of an answer as it was read: without what a stop string cut off.
        """
        if not isinstance(options, SamplingOptions | None):
            raise ConfigError(
                "these are no options of sampling",
                expected="himix_edge.SamplingOptions, or single options by name",
                found=type(options).__name__,
            )
        options = (options or SamplingOptions()).updated(changes)
        words = _worded(prompt)
        with self._lock:
            ids = self._prompt(words)
            cache = self._cache or self._first_cache(ids)
            self._require_room(cache, ids)
            if self._answer and self._answer.finish_reason is None:
                self._answer.close()
                ids = self._prompt(words)  # now that the answer's text is final
                self._require_room(cache, ids)
            cache = self._rewound(cache, ids) if self._cache else self._published(cache, ids)
            self._messages, self._question = self.messages, words
            self._cache, self._text = cache, ids
            self._answer = self._begin(cache, ids, options)
            return self._answer

    def _prompt(self, words: str) -> list[int]:
        """The ids of the whole conversation with this question at its end."""
        most = self._model.manifest.config.decoder.max_position_embeddings
        return self._model.tokenizer.encode_turn(self.messages, words, most)

    def _require_room(self, cache: Cache, ids: list[int]) -> None:
        room = cache.capacity - cache.image_slots
        if len(ids) >= room:
            raise PromptError(
                "the prompt is too long",
                expected=f"at most {max(room - 1, 0)} tokens, template and earlier turns included",
                found=str(len(ids)),
                fix="begin a new conversation" if self.messages else "shorten it",
            )

    def _first_cache(self, ids: list[int]) -> Cache:
        """A cache that has seen what this prompt shares with the last one about the image."""
        engine, begun = self._model.engine, self._image.latest.begun
        if begun and isinstance(engine, BranchingEngine):
            common = _common_length(begun.prompt[: begun.cache.reusable], ids)
            if common:
                return engine.branch(begun.cache, common)
        return engine.open(self._image.kv)

    def _published(self, cache: Cache, ids: list[int]) -> Cache:
        """The same, from which other conversations may now take a beginning."""
        engine = self._model.engine
        if isinstance(engine, BranchingEngine) and engine.branches:
            self._image.latest.begun = Begun(cache, tuple(ids))
            self._shared = len(ids)
        return cache

    def _rewound(self, cache: Cache, ids: list[int]) -> Cache:
        """The cache when it has forgotten all that this prompt doesn't begin with."""
        engine = self._model.engine
        common = _common_length(self._text[: cache.reusable], ids)
        if common == cache.text_length:
            return cache
        if common < self._shared and isinstance(engine, BranchingEngine):
            self._shared = 0
            return engine.branch(cache, common)
        engine.rewind(cache, common)
        return cache

    def _begin(self, cache: Cache, ids: list[int], options: SamplingOptions) -> Answer:
        model, room = self._model, cache.capacity - cache.image_slots - len(ids)
        sampler, context = Sampler(options), _PenaltyContext(model.tokenizer.chat.chat, len(ids))

        def sample(logits: FloatArray, text: Sequence[int]) -> int:
            return sampler(logits, context.of(text))

        token_stream = generate(
            model.engine,
            cache,
            ids,
            sample,
            model.manifest.config.decoder.eos_token_ids,
            min(options.max_tokens, room),
        )
        detokenizer = Detokenizer(model.tokenizer)
        return Answer(token_stream, detokenizer, options.stop, len(ids), cache.text_length)


class _PenaltyContext:
    """What the repetition penalty sees, which is what the model's own `generate` is given as ids.

    transformers' LLaVA has all of the prompt, the image's token included; TinyLLaVA is given
    embeddings and so sees the answer alone.
    """

    def __init__(self, chat: Chat, prompt_tokens: int) -> None:
        place = chat.image
        self._ahead: list[int] = []
        self._skipped = 0
        if place and place.token_id is not None:
            self._ahead = [*place.prefix_ids, place.token_id]
        elif place:
            self._skipped = prompt_tokens

    def of(self, text: Sequence[int]) -> Sequence[int]:
        return [*self._ahead, *text[self._skipped :]]


def _common_length(seen: Sequence[int], ids: Sequence[int]) -> int:
    """With how many of the tokens seen a prompt begins.

    Two of the prompt at least are left: kernels sum in another order for a single token.
    """
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(seen, ids[:-2]))  # noqa: B905
    return len(list(pairs))


def _worded(prompt: object) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptError("the prompt is empty", expected="a question", fix='ask, say, "describe"')
    return prompt


def first_history(system: str | None, history: Sequence[Message]) -> list[Message]:
    """The messages before a conversation's first question.

    Raises:
        PromptError: messages that are no dicts of role and content, or not in turn.
    """
    if not isinstance(system, str | None):
        raise PromptError(
            "the system prompt is no text", expected="a str, or None", found=type(system).__name__
        )
    if not isinstance(history, Iterable):
        raise PromptError(
            "the history is no conversation",
            expected="a list of messages",
            found=type(history).__name__,
        )
    found: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    for message in history:
        if not _is_message(message):
            raise PromptError(
                "this is no message of a conversation",
                expected='{"role": "user", "content": "..."}, and so on',
                found=repr(message)[:60],
            )
        found.append({"role": message["role"], "content": message["content"]})
    if found and found[-1]["role"] == "user":
        raise PromptError(
            "the history ends in a question",
            expected="an answer as its last message",
            fix="leave it out, and ask it",
        )
    return found


def _is_message(message: object) -> bool:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        return False
    return all(isinstance(value, str) for value in message.values())
