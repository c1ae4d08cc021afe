"""A bundle, ready to look at images and answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from himix_edge.bundle.files import BundleFiles
from himix_edge.contract import ENGINES, TOKENIZER, Manifest
from himix_edge.errors import BundleError, ConfigError, ImageError
from himix_edge.runtimes.base import Engine
from himix_edge.runtimes.chat import Message
from himix_edge.runtimes.conversation import Conversation, EncodedImage, first_history
from himix_edge.runtimes.devices import BuildReport, Choices, open_engine
from himix_edge.runtimes.generate import Answer, timed
from himix_edge.runtimes.image_sources import Channels, ImageSource
from himix_edge.runtimes.preprocess import prepare
from himix_edge.runtimes.sampling import SamplingOptions
from himix_edge.runtimes.tokenizer import Tokenizer

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
    public_key: str | os.PathLike[str] | bytes | None = None,
) -> Model:
    """Opens a bundle folder.

    Args:
        device: "cpu", "cuda", "tensorrt", "tensorrt-rtx" or "auto"; see `devices.py`.
        threads: for ONNX Runtime; None takes all cores.
        verify: compare every file with its sha256 in the manifest; that of the weights is computed
            while they are opened.
        caches: for TensorRT, how many images and conversations are held at a time; 4 by default.
        auto_build: for TensorRT, build engines where none fits; it takes minutes.
        report: called while engines are built.
        public_key: of who must have signed the bundle: a PEM file, or its bytes. Engines that this
            key has signed are run too, besides those that this user built or trusts.

    Raises:
        BundleError: a bundle that is missing, corrupt, made by another version, not for this
            device, or not signed by the given key.
        ConfigError: an unknown device; a key that can't be read, or that comes with verify=False.
        DependencyError: a package that the device, or the key, needs is missing.
        EngineError: no GPU, or no engine that fits it and that this user built or trusts.
    """
    trusted = None
    if public_key is not None:
        from himix_edge.bundle.signature import Trusted

        if not verify:
            raise ConfigError(
                "a signature says nothing of files that are not checked",
                expected="verify=True beside public_key",
                found="verify=False",
                fix="leave one of them out",
            )
        trusted = Trusted.read(public_key)
    read_manifest = trusted.read_manifest if trusted else Manifest.read
    choices = Choices(threads, caches, auto_build, report, trusted)
    # What is built of the graphs outlives this call: nothing is, before they are known to be right.
    opened_files = BundleFiles.open(bundle, verify=verify, read_manifest=read_manifest)
    with opened_files as files, ThreadPoolExecutor() as background:
        records = files.manifest.files
        files.check([name for name, record in records.items() if record.size < SMALL])
        checked = background.submit(files.check)
        if auto_build or device.startswith("tensorrt") or (files.path / ENGINES).is_dir():
            checked.result()
        tokenizing = background.submit(_tokenizer, files)
        try:
            opened = open_engine(files, device, choices)
        finally:  # a file that is corrupt, or no tokenizer, is why nothing else works either
            checked.result()
            tokenizer = tokenizing.result()
        files.require_unwritten()
    return Model(files.manifest, tokenizer, opened.engine, opened.device, opened.passed_over)


def _tokenizer(files: BundleFiles) -> Tokenizer:
    tokenizer = Tokenizer.from_bundle(files)
    most = files.manifest.config.decoder.vocab_size
    if tokenizer.vocab_size > most:
        raise BundleError(
            f"{files.path / TOKENIZER} is not this decoder's",
            expected=f"at most {most} token ids",
            found=str(tokenizer.vocab_size),
            fix="export the checkpoint again with the tokenizer it was trained with",
        )
    return tokenizer


class Model:
    """An engine, its tokenizer, and what the manifest says of them; see `load`.

    All methods may be called from any number of threads at a time, with images shared among them. A
    `Conversation` belongs to one thread at a time.

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
        self.device = device
        self.passed_over = passed_over
        self._engine: Engine | None = engine
        self._origin = (manifest.digest(), device)

    def __repr__(self) -> str:
        closed = ", closed" if self._engine is None else ""
        return f"<Model {self.manifest.name!r} on {self.device}{closed}>"

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the graphs and their memory, once the answers that are being read have ended."""
        self._engine = None

    @property
    def engine(self) -> Engine:
        """What runs the graphs.

        Raises:
            BundleError: the model is closed.
        """
        if self._engine is None:
            raise BundleError(
                f"the model {self.manifest.name!r} is closed",
                fix="load it again with himix_edge.load, and ask within its `with` block",
            )
        return self._engine

    def encode(
        self,
        source: ImageSource,
        *,
        channels: Channels = "RGB",
        resize: str | None = None,
        wait: bool = True,
    ) -> EncodedImage:
        """Looks at an image, once for all questions about it.

        Args:
            source: a path, a file's bytes, a binary file object, a Pillow image, or a uint8 array
                or tensor; see `load_image`.
            channels: "BGR" for an array whose channels are in that order, as OpenCV's are.
            resize: to the model's square: "squash", "crop" or "pad"; by default the bundle's own,
                which is what the model was trained with.
            wait: return when it is encoded. Otherwise TensorRT encodes it in the background, while
                an answer about another image is read, and "vision" is not the time it takes.

        Raises:
            ImageError: an image that can't be read, or is too large.
            ConfigError: unknown channels or another `resize`, or BGR for what is no array.
        """
        milliseconds: dict[str, float] = {}
        with timed(milliseconds, "preprocess"):
            config = self.manifest.config.preprocess
            prepared = prepare(source, config, channels=channels, resize=resize)
        with timed(milliseconds, "vision"):
            kv = self.engine.encode(prepared.pixels)
            if wait:
                kv.wait()
        return EncodedImage(kv, milliseconds, self._origin, prepared.notices)

    def generate(
        self,
        image: EncodedImage | ImageSource,
        prompt: str,
        options: SamplingOptions | None = None,
        *,
        system: str | None = None,
        **changes: Any,
    ) -> Answer:
        """Answers one question about an image.

        Args:
            image: an encoded image; anything that `encode` takes is encoded first, for this
                question alone.
            options: how tokens are chosen; greedy by default.
            system: a system prompt, for templates that have a place for one.
            changes: single options by name, on top of `options`: `temperature=0.7`.

        Returns:
            an iterator over the text's pieces, which works while it is read.

        Raises:
            PromptError: an empty prompt, or one that the context can't hold, or that the chat
                template refuses.
            ConfigError: an unknown option, or one out of range.
            ImageError: an image that can't be read, or that another bundle has encoded.
        """
        return self.chat(image, system=system).ask(prompt, options, **changes)

    def chat(
        self,
        image: EncodedImage | ImageSource,
        *,
        system: str | None = None,
        history: Sequence[Message] = (),
    ) -> Conversation:
        """A conversation about an image: each question builds on all before it.

        Args:
            image: as for `generate`.
            system: a system prompt, for templates that have a place for one.
            history: earlier turns, [{"role": "user", "content": ...}, {"role": "assistant", ...},
                ...].

        Raises:
            PromptError: a history that is none.
            ImageError: as for `generate`.
        """
        messages = first_history(system, history)
        encoded = image if isinstance(image, EncodedImage) else self.encode(image)
        if encoded.origin != self._origin:
            digest, device = encoded.origin
            raise ImageError(
                "the image was encoded by another bundle or on another device",
                expected=f"bundle {self._origin[0][:12]} on {self.device}",
                found=f"bundle {digest[:12]} on {device}",
                fix="encode it with the model that is asked about it",
            )
        return Conversation(self, encoded, messages)
