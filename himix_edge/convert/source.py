"""From a folder as it comes to a teacher: which families there are, and into memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from himix_edge.convert.layout import licence_of
from himix_edge.convert.llava import CONFIGS, llava_source
from himix_edge.convert.teacher import Teacher, TeacherSource
from himix_edge.convert.tinyllava import FAMILY as TINYLLAVA
from himix_edge.convert.tinyllava import tinyllava_source
from himix_edge.errors import CheckpointError
from himix_edge.models.checkpoints import is_checkpoint, read_checkpoint
from himix_edge.models.folder_kind import refuse_other_kinds
from himix_edge.models.himix import hollow_model
from himix_edge.models.hub import folder_from_source, json_object, name_of
from himix_edge.models.huggingface import CONFIG
from himix_edge.models.weights import misfits

VANILLA = "vanilla"
READERS: dict[str, Callable[[Path], TeacherSource]] = {
    **dict.fromkeys(CONFIGS, llava_source),
    TINYLLAVA: tinyllava_source,
}


def teacher_from_folder(source: str | Path) -> TeacherSource:
    """Opens a vanilla vision-language model, and reads all of it but the weights.

    Args:
        source: a folder of one of the families in `READERS`, or a checkpoint of our own of the
            design "vanilla"; or a repository of the Hugging Face hub, which may be downloaded.

    Raises:
        CheckpointError: none of these; a part that we don't have; files that are missing or
            corrupt; prompts that can't be cut at the image.
    """
    folder = folder_from_source(str(source), fetch=True)
    refuse_other_kinds(folder)
    data = json_object(folder / CONFIG)
    kind = data.get("model_type")
    if isinstance(kind, str) and kind in READERS:
        return READERS[kind](folder)
    if kind is None and is_checkpoint(folder):
        return _own(folder)
    raise CheckpointError(
        f"{folder} is no vision-language model that can be converted",
        expected=f"a model_type of {', '.join(READERS)}, or a vanilla checkpoint of himix-edge",
        found=f"model_type {kind!r}" if kind else f"a {CONFIG} without model_type",
        fix="name the folder of a whole LLaVA, not that of its encoder or decoder",
    )


def teacher_from_source(
    source: TeacherSource, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Teacher:
    """Reads a teacher's weights, which are in memory once.

    Args:
        dtype: what it computes in.

    Raises:
        CheckpointError: weights that are missing, unknown, misshapen or not finite, all of them;
            or that are not finite in `dtype`.
    """
    model = hollow_model(source.config, dtype).to(device)
    if found := "; ".join(misfits(model.state_dict(), source.weights)):
        raise CheckpointError(
            f"the weights of {source.name} don't fit its config",
            found=found,
            fix="use the weights and the config of one and the same model",
        )
    for name, parameter in model.named_parameters():
        parameter.copy_(source.weights[name].read())
        if not parameter.isfinite().all():
            raise CheckpointError(
                f"{name} of {source.name} is not finite in {dtype}", fix="use bfloat16 or float32"
            )
    rows = {i: row.read().to(device, dtype) for i, row in source.head_rows.items()}
    return Teacher(model, source.prefix_ids, rows)


def _own(folder: Path) -> TeacherSource:
    checkpoint = read_checkpoint(folder)
    if checkpoint.config.design != VANILLA:
        raise CheckpointError(
            f"{folder} can't be converted",
            expected=f"a checkpoint of the design {VANILLA!r}",
            found=repr(checkpoint.config.design),
            fix="export it as it is with: himix-edge export",
        )
    return TeacherSource(
        name=checkpoint.name or name_of(folder),
        family=VANILLA,
        licence=licence_of(folder),
        notice=checkpoint.notice,
        config=checkpoint.config,
        weights=checkpoint.weights,
        prefix_ids=(),
        tokenizer_json=checkpoint.tokenizer_json,
        chat_template=checkpoint.chat_template,
        chat=checkpoint.chat,
    )
