"""The contract between export and runtime: tensor names, shapes, dtypes, and the manifest.

    vision.onnx    pixel_values [B, 3, H, W]
                   -> present.{i}.key, present.{i}.value [B, Hkv, I, D], one pair a layer
    decoder.onnx   input_ids [B, M], position_ids [B, M],
                   past_key_values.{i}.key, past_key_values.{i}.value [B, Hkv, P, D]
                   -> logits [B, 1, V] of the last token,
                      present.{i}.key, present.{i}.value [B, Hkv, P + M, D]

I are the slots that an image fills: its N tokens and, ahead of them, P of a converted model's fixed
text, which are the same for every image (`HiMixConfig.image_slots`).

In the native dialect the cache has a fixed size of S slots, and both graphs write into it:

    vision.onnx    pixel_values [B, 3, H, W], past_key_values.* [B, Hkv, S, D]
                   -> present.* [B, Hkv, S, D], the first I slots being the image
    decoder.onnx   input_ids [B, M], position_ids [B, M], write_indices [B],
                   past_key_values.* [B, Hkv, S, D]
                   -> logits [B, 1, V], present.* [B, Hkv, S, D], M slots from write_indices on new

A past and its present may be one buffer there; that is what makes a step write M slots and no more.
Slots beyond the last token are not looked at, but must hold finite numbers: zero a new buffer.

In the ort dialect vision.onnx is as above, and decoder.onnx as in the native dialect, but that S is
for whoever runs it to choose, buffer by buffer, that B is 1, and that a new buffer may hold
anything. Beside a decoder.onnx that is fast with one token there may be a prefill.onnx that is fast
with many: the same inputs and outputs, over the same buffers.

A HiMix decoder is a stock causal decoder whose first I cache slots were written by the vision side;
the text token in slot I + t stands at rotary position `text_offset + t`. The names are those of
ONNX Runtime GenAI. What vision calls present, the decoder's first step calls past.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from himix_edge.config import HiMixConfig
from himix_edge.errors import BundleError, ConfigError
from himix_edge.files import sha256_of
from himix_edge.plain import dataclass_from_dict, shown
from himix_edge.regular_files import read_regular

PIXEL_VALUES = "pixel_values"
INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
WRITE_INDICES = "write_indices"  # int64: the slot that the first of a step's tokens goes into
LOGITS = "logits"
# The decoder graph adds this to the logits of tokens that are never to be chosen. Little of it is
# left at any temperature in use, and yet it is a number in every type: float16's lowest is -65504.
SUPPRESSED_LOGIT = -60_000.0

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"  # of the manifest's bytes; see `bundle/signature.py`
VISION_GRAPH = "vision.onnx"
DECODER_GRAPH = "decoder.onnx"
PREFILL_GRAPH = "prefill.onnx"  # see above; few bundles have one
WEIGHTS_SUFFIX = ".data"  # vision.onnx keeps its weights in vision.onnx.data
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
PREPROCESSOR = "preprocessor.json"
MODEL_CARD = "README.md"
ENGINES = "engines"  # a folder of what was built of the graphs; the manifest knows nothing of it

ALWAYS_THERE = (VISION_GRAPH, DECODER_GRAPH, TOKENIZER, CHAT_TEMPLATE)
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # stays in its folder, on any system
MAX_MANIFEST = 4 << 20  # bytes; the largest of ours, of a converted pair, has some 60 kB
MAX_FILES, MAX_FILE_SIZE = 100, 1 << 40  # bytes
MAX_NAME, MAX_NOTICE = 200, 4_000  # characters
MAX_SLOTS = 1 << 24
COPY_AGAIN = "copy the bundle again, or export it again with: himix-edge export"

SCHEMA_VERSION = 4
# Operators that every runtime has; ONNX's own attention over a cache of fixed size, for TensorRT
# from 10.15 on and TensorRT for RTX; or ONNX Runtime's own, over a cache of any size.
Dialect = Literal["portable", "native", "ort"]
Dtype = Literal["float32", "float16", "bfloat16"]


def past_names(layers: int) -> list[str]:
    """Key and value of every layer, in the order in which graphs take them."""
    return [f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")]


def present_names(layers: int) -> list[str]:
    """Key and value of every layer, in the order in which graphs give them."""
    return [f"present.{i}.{part}" for i in range(layers) for part in ("key", "value")]


@dataclass(frozen=True)
class ImagePlace:
    """Where a chat template writes the image: a template of text and images, of a converted model.

    Attributes:
        placeholder: what stands for the image in the rendered text.
        token_id: the placeholder's id. None: the tokenizer does not know it; then the texts around
            it are encoded apart, the first of them alone with what the tokenizer adds to a text.
        prefix_ids: the ids ahead of the image, whose keys and values the vision graph holds.
        opening_ids: ids that follow the image ahead of what the template writes there.
        typed_content: whether a message's content is a list of parts, each text or image.
        adds_special_tokens: whether the tokenizer adds its special tokens, as processors do unless
            the text begins with BOS.
    """

    placeholder: str
    token_id: int | None
    prefix_ids: tuple[int, ...]
    opening_ids: tuple[int, ...] = ()
    typed_content: bool = True
    adds_special_tokens: bool = True


@dataclass(frozen=True)
class Chat:
    """How a conversation becomes token ids, beside what chat template and tokenizer say.

    Attributes:
        special_tokens: the template's variables, "bos_token" and the like, as transformers'
            `special_tokens_map` has them.
        split_special_tokens: whether special tokens in the rendered text are encoded as any other
            text.
        image: None where the template knows text alone: all of it then follows the image.
    """

    special_tokens: dict[str, str] = field(default_factory=dict)
    split_special_tokens: bool = False
    image: ImagePlace | None = None


@dataclass(frozen=True)
class FileRecord:
    """What a file of the bundle must be: its sha256 in hexadecimal, its size in bytes."""

    sha256: str
    size: int

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        return cls(sha256_of(path), path.stat().st_size)


@dataclass(frozen=True)
class Quantization:
    """In what weights are stored, and what that costs.

    Attributes:
        vision, decoder: "int8", "int4" or "fp8"; None is as exported.
        head: of the decoder's head and embedding, where they differ from its layers.
        prefill: of the decoder's second copy for prompts; None where there is none.
        block_size: how many weights share a scale; None is all of an output.
        method: how the decoder's weights were rounded: "rtn" or "gptq".
        cost: against the bundle it was made from: figures by name.
    """

    vision: str | None
    decoder: str | None
    block_size: int | None
    method: str | None
    cost: dict[str, Any]
    head: str | None = None
    prefill: str | None = None

    def __str__(self) -> str:
        vision, decoder = self.vision or "as exported", self.decoder or "as exported"
        blocks = f"blocks of {self.block_size}" if self.block_size else None
        head = f"head {self.head}" if self.head else None
        prefill = f"prompts {self.prefill}" if self.prefill else None
        how = ", ".join(filter(None, (self.method, blocks, head, prefill)))
        return f"vision {vision}, decoder {decoder}{f' ({how})' if how else ''}"


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: all that a runtime needs to know of a bundle before it opens a graph.

    Attributes:
        name: whose model it is, for people.
        notice: what whoever reads an answer should know of the model ("" if nothing).
        dialect: the family of runtimes that the decoder graph is for.
        dtype: of the cache, and of the weights that are not quantized; `pixel_values` and `logits`
            are always float32.
        files: every other file of the bundle, by its name: a plain one, no path.
        tools: the versions of the packages that made it.
        parity: how close the graphs came to the model: figures by name.
        quantization: None where the weights are as exported.
        cache_slots: S, how many slots a cache of fixed size has; None where the cache grows, or S
            is not the graphs' affair.
        ranges: of a bundle in float16: how large the values within the model get, and what of
            the vision graph is in float32 therefore.
    """

    schema_version: int
    name: str
    notice: str
    dialect: Dialect
    dtype: Dtype
    config: HiMixConfig
    chat: Chat
    files: dict[str, FileRecord]
    tools: dict[str, str]
    parity: dict[str, Any]
    quantization: Quantization | None = None
    cache_slots: int | None = None
    ranges: dict[str, Any] | None = None

    def to_json(self) -> str:
        """The text of `manifest.json`; its last field seals all the others."""
        body = dataclasses.asdict(self)
        return json.dumps({**body, "seal": _seal(body)}, indent=2) + "\n"

    def digest(self) -> str:
        """What tells this bundle from any other: the seal, which all files' sha256 are part of."""
        return _seal(dataclasses.asdict(self))

    @classmethod
    def read(cls, bundle: Path) -> Manifest:
        """Reads the manifest of a bundle folder; `BundleFiles` reads the other files.

        Raises:
            BundleError: no bundle there, a corrupt manifest, or one of another schema version.
        """
        return cls.from_bytes(manifest_bytes(bundle), bundle)

    @classmethod
    def from_bytes(cls, data: bytes, bundle: Path) -> Manifest:
        """Parses the bytes of a manifest, which may have been checked against a signature.

        Args:
            bundle: where they are from, for the errors.

        Raises:
            BundleError: a corrupt manifest, or one of another schema version.
        """
        path = bundle / MANIFEST
        try:
            body = json.loads(data)
            seal = body.pop("seal")
            version = body["schema_version"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise corrupt(path, "sealed JSON", f"{type(error).__name__}: {error}") from error
        if _seal(body) != seal:
            raise corrupt(path, f"content with the seal {str(seal)[:12]}", _seal(body)[:12])
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{path.parent} was made by another version of himix-edge",
                expected=f"manifest schema {SCHEMA_VERSION}",
                found=shown(version),
                fix="export it again with this version",
            )
        try:
            manifest = dataclass_from_dict(cls, body)
        except ConfigError as error:
            raise corrupt(path, "this version's fields", str(error)) from error
        manifest._require_bounds(path)
        return manifest

    def _require_bounds(self, path: Path) -> None:
        if len(self.name) > MAX_NAME or len(self.notice) > MAX_NOTICE:
            raise corrupt(
                path,
                f"a name of {MAX_NAME} and a notice of {MAX_NOTICE} characters at most",
                f"{len(self.name)} and {len(self.notice)}",
            )
        slots, least = self.cache_slots, self.config.image_slots
        if slots is not None and not least < slots <= MAX_SLOTS:
            raise corrupt(path, f"{least + 1} to {MAX_SLOTS} cache_slots", shown(slots))
        if missing := [name for name in ALWAYS_THERE if name not in self.files]:
            raise corrupt(path, "a record of each file", f"none of {', '.join(missing)}")
        if len(self.files) > MAX_FILES:
            raise corrupt(path, f"at most {MAX_FILES} files", str(len(self.files)))
        for name, record in self.files.items():
            if not PLAIN_NAME.fullmatch(name) or name == MANIFEST:
                raise corrupt(path, "names of files in the bundle's own folder", shown(name))
            if not 0 <= record.size <= MAX_FILE_SIZE:
                raise corrupt(path, "sizes in bytes", f"{shown(record.size)} for {name}")


