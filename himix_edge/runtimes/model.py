"""A bundle, ready to look at images and answer."""

from __future__ import annotations

import dataclasses
import itertools
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from himix_edge.contract import ENGINES, TOKENIZER, Manifest
from himix_edge.errors import BundleError, PromptError
from himix_edge.runtimes.base import BranchingEngine, Engine, VisionKV
from himix_edge.runtimes.devices import BuildReport, Choices, open_engine
from himix_edge.runtimes.generate import Answer, generate, timed
from himix_edge.runtimes.kvcache import Cache
from himix_edge.runtimes.preprocess import ImageSource, load_image, pixel_values
from himix_edge.runtimes.sampling import Sampler, SamplingOptions
from himix_edge.runtimes.tokenizer import Detokenizer, Tokenizer

SMALL = 1 << 24  # bytes; a file of less is checked before anything reads it


def load(
    bundle: str | os.PathLike[str],
    *,
    device: str = "auto",
    threads: int | None = None,
    verify: bool = True,
    caches: int | None = None,
    auto_build: bool = False,
    report: BuildReport = lambda *_: None,
) -> Model:
    """Opens a bundle folder.

    Args:
        device: "cpu", "cuda", "tensorrt", "tensorrt-rtx" or "auto"; see `devices.py`.
        threads: for ONNX Runtime; None takes all cores.
        verify: compare every file with its sha256 in the manifest; that of the weights is reckoned
            while they are opened.
        caches: for TensorRT, how many images and conversations are held at a time; 4 by default.
        auto_build: for TensorRT, build engines where none fits; it takes minutes.
        report: called while engines are built.

    Raises:
        BundleError: a bundle that is missing, corrupt, made by another version, or not for this
            device.
        ConfigError: an unknown device.
        DependencyError: a package that the device needs is missing.
        EngineError: no GPU, or no engine that fits it.
    """
    folder = Path(bundle)
    manifest = Manifest.read(folder)
    choices = Choices(threads, verify, caches, auto_build, report)
    # What is built of the graphs outlives this call: nothing is, before they are known to be right.
    may_build = auto_build or device.startswith("tensorrt") or (folder / ENGINES).is_dir()
    with ThreadPoolExecutor() as background:
        checked: Future[None] | None = None
        if verify:
            small, large = _by_size(manifest)
            small.check_files(folder)
            checked = background.submit(large.check_files, folder)
        if checked and may_build:
            checked.result()
        tokenizing = background.submit(_tokenizer, folder / TOKENIZER, manifest)
        try:
            opened = open_engine(folder, manifest, device, choices)
        finally:  # a file that is corrupt, or no tokenizer, is why nothing else works either
            if checked:
                checked.result()
            tokenizer = tokenizing.result()
    return Model(manifest, tokenizer, opened.engine, opened.device, opened.passed_over)


def _by_size(manifest: Manifest) -> tuple[Manifest, Manifest]:
    """The manifest of the files that are read whole at once, and that of the weights."""
    small = {name: file for name, file in manifest.files.items() if file.size < SMALL}
    large = {name: file for name, file in manifest.files.items() if file.size >= SMALL}
    return dataclasses.replace(manifest, files=small), dataclasses.replace(manifest, files=large)


def _tokenizer(path: Path, manifest: Manifest) -> Tokenizer:
    tokenizer, most = Tokenizer(path, manifest.chat), manifest.config.decoder.vocab_size
    if tokenizer.vocab_size > most:
        raise BundleError(
            f"{path} is not this decoder's",
            expected=f"at most {most} token ids",
            found=str(tokenizer.vocab_size),
            fix="export the checkpoint again with the tokenizer it was trained with",
        )
    return tokenizer


@dataclass(eq=False)
class Latest:
    """The conversation about an image that was begun last.

    Attributes:
        cache: None before the first.
        text: all its token ids; the cache has seen a beginning of them.
    """

    cache: Cache | None = None
    text: list[int] = field(default_factory=list)

    def shared(self, ids: list[int]) -> int:
        """With how many of its tokens a prompt begins; two of the prompt at least are left."""
        seen = self.text[: self.cache.reusable] if self.cache else []
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(seen, ids[:-2]))  # noqa: B905
        return len(list(pairs))


@dataclass(frozen=True)
class EncodedImage:
    """An image as the decoder sees it, good for any number of questions.

    Attributes:
        milliseconds: by phase, "preprocess" (reading and resizing) and "vision" (the graph).
        latest: the conversation about it that was begun last.
    """

    kv: VisionKV
    milliseconds: dict[str, float]
    latest: Latest = field(default_factory=Latest)


