"""Checkpoints: a folder with a model's config, weights, tokenizer, chat template and model card.

config.json           {"name", "notice", "config": a HiMixConfig, "encoder", "decoder", "chat",
                      "files"}
model.safetensors     weights under the model's parameter names, in fp32, fp16 or bf16; or, as
                      Hugging Face writes large ones, model.safetensors.index.json and its shards
tokenizer.json        of the `tokenizers` package
chat_template.jinja   as Hugging Face writes it
README.md             the model card

"chat" holds the special tokens that the template names, and where it places an image; a folder
with a tokenizer_config.json is read as transformers reads it.

"encoder" and "decoder" may name a Hugging Face folder, or a repository of its hub: what the weights
lack, the projections of a frozen encoder for one, comes from there, and so do the tokenizer and the
chat template. "files" holds the sha256 and the size of every file of weights: a copy that broke off
is told by name, and only that file need be copied again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from himix_edge.config import HiMixConfig
from himix_edge.contract import CHAT_TEMPLATE, MODEL_CARD, TOKENIZER, Chat, FileRecord
from himix_edge.errors import CheckpointError, ConfigError
from himix_edge.files import Kind, refuse_foreign_folder, sha256_of, whole_folder
from himix_edge.models.chat_files import ChatFiles, read_chat_files
from himix_edge.models.checkpoint_files import plain_name, read_bytes
from himix_edge.models.folder_kind import refuse_other_kinds
from himix_edge.models.himix import HiMix, hollow_model, model_from_weights
from himix_edge.models.hub import json_object, provenance_of
from himix_edge.models.huggingface import (
    DECODERS,
    ENCODERS,
    decoder_from_folder,
    encoder_from_folder,
    folder_from_source,
)
from himix_edge.models.shards import write_weights
from himix_edge.models.tokenizer_files import TOKENIZER_CONFIG
from himix_edge.models.weights import (
    INDEX,
    SHARDS,
    SINGLE_FILE,
    HeldWeight,
    Weights,
    misfits,
    stored_weights,
)
from himix_edge.plain import dataclass_from_dict
from himix_edge.replacing import entries
from himix_edge.tokenizer_json import read_tokenizer_json

CONFIG = "config.json"
CONVERSION_FILES = ("conversion.json", "conversion.html")  # the report of `convert`, if it made it


@dataclass(frozen=True)
class Checkpoint:
    """All that a model is made of; its weights are read when they are asked for.

    Attributes:
        name: whose model it is, for people.
        notice: what whoever reads an answer should know of the model ("" if nothing).
        weights: by the names of the model's parameters, wherever each is stored.
        tokenizer_json, chat_template, model_card: texts.
        files: what the files of weights must be, as far as that is known.
        chat: what goes with tokenizer and template.
    """

    name: str
    notice: str
    config: HiMixConfig
    weights: Weights
    tokenizer_json: str
    chat_template: str
    model_card: str
    files: Mapping[Path, FileRecord]
    chat: Chat = dataclasses.field(default_factory=Chat)

    def check(self) -> None:
        """Reads all weights.

        Raises:
            CheckpointError: a file that was changed since it was saved; tensors that are missing,
                unknown, misshapen or not finite: all of them.
        """
        for path, record in self.files.items():
            if (digest := sha256_of(path)) != record.sha256:
                raise CheckpointError(
                    f"{path} is damaged",
                    expected=f"sha256 {record.sha256[:12]}",
                    found=digest[:12],
                    fix="copy that file again; the others may stay",
                )
        expected = hollow_model(self.config).state_dict()
        _refuse(self.name, misfits(expected, self.weights))

    def model(self) -> HiMix:
        """The model in fp32, whatever the weights were stored in, and in eval mode.

        Raises:
            CheckpointError: as `check` does.
        """
        self.check()
        return model_from_weights(self.config, self.weights)


@dataclass(frozen=True)
class _Header:
    """What `config.json` holds."""

    name: str
    notice: str
    config: HiMixConfig
    encoder: str | None = None
    decoder: str | None = None
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    chat: Chat | None = None


def read_checkpoint(
    folder: Path, encoder: str | None = None, decoder: str | None = None
) -> Checkpoint:
    """Opens a checkpoint folder, and reads all of it but the weights.

    Args:
        encoder, decoder: where the weights that the folder lacks are, instead of what it says
            itself: folders, or repositories of the Hugging Face hub. These may be downloaded; a
            repository that the folder names must be in the hub's cache.

    Raises:
        CheckpointError: files that are missing (all of them) or damaged, a config that can't be
            used, an encoder or a decoder that can't be had.
    """
    _refuse_hugging_face(folder)
    header = _header(folder)
    fetch_encoder, fetch_decoder = encoder is not None, decoder is not None
    encoder, decoder = encoder or header.encoder, decoder or header.decoder
    texts = [MODEL_CARD] if decoder else [TOKENIZER, CHAT_TEMPLATE, MODEL_CARD]
    _require_files(folder, header, texts)
    weights: Weights = stored_weights(folder)
    taken: list[str] = []  # from the hub
    lacking = hollow_model(header.config).state_dict().keys() - weights.keys()
    if encoder and any(name.startswith("vision.") for name in lacking):
        place = folder_from_source(encoder, fetch=fetch_encoder)
        layer = header.config.vision.feature_layer
        weights = {**encoder_from_folder(place, layer).weights, **weights}
        taken += [f"vision encoder: {found}"] if (found := provenance_of(place)) else []
    own_texts = (folder / TOKENIZER).is_file() and (folder / CHAT_TEMPLATE).is_file()
    if own_texts or not decoder:
        files = _chat_files(folder, header)
    else:
        place = folder_from_source(decoder, fetch=fetch_decoder)
        files = read_chat_files(place, header.config.decoder.vocab_size)
    if decoder and any(name.startswith("decoder.") for name in lacking):
        place = folder_from_source(decoder, fetch=fetch_decoder)
        weights = {**decoder_from_folder(place).weights, **weights}
        taken += [f"decoder: {found}"] if (found := provenance_of(place)) else []
    return Checkpoint(
        name=header.name,
        notice=header.notice,
        config=header.config,
        weights=weights,
        tokenizer_json=files.tokenizer_json,
        chat_template=files.chat_template,
        model_card=(folder / MODEL_CARD).read_text(encoding="utf-8") + _from_hub(taken),
        files={folder / name: record for name, record in header.files.items()},
        chat=files.chat,
    )


def _from_hub(taken: list[str]) -> str:
    """The section of a model card that says which commits the weights are of."""
    return "".join(["\n## From the hub\n\n", *(f"- {line}\n" for line in taken)]) if taken else ""


def checkpoint_config(folder: Path) -> HiMixConfig | None:
    """The config of a checkpoint folder, or None if it is none that can be read."""
    try:
        return _header(folder).config
    except CheckpointError:
        return None


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is, or once was, a checkpoint."""
    return checkpoint_config(folder) is not None


