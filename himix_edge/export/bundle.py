"""The whole export: a checkpoint in, a verified bundle out, or nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path

import himix_edge
from himix_edge.config import HiMixConfig
from himix_edge.contract import (
    CHAT_TEMPLATE,
    DECODER_GRAPH,
    ENGINES,
    MANIFEST,
    MODEL_CARD,
    PREPROCESSOR,
    SCHEMA_VERSION,
    SIGNATURE,
    TOKENIZER,
    VISION_GRAPH,
    Dialect,
    Dtype,
    FileRecord,
    Manifest,
    sealed_files,
)
from himix_edge.data.pictures import picture_files, pictures
from himix_edge.data.questions import Questions
from himix_edge.errors import BundleError, CheckpointError, ConfigError, ExportError
from himix_edge.export.card import export_section, ranges_section
from himix_edge.export.expected import (
    MAX_NEW_TOKENS,
    QUESTIONS,
    Array,
    Expected,
    expected_from_model,
    trial_images,
)
from himix_edge.export.onnx import (
    decoder_onnx_from_weights,
    vision_onnx_from_weights,
    write_graph,
)
from himix_edge.export.phases import PhaseCost, Phases, Progress, total
from himix_edge.export.ranges import (
    Ranges,
    ranges_from_model,
    wide_parts,
)
from himix_edge.export.rewrites import rewrite_decoder, rewrite_vision
from himix_edge.export.verify import Parity, verify
from himix_edge.export.wide import NOTHING_WIDE, WideParts
from himix_edge.files import Kind, refuse_foreign_folder, refuse_too_large, whole_folder
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.models.himix import model_from_weights
from himix_edge.replacing import entries
from himix_edge.runtimes.chat import ChatTemplate
from himix_edge.runtimes.tokenizer import Tokenizer
from himix_edge.tokenizer_json import read_tokenizer_json

CHECKS = ("asking the model in PyTorch", "comparing in ONNX Runtime")
DEFAULT_MAX_TEXT = 1024  # tokens of text that a cache of fixed size has slots for
TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "transformers")


@dataclass(frozen=True)
class Exported:
    """A bundle's manifest, and what making it took."""

    manifest: Manifest
    costs: list[PhaseCost]

    @property
    def making(self) -> PhaseCost:
        """All that was done to make the graphs."""
        return total("making", [cost for cost in self.costs if cost.phase not in CHECKS])

    @property
    def checking(self) -> PhaseCost:
        """All that was done to compare them with the model."""
        return total("checking", [cost for cost in self.costs if cost.phase in CHECKS])


