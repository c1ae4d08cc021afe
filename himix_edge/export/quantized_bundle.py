"""From a bundle in floats to one with weights of 4 or 8 bits, which says what that costs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from himix_edge.bundle.files import BundleFiles
from himix_edge.bundle.graphs import read_graph
from himix_edge.bundle.quality import cost_table
from himix_edge.contract import (
    CHAT_TEMPLATE,
    DECODER_GRAPH,
    ENGINES,
    MANIFEST,
    MODEL_CARD,
    PREFILL_GRAPH,
    PREPROCESSOR,
    TOKENIZER,
    VISION_GRAPH,
    FileRecord,
    Manifest,
    Quantization,
)
from himix_edge.data.pictures import picture_files, pictures
from himix_edge.data.questions import Questions
from himix_edge.export.bundle import BUNDLE
from himix_edge.export.calibration import Feeds
from himix_edge.export.cost import (
    CalibrationFeeds,
    exchanges_from_graphs,
    vision_cost,
)
from himix_edge.export.expected import QUESTIONS, Array
from himix_edge.export.general_text import JoinedFeeds, TextFeeds, general_sequences
from himix_edge.export.judge import Bundles, judgement, measured_ways, refuse_loss
from himix_edge.export.judge_text import judge_text
from himix_edge.export.phases import Phases, Progress
from himix_edge.export.recipes import Recipe, WeightChoice, recipe_for
from himix_edge.export.sessions import CacheSlots
from himix_edge.files import refuse_foreign_folder, refuse_overlap, refuse_too_large, whole_folder
from himix_edge.runtimes.preprocess import pixel_values
from himix_edge.runtimes.tokenizer import Tokenizer
from himix_edge.shapes.render import render
from himix_edge.shapes.scenes import random_scene

Judge = Callable[[Path], dict[str, float]]  # a bundle -> accuracy by kind of question, or nothing
CALIBRATION_SCENES, COST_SCENES = 8, 3


@dataclass(frozen=True)
class Inputs:
    """What to calibrate with, and what to measure with: no picture is in both.

    Attributes:
        calibration, cost: pictures, each [1, 3, H, W].
        prompts: token ids.
        questions: the prompts in words.
        tokenizer: the bundle's.
    """

    calibration: list[Array]
    cost: list[Array]
    prompts: list[list[int]]
    questions: Sequence[str]
    tokenizer: Tokenizer


def quantize_bundle(
    bundle: Path,
    output: Path,
    choice: WeightChoice,
    *,
    calibration: Path | None = None,
    text: Path | None = None,
    force: bool = False,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Writes the bundle folder `output`, whole and measured, or not at all.

    Args:
        bundle: in floats, as exported; it stays as it is.
        calibration: a folder of pictures, and of prompts.txt with a prompt a line: half of the
            pictures calibrate, the other half measures. None draws scenes and asks about them.
        text: a file to judge with in the place of the text that comes with himix-edge.
        force: writes a bundle that lost too much all the same, and says so in it.
        judge: measures both bundles' accuracy.

    Raises:
        QualityError: a bundle that lost too much.
        BundleError: no bundle in floats, or a corrupt one.
        ConfigError: a choice that means nothing for the bundle, too few calibration pictures, or
            texts beside them that can't be read; a text that can't be judged with.
        ImageError: a calibration picture that can't be read.
        ExportError: a graph that can't be quantized.
        OutputError: a place that can't be written, or a folder there that is no bundle.
    """
    phases = Phases(progress)
    files = BundleFiles.open(bundle)
    manifest = files.manifest
    recipe = recipe_for(bundle, manifest, choice)
    refuse_overlap(output, bundle)
    refuse_foreign_folder(output, BUNDLE)
    least = sum(record.size for record in manifest.files.values()) // 8  # float32 in int4
    refuse_too_large(output, least)
    files.check()
    for graph in (VISION_GRAPH, DECODER_GRAPH):
        read_graph(files, graph)  # for what must not be in it
    with whole_folder(output, kind=BUNDLE, keep=ENGINES, last=MANIFEST) as folder:
        phases.begin("reading", 0.0)
        inputs = _inputs(files, calibration)
        read = judge_text(files, text, inputs.questions)
        _copy_texts(files, folder)
        cost: dict[str, Any] = {"images": len(inputs.cost), "prompts": len(inputs.prompts)}
        phases.begin("vision graph", 0.1)
        if recipe.vision:
            recipe.vision(bundle / VISION_GRAPH, folder / VISION_GRAPH)
            cost["vision"] = _vision_cost(bundle, folder, manifest, recipe, inputs)
        else:
            _copy_graph(files, folder, VISION_GRAPH)
        phases.begin("decoder graph", 0.2)
        calibration_inputs = _calibration(bundle, manifest, inputs) if recipe.calibrated else ()
        if recipe.decoder:
            recipe.decoder(
                bundle / DECODER_GRAPH,
                folder / DECODER_GRAPH,
                calibration=calibration_inputs,
                progress=lambda part: phases.within(0.3 + 0.2 * part),
            )
        else:
            _copy_graph(files, folder, DECODER_GRAPH)
        if recipe.prefill:
            phases.begin("prefill graph", 0.6)
            recipe.prefill(
                bundle / DECODER_GRAPH,
                folder / PREFILL_GRAPH,
                calibration=calibration_inputs,
                progress=lambda part: phases.within(0.6 + 0.1 * part),
            )
        phases.begin("judging", 0.7)
        ways = measured_ways(
            Bundles(bundle, folder, manifest, recipe),
            read,
            inputs.cost,
            lambda part: phases.within(0.7 + 0.1 * part),
        )
        quality = judgement(read, ways, force=force)
        refuse_loss(quality, output, choice)
        cost["quality"] = json.loads(json.dumps(dataclasses.asdict(quality)))
        phases.begin("sealing", 0.8)
        quantized = _with_quantization(manifest, recipe, choice, cost)
        sealed = _seal(folder, quantized, files)
        if judge and (accuracy := judge(folder)):
            phases.begin("accuracy", 0.85)
            cost["accuracy"] = {"quantized": accuracy, "before": judge(bundle)}
            sealed = _seal(folder, quantized, files)
        files.require_unchanged()  # while its graphs were opened by their paths
        files.close()
    phases.finish()
    return sealed