def manifest_bytes(bundle: Path) -> bytes:
    """The bytes of a bundle's manifest.

    Raises:
        BundleError: no bundle there, or a manifest that is no regular file, or too large.
    """
    path = bundle / MANIFEST
    try:
        data = read_regular(path, MAX_MANIFEST + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(
            f"{bundle} is not a bundle",
            expected=f"a folder with a {MANIFEST}",
            found="none" if bundle.is_dir() else "no such folder",
            fix="make one with: himix-edge export --output FOLDER",
        ) from error
    except OSError as error:
        raise unreadable(path, "a file that can be read", error) from error
    if len(data) > MAX_MANIFEST:
        raise corrupt(path, f"at most {MAX_MANIFEST} bytes", "more")
    return data


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sealed_files(folder: Path) -> set[str] | None:
    """The names that a folder's manifest lists, of any version; None if its seal is not right."""
    try:
        body = json.loads((folder / MANIFEST).read_bytes())
        seal, files = body.pop("seal"), set(body["files"])
        return files if _seal(body) == seal else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def corrupt(path: Path, expected: str, found: str) -> BundleError:
    """The error for a file of a bundle that is not what it should be."""
    return BundleError(f"{path} is corrupt", expected=expected, found=found, fix=COPY_AGAIN)


def unreadable(path: Path, expected: str, error: OSError) -> BundleError:
    """The error for a file of a bundle that can't be opened."""
    if error.errno in (errno.ELOOP, errno.EMLINK):
        return BundleError(
            f"{path} can't be used",
            expected="a file of the bundle's own",
            found="a link",
            fix=f"copy the bundle without links: cp -RL --no-preserve=links {path.parent} COPY",
        )
    missing = error.errno == errno.ENOENT
    return corrupt(path, expected, "no such file" if missing else error.strerror or str(error))