def export_bundle(
    checkpoint: Checkpoint,
    output: Path,
    *,
    dtype: Dtype = "float32",
    dialect: Dialect = "portable",
    max_text: int | None = None,
    calibration: Path | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Writes the bundle folder `output`, whole and verified, or not at all.

    A bundle that stands there is replaced when the new one is ready. The weights are read one by
    one; only to be asked, before the graphs are made, is the model in memory, once.

    Args:
        dtype: of the weights and of the cache.
        dialect: "portable", "native" or "ort".
        max_text: how many tokens of text the native dialect's cache has slots for; by default
            as many as the model has positions for, up to 1,024.
        calibration: a folder of pictures which tell, besides the scenes that we draw, how large the
            values within the model get: what float16 can't hold is then in float32.
        progress: called when a phase begins or goes on, and with 1.0 when all is done.

    Raises:
        OutputError: a place that can't be written, or a folder there that is no bundle.
        CheckpointError: weights or a tokenizer that can't be used.
        ExportError: a chat template that can't be rendered, a graph that can't be made, a model
            that does not fit into float16.
        ParityError: a graph that gives other numbers than the model.
        ConfigError: a cache that the dialect or the model has no use for; no pictures, or texts
            beside them that can't be read.
        ImageError: a picture that can't be read.
    """
    own = picture_files(calibration) if calibration else []
    if calibration:
        Questions.read(calibration)  # not asked here, but good for every command or for none
    cache_slots = _cache_slots(checkpoint.config, dialect, max_text)
    if dialect == "ort":
        _require_ort_runs(checkpoint.config, dtype)
    phases = Phases(progress)
    refuse_foreign_folder(output, BUNDLE)
    refuse_too_large(output, _least_bytes(checkpoint, dtype))
    config, weights = checkpoint.config, checkpoint.weights
    with whole_folder(output, kind=BUNDLE, keep=ENGINES, last=MANIFEST) as folder:
        phases.begin("checking the weights", 0.0)
        manifest = dataclasses.replace(
            manifest_of(checkpoint, dtype), dialect=dialect, cache_slots=cache_slots
        )
        _write_texts(folder, checkpoint)
        checkpoint.check()
        phases.begin(CHECKS[0], 0.05)
        watched = chain(trial_images(config.preprocess), pictures(own, config.preprocess))
        expected, ranges = _asked(checkpoint, manifest, folder, watched)
        wide = wide_parts(ranges) if ranges else NOTHING_WIDE
        phases.begin("vision graph", 0.2)
        graph = vision_onnx_from_weights(config, weights, dtype, wide)
        rewrite_vision(graph, manifest, wide)
        phases.begin("vision weights", 0.3)
        write_graph(graph, folder / VISION_GRAPH, lambda part: phases.within(0.3 + 0.1 * part))
        phases.begin("decoder graph", 0.4)
        graph = decoder_onnx_from_weights(config, weights, dtype)
        rewrite_decoder(graph, manifest)
        phases.begin("decoder weights", 0.65)
        write_graph(graph, folder / DECODER_GRAPH, lambda part: phases.within(0.65 + 0.15 * part))
        del graph
        phases.begin(CHECKS[1], 0.8)
        parity = verify(expected, folder, config, dtype)
        phases.begin("sealing", 0.95)
        manifest = _seal(folder, checkpoint, manifest, parity, ranges, wide)
    return Exported(manifest, phases.finish())


def _cache_slots(config: HiMixConfig, dialect: Dialect, max_text: int | None) -> int | None:
    """S = P + N + max_text, or None where the cache has no size of its own."""
    if dialect != "native":
        if max_text is not None:
            raise ConfigError(
                f"max_text means nothing in the {dialect} dialect",
                expected="a cache of fixed size",
                found="one that grows as long as the model has positions",
                fix="leave it out, or export with --dialect native",
            )
        return None
    most = config.max_text_tokens
    text = min(most, DEFAULT_MAX_TEXT) if max_text is None else max_text
    if not 1 <= text <= most:
        raise ConfigError(
            "max_text is out of range",
            expected=f"1 to the {most} that the model has positions for",
            found=str(text),
        )
    return config.image_slots + text


def _require_ort_runs(config: HiMixConfig, dtype: Dtype) -> None:
    """What ONNX Runtime's GroupQueryAttention asks for on a CPU."""
    head_dim, fix = config.decoder.head_dim, "export with --dialect portable"
    if head_dim % 16:
        raise ConfigError(
            "ONNX Runtime's attention can't run this decoder",
            expected="a head_dim that is a multiple of 16",
            found=str(head_dim),
            fix=fix,
        )
    if dtype == "bfloat16":
        raise ConfigError(
            "ONNX Runtime's attention can't run in this type",
            expected="float32 or float16",
            found=dtype,
            fix=fix,
        )


def _least_bytes(checkpoint: Checkpoint, dtype: Dtype) -> int:
    """What the graphs take at the least: some weights may be shared, or no graph's."""
    numbers = sum(math.prod(weight.shape) for weight in checkpoint.weights.values())
    return numbers * (4 if dtype == "float32" else 2) // 2


def _not_of_a_bundle(folder: Path) -> str | None:
    """What in a folder is not a bundle's own, so that the folder must not be replaced."""
    files = sealed_files(folder)
    if files is None or VISION_GRAPH not in files:
        return f"it has no {MANIFEST} with a bundle's seal"
    for entry in sorted(entries(folder)):
        is_folder = entry.is_dir() and not entry.is_symlink()
        if entry.name != ENGINES and (entry.name not in {MANIFEST, SIGNATURE, *files} or is_folder):
            return f"{entry.name} in it is not the bundle's"
    return None


BUNDLE = Kind("bundle", _not_of_a_bundle)


def manifest_of(checkpoint: Checkpoint, dtype: Dtype = "float32") -> Manifest:
    """What a bundle's manifest says of a checkpoint before there are any files.

    Raises:
        CheckpointError: a tokenizer that can't be read, or has more tokens than the decoder.
        ExportError: a chat template that can't be rendered.
    """
    _require_fitting_tokenizer(checkpoint)
    try:
        ChatTemplate(checkpoint.chat_template, checkpoint.chat)
    except BundleError as error:
        raise ExportError(
            f"{checkpoint.name}: {error.failed}",
            expected=error.expected,
            found=error.found,
            fix="correct it in the checkpoint's folder",
        ) from error
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=checkpoint.name,
        notice=checkpoint.notice,
        dialect="portable",
        dtype=dtype,
        config=checkpoint.config,
        chat=checkpoint.chat,
        files={},
        tools={},
        parity={},
    )