class Model:
    """An engine, its tokenizer, and what the manifest says of them; see `load`.

    Attributes:
        device: where it runs.
        passed_over: why "auto" did not choose a better one, where it came near to that.
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        engine: Engine,
        device: str = "cpu",
        passed_over: tuple[str, ...] = (),
    ) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.engine = engine
        self.device = device
        self.passed_over = passed_over

    def encode(self, source: ImageSource, *, wait: bool = True) -> EncodedImage:
        """Looks at an image, once for all questions about it.

        Args:
            source: a path, a file's bytes, a Pillow image or a uint8 array; see `load_image`.
            wait: return when it is encoded. Otherwise TensorRT encodes it in the background, while
                an answer about another image is read, and "vision" is not the time it takes.

        Raises:
            ImageError: an image that can't be read, or is too large.
        """
        milliseconds: dict[str, float] = {}
        with timed(milliseconds, "preprocess"):
            pixels = pixel_values(load_image(source), self.manifest.config.preprocess)
        with timed(milliseconds, "vision"):
            kv = self.engine.encode(pixels)
            if wait:
                kv.wait()
        return EncodedImage(kv, milliseconds)

    def generate(
        self,
        image: EncodedImage,
        prompt: str,
        options: SamplingOptions | None = None,
        **changes: Any,
    ) -> Answer:
        """Answers one question about an image.

        Args:
            options: how tokens are chosen; greedy by default.
            changes: single options by name, on top of `options`: `temperature=0.7`.

        Returns:
            an iterator over the text's pieces, which works while it is read.

        Raises:
            PromptError: an empty prompt, or one that the context can't hold.
            ConfigError: an unknown option, or one out of range.
        """
        return self.chat(image).ask(prompt, options, **changes)

    def chat(self, image: EncodedImage) -> Conversation:
        """A conversation about an image: each question builds on all before it."""
        return Conversation(self, image)


class Conversation:
    """Turn after turn on one cache.

    Its cache begins as that of the conversation about the image before it, as far as their first
    prompts begin alike: with the head of the chat template, if with nothing else. What such tokens
    leave in a cache depends on the image and each other alone.
    """

    def __init__(self, model: Model, image: EncodedImage) -> None:
        self._model = model
        self._image = image
        self._cache: Cache | None = None
        self._text: list[int] = []  # of all turns; the cache has seen a beginning of it
        self._answer: Answer | None = None

    def ask(self, prompt: str, options: SamplingOptions | None = None, **changes: Any) -> Answer:
        """The next turn; arguments, result and errors are those of `Model.generate`.

        An earlier answer that was not read to its end ends where it was left. Of an answer cut by
        a stop string, the turns after it see the tokens that spelled it.
        """
        options = (options or SamplingOptions()).updated(changes)
        model, chat = self._model, self._model.tokenizer.chat
        ids = model.tokenizer.encode_turn(chat.next if self._text else chat.first, _worded(prompt))
        cache = self._cache or self._begun(ids)
        left = cache.capacity - cache.image_slots - len(self._text)
        if len(ids) >= left:
            raise PromptError(
                "the prompt is too long",
                expected=f"at most {max(left - 1, 0)} tokens, template included",
                found=str(len(ids)),
                fix="begin a new conversation" if self._text else "shorten it",
            )
        if self._answer:
            self._answer.close()
        self._text += ids
        if self._cache is None:
            self._cache = cache
            self._remember(cache)
        token_stream = generate(
            model.engine,
            cache,
            self._text,
            Sampler(options),
            model.manifest.config.decoder.eos_token_ids,
            min(options.max_tokens, left - len(ids)),
        )
        self._answer = Answer(token_stream, Detokenizer(model.tokenizer), options.stop, len(ids))
        return self._answer

    def _begun(self, ids: list[int]) -> Cache:
        """A cache for a conversation that begins with these tokens."""
        engine, latest = self._model.engine, self._image.latest
        shared = latest.shared(ids)
        if latest.cache and shared and isinstance(engine, BranchingEngine):
            return engine.branch(latest.cache, shared)
        return engine.open(self._image.kv)

    def _remember(self, cache: Cache) -> None:
        engine = self._model.engine
        if isinstance(engine, BranchingEngine) and engine.branches:
            self._image.latest.cache, self._image.latest.text = cache, self._text


def _worded(prompt: object) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptError("the prompt is empty", expected="a question", fix='ask, say, "describe"')
    return prompt
