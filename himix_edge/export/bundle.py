"""The whole export: a checkpoint in, a verified bundle out, or nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import tokenizers

import himix_edge
from himix_edge.contract import (
    CHAT_TEMPLATE,
    DECODER_GRAPH,
    LOGITS,
    MANIFEST,
    MODEL_CARD,
    PREPROCESSOR,
    SCHEMA_VERSION,
    TOKENIZER,
    VISION_GRAPH,
    Chat,
    FileRecord,
    Manifest,
)
from himix_edge.errors import CheckpointError
from himix_edge.export.chat import chat_from_template
from himix_edge.export.dialects import PORTABLE_OPSET
from himix_edge.export.onnx import decoder_onnx_from_model, vision_onnx_from_model, write_graph
from himix_edge.export.verify import QUESTIONS, Parity, trial_images, verify
from himix_edge.files import refuse_foreign_folder, whole_folder
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.runtimes.tokenizer import Tokenizer

Progress = Callable[[str, float], None]  # the phase that begins, and how much of all is done, 0..1

TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "transformers")


def export_bundle(
    checkpoint: Checkpoint, output: Path, *, progress: Progress | None = None
) -> Manifest:
    """Writes the bundle folder `output`, whole and verified, or not at all.

    A bundle that stands there is replaced when the new one is ready.

    Args:
        progress: called when a phase begins, and with 1.0 when all is done.

    Raises:
        OutputError: a place that can't be written, or a folder there that is no bundle.
        CheckpointError: weights or a tokenizer that can't be used.
        ExportError: a chat template that can't be taken apart, a graph that can't be made.
        ParityError: a graph that gives other numbers than the model.
    """
    report = progress or _silent
    refuse_foreign_folder(output, "bundle", is_bundle)
    with whole_folder(output) as folder:
        report("loading", 0.0)
        manifest = manifest_of(checkpoint)
        prompts = _trial_prompts(checkpoint, manifest.chat)
        model = checkpoint.model()
        report("vision graph", 0.05)
        write_graph(vision_onnx_from_model(model), folder / VISION_GRAPH)
        report("decoder graph", 0.35)
        write_graph(decoder_onnx_from_model(model), folder / DECODER_GRAPH)
        report("verifying", 0.7)
        parity = verify(model, folder, trial_images(checkpoint.config.preprocess), prompts)
        report("sealing", 0.95)
        manifest = _seal(folder, checkpoint, manifest, parity)
    report("done", 1.0)
    return manifest


def _silent(_phase: str, _done: float) -> None:
    pass


def is_bundle(folder: Path) -> bool:
    """Whether a folder is, or once was, a bundle."""
    return (folder / MANIFEST).is_file() and (folder / VISION_GRAPH).is_file()


def manifest_of(checkpoint: Checkpoint) -> Manifest:
    """What a bundle's manifest says of a checkpoint before there are any files.

    Raises:
        CheckpointError: a tokenizer that can't be read, or has more tokens than the decoder.
        ExportError: a chat template that can't be taken apart.
    """
    bos, eos = _bos_and_eos(checkpoint)
    template = checkpoint.chat_template.read_text(encoding="utf-8")
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=checkpoint.name,
        notice=checkpoint.notice,
        dialect="portable",
        dtype="float32",
        config=checkpoint.config,
        chat=chat_from_template(template, bos_token=bos, eos_token=eos),
        files={},
        tools={},
        parity={},
    )


def _trial_prompts(checkpoint: Checkpoint, chat: Chat) -> list[list[int]]:
    """The questions of the verification as token ids."""
    tokenizer = Tokenizer(checkpoint.tokenizer, chat)
    return [tokenizer.encode_turn(chat.first, question) for question in QUESTIONS]


def _bos_and_eos(checkpoint: Checkpoint) -> tuple[str, str]:
    """What the tokenizer puts before every text, and the model's first end token, or ""."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint.tokenizer))
    except Exception as error:  # `tokenizers` raises nothing more special
        raise CheckpointError(
            f"cannot read {checkpoint.tokenizer}",
            expected="a tokenizer.json of the tokenizers package",
            found=str(error),
        ) from error
    size = max(tokenizer.get_vocab().values()) + 1
    if size > checkpoint.config.decoder.vocab_size:
        raise CheckpointError(
            f"{checkpoint.tokenizer} is not this model's",
            expected=f"at most {checkpoint.config.decoder.vocab_size} token ids",
            found=str(size),
            fix="put the tokenizer there that the model was trained with",
        )
    ends = checkpoint.config.decoder.eos_token_ids[:1]
    first = tokenizer.encode("").tokens[:1]
    return "".join(first), "".join(tokenizer.id_to_token(end) or "" for end in ends)


def _seal(folder: Path, checkpoint: Checkpoint, manifest: Manifest, parity: Parity) -> Manifest:
    """Adds the files beside the graphs, and the manifest last."""
    shutil.copyfile(checkpoint.tokenizer, folder / TOKENIZER)
    shutil.copyfile(checkpoint.chat_template, folder / CHAT_TEMPLATE)
    preprocess = json.dumps(dataclasses.asdict(checkpoint.config.preprocess), indent=2)
    (folder / PREPROCESSOR).write_text(preprocess + "\n", encoding="utf-8")
    tools = {name: metadata.version(name) for name in TOOLS}
    tools = {"himix-edge": himix_edge.__version__, **tools}
    card = checkpoint.model_card.read_text(encoding="utf-8").rstrip()
    (folder / MODEL_CARD).write_text(f"{card}\n\n{_export_note(tools, parity)}", encoding="utf-8")
    manifest = dataclasses.replace(
        manifest,
        files={path.name: FileRecord.of(path) for path in sorted(folder.iterdir())},
        tools=tools,
        parity=dataclasses.asdict(parity),
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _export_note(tools: dict[str, str], parity: Parity) -> str:
    """The model card's last section."""
    keys_and_values = max(closeness.error for closeness in parity.vision.values())
    versions = ", ".join(f"{name} {version}" for name, version in tools.items())
    return f"""\
## Export

Two ONNX graphs in fp32, dialect "portable" (opset {PORTABLE_OPSET}, operators that TensorRT 10.1
and later import), made with {versions}.

Checked in ONNX Runtime against the model in PyTorch on {parity.images} images. Largest difference,
over the largest value of its tensor: {keys_and_values:.1e} in the image's keys and values,
{parity.decoder[LOGITS].error:.1e} in the logits. Greedy tokens: {parity.greedy_tokens_equal} of
{parity.greedy_tokens} the same.
"""