def _write_texts(folder: Path, checkpoint: Checkpoint) -> None:
    (folder / TOKENIZER).write_text(checkpoint.tokenizer_json, encoding="utf-8")
    (folder / CHAT_TEMPLATE).write_text(checkpoint.chat_template, encoding="utf-8")
    preprocess = json.dumps(dataclasses.asdict(checkpoint.config.preprocess), indent=2)
    (folder / PREPROCESSOR).write_text(preprocess + "\n", encoding="utf-8")


def _asked(
    checkpoint: Checkpoint, manifest: Manifest, folder: Path, watched: Iterator[Array]
) -> tuple[Expected, Ranges | None]:
    """The model loaded, asked, and let go; for float16, how large its values get as well."""
    tokenizer = Tokenizer.from_folder(folder, manifest.chat)
    prompts = [tokenizer.encode_turn(tokenizer.chat.first, question) for question in QUESTIONS]
    _require_room(manifest, max(map(len, prompts)) + MAX_NEW_TOKENS)
    model = model_from_weights(checkpoint.config, checkpoint.weights)
    expected = expected_from_model(model, trial_images(checkpoint.config.preprocess), prompts)
    is_half = manifest.dtype == "float16"
    return expected, ranges_from_model(model, watched, prompts) if is_half else None


def _require_room(manifest: Manifest, tokens: int) -> None:
    """A cache of fixed size must hold what the graphs are compared on, at least."""
    slots, image = manifest.cache_slots, manifest.config.image_slots
    if slots and slots < image + tokens:
        raise ConfigError(
            "max_text is too small",
            expected=f"{tokens} or more: a short question and its answer",
            found=str(slots - image),
        )


def _require_fitting_tokenizer(checkpoint: Checkpoint) -> None:
    """Checks that every token id has a row in the decoder's embedding."""
    try:
        size = read_tokenizer_json(checkpoint.tokenizer_json).size
    except ValueError as error:
        raise CheckpointError(
            f"cannot read the tokenizer of {checkpoint.name}",
            expected="a tokenizer.json of the tokenizers package",
            found=str(error),
        ) from error
    if size > checkpoint.config.decoder.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.name} is not this model's",
            expected=f"at most {checkpoint.config.decoder.vocab_size} token ids",
            found=str(size),
            fix="put the tokenizer there that the model was trained with",
        )


def _seal(
    folder: Path,
    checkpoint: Checkpoint,
    manifest: Manifest,
    parity: Parity,
    ranges: Ranges | None,
    wide: WideParts,
) -> Manifest:
    """Adds the model card, and the manifest last."""
    tools = {name: metadata.version(name) for name in TOOLS}
    tools = {"himix-edge": himix_edge.__version__, **tools}
    sections = [checkpoint.model_card.rstrip() + "\n", export_section(manifest, tools, parity)]
    if ranges:
        sections.append(ranges_section(ranges, wide))
    (folder / MODEL_CARD).write_text("\n".join(sections), encoding="utf-8")
    manifest = dataclasses.replace(
        manifest,
        files={path.name: FileRecord.of(path) for path in sorted(folder.iterdir())},
        tools=tools,
        parity=dataclasses.asdict(parity),
        ranges={"in_float32": str(wide), **dataclasses.asdict(ranges)} if ranges else None,
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
