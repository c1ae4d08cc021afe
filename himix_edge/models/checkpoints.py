"""Checkpoints: a folder with a model's config, weights, tokenizer, chat template and model card.

config.json           {"name", "notice", "config": a HiMixConfig}
model.safetensors     the weights under the model's parameter names, in fp32, fp16 or bf16
tokenizer.json        of the `tokenizers` package
chat_template.jinja   as Hugging Face writes it
README.md             the model card
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from himix_edge.config import HiMixConfig, dataclass_from_dict
from himix_edge.contract import CHAT_TEMPLATE, MODEL_CARD, TOKENIZER
from himix_edge.errors import CheckpointError, ConfigError
from himix_edge.files import refuse_foreign_folder, whole_folder
from himix_edge.models.himix import HiMix

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files are all there; the weights are read by `model`.

    Attributes:
        name: whose model it is, for people.
        notice: what whoever reads an answer should know of the model ("" if nothing).
    """

    folder: Path
    name: str
    notice: str
    config: HiMixConfig

    @property
    def tokenizer(self) -> Path:
        return self.folder / TOKENIZER

    @property
    def chat_template(self) -> Path:
        return self.folder / CHAT_TEMPLATE

    @property
    def model_card(self) -> Path:
        return self.folder / MODEL_CARD

    def model(self) -> HiMix:
        """The model in fp32, whatever the weights were stored in, and in eval mode.

        Raises:
            CheckpointError: weights that are no safetensors file, or tensors that are missing,
                unknown, misshapen or not finite: all of them.
        """
        path = self.folder / WEIGHTS
        try:
            stored = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read {path}",
                expected="a whole safetensors file",
                found=str(error),
                fix="copy the checkpoint again",
            ) from error
        model = HiMix(self.config)
        _refuse(path, _misfits(model.state_dict(), stored))
        model.load_state_dict(stored)  # copies, and so widens, into fp32 parameters
        return model.eval()


def read_checkpoint(folder: Path) -> Checkpoint:
    """Opens a checkpoint folder, and reads all of it but the weights.

    Raises:
        CheckpointError: files that are missing (all of them), or a config that can't be used.
    """
    names = (CONFIG, WEIGHTS, TOKENIZER, CHAT_TEMPLATE, MODEL_CARD)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is not a checkpoint",
            expected=f"a folder with {', '.join(names)}",
            found=f"no {', no '.join(missing)}" if folder.is_dir() else "no such folder",
            fix="train one with: himix-edge train --recipe shapes",
        )
    try:
        header = dataclass_from_dict(_Header, json.loads((folder / CONFIG).read_bytes()))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(
            f"cannot use {folder / CONFIG}", expected="a HiMix config", found=str(error)
        ) from error
    return Checkpoint(folder, header.name, header.notice, header.config)


def is_checkpoint(folder: Path) -> bool:
    """Whether `read_checkpoint` can open a folder."""
    try:
        read_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def save_checkpoint(
    folder: Path,
    model: HiMix,
    *,
    name: str,
    notice: str,
    tokenizer_json: str,
    chat_template: str,
    model_card: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a checkpoint folder, whole or not at all; an older checkpoint there is replaced.

    Args:
        dtype: what the weights are stored in.

    Raises:
        CheckpointError: weights that are not finite, or are not so in `dtype`.
        OutputError: a place that can't be written, or a folder of someone else's.
    """
    refuse_foreign_folder(folder, "checkpoint", is_checkpoint)
    weights = {key: tensor.to(dtype).contiguous() for key, tensor in model.state_dict().items()}
    _refuse(folder / WEIGHTS, _misfits(weights, weights))
    header = dataclasses.asdict(_Header(name, notice, model.config))
    with whole_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
        (temporary / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
        (temporary / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        (temporary / MODEL_CARD).write_text(model_card, encoding="utf-8")
        write_tensors(temporary / WEIGHTS, weights, {"format": "pt"})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: it can't be written.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # what safetensors makes of an OSError
        raise OSError(str(error)) from error


@dataclass(frozen=True)
class _Header:
    """What `config.json` holds."""

    name: str
    notice: str
    config: HiMixConfig


def _misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[str]:
    """Every way in which the tensors found are not the ones expected, in words."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing"
        elif name not in expected:
            yield f"{name} is unknown"
        elif found[name].shape != expected[name].shape:
            yield f"{name} is {list(found[name].shape)}, not {list(expected[name].shape)}"
        elif not found[name].is_floating_point():
            yield f"{name} is {found[name].dtype}, not floating point"
        elif not bool(found[name].isfinite().all()):
            yield f"{name} is not finite"


def _refuse(path: Path, misfits: Iterator[str]) -> None:
    if found := "; ".join(misfits):
        raise CheckpointError(
            f"the weights in {path} don't fit their config",
            found=found,
            fix=f"use the {WEIGHTS} and {CONFIG} of one and the same model",
        )