def _vision_cost(
    bundle: Path, folder: Path, manifest: Manifest, recipe: Recipe, inputs: Inputs
) -> Any:
    """As plain data."""
    graphs = bundle / VISION_GRAPH, folder / VISION_GRAPH
    features = vision_cost(*graphs, manifest.config, inputs.cost, recipe.open_session)
    return {name: dataclasses.asdict(feature) for name, feature in features.items()}


def _calibration(bundle: Path, manifest: Manifest, inputs: Inputs) -> Sequence[Feeds]:
    """What the bundle is asked about pictures, and general text."""
    config = manifest.config
    asked = exchanges_from_graphs(bundle, config, inputs.calibration, inputs.prompts)
    slots: CacheSlots = "any" if manifest.dialect == "ort" else manifest.cache_slots
    room = slots - config.image_slots if isinstance(slots, int) else config.max_text_tokens
    sequences = general_sequences(inputs.tokenizer, min(room, config.max_text_tokens))
    images = [exchange.image for exchange in asked]
    return JoinedFeeds(
        CalibrationFeeds(config, asked, slots), TextFeeds(config, sequences, images, slots)
    )


def _with_quantization(
    manifest: Manifest, recipe: Recipe, choice: WeightChoice, cost: dict[str, Any]
) -> Manifest:
    quantization = Quantization(
        vision=choice.vision,
        decoder=choice.decoder,
        block_size=recipe.block_size,
        method=recipe.method,
        cost=cost,
        head=choice.head,
        prefill=choice.prefill,
    )
    return dataclasses.replace(manifest, quantization=quantization)


def _inputs(files: BundleFiles, folder: Path | None) -> Inputs:
    config, tokenizer = files.manifest.config.preprocess, Tokenizer.from_bundle(files)
    questions: Sequence[str] = QUESTIONS
    if folder is None:
        rng = np.random.default_rng(1)
        scenes = [
            pixel_values(render(random_scene(rng)), config)
            for _ in range(CALIBRATION_SCENES + COST_SCENES)
        ]
        calibration, cost = scenes[COST_SCENES:], scenes[:COST_SCENES]
    else:
        paths = picture_files(folder, at_least=2)
        questions = [asked.prompt for asked in Questions.read(folder, QUESTIONS).general]
        every = list(pictures(paths, config))
        calibration, cost = every[::2], every[1::2]
    history = tokenizer.chat.first
    prompts = [tokenizer.encode_turn(history, words) for words in questions]
    return Inputs(calibration, cost, prompts, questions, tokenizer)


def _copy_texts(files: BundleFiles, folder: Path) -> None:
    """All but the graphs, and the model card, which gets another section."""
    for name in (TOKENIZER, CHAT_TEMPLATE, PREPROCESSOR):
        if name in files.manifest.files:
            (folder / name).write_bytes(files.read(name))


def _copy_graph(files: BundleFiles, folder: Path, name: str) -> None:
    model, weights = read_graph(files, name)
    (folder / name).write_bytes(model)
    for weights_name, data in weights.items():
        (folder / weights_name).write_bytes(data)


def _seal(folder: Path, manifest: Manifest, files: BundleFiles) -> Manifest:
    """Writes the model card, and the manifest last."""
    there = MODEL_CARD in files.manifest.files
    card = files.read(MODEL_CARD).decode("utf-8", "replace").rstrip() if there else ""
    table = cost_table(manifest.quantization)
    note = (
        f"## Quantization\n\n{manifest.quantization}. "
        f"Against the bundle in {manifest.dtype}:\n\n```\n{table}\n```\n"
    )
    (folder / MODEL_CARD).write_text(f"{card}\n\n{note}", encoding="utf-8")
    written = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    manifest = dataclasses.replace(
        manifest, files={path.name: FileRecord.of(path) for path in written}
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
