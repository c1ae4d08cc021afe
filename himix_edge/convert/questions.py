"""How a conversion asks: within the chat template of the model it begins with."""

from __future__ import annotations

from himix_edge.convert.teacher import TeacherSource
from himix_edge.export.bundle import manifest_of
from himix_edge.export.reference import tokenizer_of
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.runtimes.tokenizer import Tokenizer


def prompt_encoder(source: TeacherSource) -> Tokenizer:
    """The tokenizer of what comes after the image, with its chat template.

    Raises:
        CheckpointError: a tokenizer that can't be read, or has more tokens than the decoder.
        ExportError: a chat template that can't be rendered.
    """
    checkpoint = _as_checkpoint(source)
    manifest_of(checkpoint)
    return tokenizer_of(checkpoint)


def _as_checkpoint(source: TeacherSource) -> Checkpoint:
    return Checkpoint(
        name=source.name,
        notice=source.notice,
        config=source.config,
        weights=source.weights,
        tokenizer_json=source.tokenizer_json,
        chat_template=source.chat_template,
        model_card="",
        files={},
        chat=source.chat,
    )