def _not_of_a_checkpoint(folder: Path) -> str | None:
    """What in a folder was not written by `write_checkpoint`, so that it must not be replaced."""
    try:
        files = _header(folder).files
    except CheckpointError:
        return f"it has no {CONFIG} of a checkpoint"
    if not files:
        return f"its {CONFIG} was not written by himix-edge: it lists no files"
    own = {CONFIG, TOKENIZER, CHAT_TEMPLATE, MODEL_CARD, *CONVERSION_FILES, *files}
    for entry in sorted(entries(folder)):
        if entry.name not in own or (entry.is_dir() and not entry.is_symlink()):
            return f"{entry.name} in it is not the checkpoint's"
    return None


CHECKPOINT = Kind("checkpoint", _not_of_a_checkpoint)


def save_checkpoint(
    folder: Path,
    model: HiMix,
    *,
    name: str,
    notice: str,
    tokenizer_json: str,
    chat_template: str,
    model_card: str,
    chat: Chat | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a model in memory as a checkpoint folder; see `write_checkpoint`.

    Args:
        chat: what goes with tokenizer and template; by default the end token alone.
        dtype: what the weights are stored in.

    Raises:
        CheckpointError: weights that are not finite, or are not so in `dtype`.
        OutputError: a place that can't be written, or a folder of someone else's.
    """
    weights = {key: HeldWeight(tensor.to(dtype)) for key, tensor in model.state_dict().items()}
    texts = (tokenizer_json, chat_template, model_card)
    chat = chat or _default_chat(tokenizer_json, model.config)
    write_checkpoint(
        folder, Checkpoint(name, notice, model.config, weights, *texts, files={}, chat=chat)
    )


def write_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    beside: Mapping[str, str] | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Writes a checkpoint folder, whole or not at all; an older checkpoint there is replaced.

    The weights are read one by one, and written as they are stored: a model of any size passes
    through with no more than one shard of it in memory.

    Args:
        beside: further files to be in the folder: texts by name.
        progress: called with the part of the weights, 0..1, that is written.

    Raises:
        CheckpointError: weights that can't be read or are not finite: all of them.
        OutputError: a place that can't be written, or a folder of someone else's.
    """
    refuse_foreign_folder(folder, CHECKPOINT)
    texts = {
        TOKENIZER: checkpoint.tokenizer_json,
        CHAT_TEMPLATE: checkpoint.chat_template,
        MODEL_CARD: checkpoint.model_card,
        **(beside or {}),
    }
    with whole_folder(folder, kind=CHECKPOINT, last=CONFIG) as temporary:
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        _refuse(checkpoint.name, write_weights(temporary, checkpoint.weights, progress))
        files = {file.name: FileRecord.of(file) for file in _files_of_weights(temporary)}
        header = _Header(
            checkpoint.name, checkpoint.notice, checkpoint.config, files=files, chat=checkpoint.chat
        )
        data = json.dumps(dataclasses.asdict(header), indent=2)
        (temporary / CONFIG).write_text(data + "\n", encoding="utf-8")


def _chat_files(folder: Path, header: _Header) -> ChatFiles:
    """A checkpoint's own, by its header or by a tokenizer_config.json that was put beside it."""
    if (folder / TOKENIZER_CONFIG).is_file():
        return read_chat_files(folder, header.config.decoder.vocab_size)
    try:
        texts = [(folder / name).read_text(encoding="utf-8") for name in (TOKENIZER, CHAT_TEMPLATE)]
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read the texts of {folder}", found=str(error)) from error
    return ChatFiles(texts[0], texts[1], header.chat or _default_chat(texts[0], header.config))


def _default_chat(tokenizer_json: str, config: HiMixConfig) -> Chat:
    """Of a checkpoint that says nothing: eos_token is the model's first end token."""
    try:
        tokenizer = read_tokenizer_json(tokenizer_json).tokenizer
    except ValueError:  # a bad tokenizer.json is refused where it is used
        return Chat()
    ends = [tokenizer.id_to_token(end) for end in config.decoder.eos_token_ids[:1]]
    return Chat({"eos_token": ends[0]} if ends and ends[0] is not None else {})


def _header(folder: Path) -> _Header:
    if not (folder / CONFIG).is_file():
        raise _not_a_checkpoint(folder, [CONFIG, SINGLE_FILE, TOKENIZER, CHAT_TEMPLATE, MODEL_CARD])
    try:
        header = dataclass_from_dict(_Header, json.loads(read_bytes(folder / CONFIG)))
    except (OSError, ValueError, ConfigError, RecursionError) as error:
        raise CheckpointError(
            f"cannot use {folder / CONFIG}", expected="a HiMix config", found=str(error)
        ) from error
    for name in header.files:
        plain_name(folder / CONFIG, name)
    return header


def _refuse_hugging_face(folder: Path) -> None:
    """Says what a model of another kind is, where a HiMix checkpoint was asked for."""
    refuse_other_kinds(folder)
    path = folder / CONFIG
    data = json_object(path) if path.is_file() else {}
    kind = data.get("model_type")
    if not isinstance(kind, str):
        return
    if kind in DECODERS:
        part, fix = (
            "language decoder",
            f"name it with --decoder {folder}, beside an --encoder, and with --random-weights "
            "where there are no projections of the pair yet",
        )
    elif kind in ENCODERS:
        part, fix = "vision encoder", f"name it with --encoder {folder}, beside a --decoder"
    else:
        part = "model"
        fix = f"a LLaVA becomes one with: himix-edge convert {folder} --calibration PICTURES -o OUT"
    raise CheckpointError(
        f"{folder} is no HiMix checkpoint",
        expected="one that himix-edge trained or converted",
        found=f"a Hugging Face {part} of model_type {kind!r}",
        fix=fix,
    )


def _require_files(folder: Path, header: _Header, texts: list[str]) -> None:
    """Checks that all files are there, and that those of weights are of their size."""
    sizes = {name: record.size for name, record in header.files.items()}
    weights = list(sizes) or ([] if (folder / INDEX).is_file() else [SINGLE_FILE])
    if not all((folder / name).is_file() for name in (*weights, *texts)):
        raise _not_a_checkpoint(folder, [CONFIG, *weights, *texts])
    found = {name: (folder / name).stat().st_size for name in sizes}
    if damaged := [name for name in sizes if found[name] != sizes[name]]:
        raise CheckpointError(
            f"{folder} is damaged",
            expected=", ".join(f"{name} of {sizes[name]} bytes" for name in damaged),
            found=", ".join(f"{found[name]} bytes" for name in damaged),
            fix=f"copy {', '.join(damaged)} again; the other files may stay",
        )


def _not_a_checkpoint(folder: Path, names: list[str]) -> CheckpointError:
    missing = [name for name in names if not (folder / name).is_file()]
    return CheckpointError(
        f"{folder} is not a checkpoint",
        expected=f"a folder with {', '.join(names)}",
        found=f"no {', no '.join(missing)}" if folder.is_dir() else "no such folder",
        fix="train one with: himix-edge train --recipe shapes",
    )


def _files_of_weights(folder: Path) -> list[Path]:
    return sorted(path for pattern in (SINGLE_FILE, SHARDS, INDEX) for path in folder.glob(pattern))


def _refuse(name: str, problems: Iterable[str]) -> None:
    if found := "; ".join(problems):
        raise CheckpointError(
            f"the weights of {name} don't fit its config",
            found=found,
            fix="use the weights and the config of one and the same model",
        )
