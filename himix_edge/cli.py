"""The `himix-edge` commands. Each is thin: what it does lives in the package it calls."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from himix_edge import __version__
from himix_edge.contract import FileRecord, Manifest
from himix_edge.errors import ConfigError, HimixError, closest

app = typer.Typer(
    help="HiMix vision-language models from PyTorch to the device.",
    epilog="--debug, anywhere, shows the traceback of an error.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Threads = Annotated[int | None, typer.Option(help="For ONNX Runtime; all cores by default.")]


def main(arguments: list[str]) -> None:
    """Runs a command line and exits: 0 done, 1 an error in one line, 2 misuse, 130 Ctrl-C."""
    debug = "--debug" in arguments
    try:
        app([argument for argument in arguments if argument != "--debug"], prog_name="himix-edge")
    except HimixError as error:
        if debug:
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"himix-edge {__version__}")
        raise typer.Exit


@app.command()
def run(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    prompt: Annotated[str, typer.Argument(help="What to ask about it.")],
    bundle: Annotated[
        Path | None, typer.Option(help="A bundle; by default the last export, or the demo.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Of the answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="... that hold this probability.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Ask about a picture."""
    from himix_edge import bundles, progress
    from himix_edge.runtimes import SamplingOptions, load
    from himix_edge.runtimes.answer import print_answer

    options = SamplingOptions(
        temperature, top_k, top_p, repetition_penalty, seed, max_tokens, tuple(stop or ())
    )
    with progress.phases("Exporting the demo model, once") as report:
        chosen = bundles.chosen_bundle(bundle, report)
    print_answer(load(chosen, threads=threads), image, prompt, options, as_json=as_json)


@app.command()
def export(
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint folder; by default the demo model's.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The bundle's folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a bundle of a checkpoint: ONNX graphs, verified against the model, and all they need."""
    from himix_edge import bundles, progress
    from himix_edge.export.bundle import export_bundle
    from himix_edge.models.checkpoints import read_checkpoint

    source = read_checkpoint(checkpoint or bundles.DEMO_CHECKPOINT)
    folder = output or Path(source.name)
    with progress.phases(f"Exporting {source.name}") as report:
        manifest = export_bundle(source, folder, progress=report)
    bundles.remember_export(folder)
    if as_json:
        print(json.dumps({"bundle": str(folder), **dataclasses.asdict(manifest)}, indent=2))
        return
    print(f"{folder}: {_megabytes(manifest.files)}, equal to the model in PyTorch.")


@app.command()
def info(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    as_json: Json = False,
) -> None:
    """Check a bundle, file by file, and say what it is."""
    manifest = Manifest.read(bundle)
    manifest.check_files(bundle)
    if as_json:
        print(json.dumps(dataclasses.asdict(manifest), indent=2))
        return
    config, decoder = manifest.config, manifest.config.decoder
    print(f"{manifest.name}: {_megabytes(manifest.files)}, every file as exported")
    if manifest.notice:
        print(manifest.notice)
    print(f"dialect     {manifest.dialect}, {manifest.dtype}")
    print(f"design      {config.design}")
    print(f"image       {config.vision.image_size} px, {config.vision.num_image_tokens} tokens")
    print(f"decoder     {decoder.num_hidden_layers} layers, {decoder.hidden_size} wide")
    print(f"context     {config.max_text_tokens} text tokens")
    print("made with   " + ", ".join(f"{tool} {v}" for tool, v in manifest.tools.items()))
    for name, record in manifest.files.items():
        print(f"  {record.sha256[:12]}  {record.size:>12,}  {name}")


@app.command()
def train(
    recipe: Annotated[str, typer.Option(help="What to train: shapes.")] = "shapes",
    design: Annotated[
        str, typer.Option(help="himix, uniform, hierarchical or vanilla: the paper's four.")
    ] = "himix",
    seed: Annotated[int, typer.Option(help="The same seed, the same model.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="For states and, in the end, the checkpoint."),
    ] = None,
    scenes: Annotated[int, typer.Option(help="Held-out scenes to judge it by in the end.")] = 2000,
) -> None:
    """Train a model from a seed; the same command goes on after an interrupt."""
    from himix_edge import progress
    from himix_edge.models.injection import INJECTIONS
    from himix_edge.pipeline import train_checkpoint
    from himix_edge.training.recipe import RECIPES

    if recipe not in RECIPES:
        raise ConfigError(f"no recipe is named {recipe!r}", fix=closest(recipe, RECIPES))
    designs = {str(name): name for name in INJECTIONS}
    if design not in designs:
        raise ConfigError(f"no design is named {design!r}", fix=closest(design, designs))
    chosen = RECIPES[recipe].with_design(designs[design])
    folder = output or Path("runs") / f"{recipe}-{design}-{seed}"
    with progress.steps() as bars:
        checkpoint = train_checkpoint(chosen, seed, folder, scenes, bars.update)
    print(checkpoint)


@app.command("eval")
def evaluate(
    model: Annotated[
        Path | None, typer.Argument(help="A bundle or a checkpoint; by default as for run.")
    ] = None,
    scenes: Annotated[int, typer.Option(help="How many of the held-out scenes.")] = 2000,
    against: Annotated[
        Path | None, typer.Option(help="Another one, to compare every answer with.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure a model on the shapes world: accuracy for each kind of question."""
    from himix_edge import bundles, evaluation, progress

    with progress.phases("Exporting the demo model, once") as report:
        target = bundles.chosen_bundle(model, report)
    with progress.steps() as bars:
        result = evaluation.evaluate(target, scenes, threads, bars.update)
        other = evaluation.evaluate(against, scenes, threads, bars.update) if against else None
    if as_json:
        print(json.dumps(evaluation.report(result, other), indent=2))
    else:
        print(evaluation.table(result, other))


@app.command()
def scene(
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png file.")],
    seed: Annotated[int, typer.Option(help="Which scene.")] = 0,
    size: Annotated[int, typer.Option(help="Pixels each way.", min=16, max=4096)] = 336,
    answer: Annotated[bool, typer.Option("--answer", help="Print its true description.")] = False,
) -> None:
    """Draw a random scene of the demo model's world."""
    import numpy as np

    from himix_edge.files import whole_file
    from himix_edge.shapes.questions import description
    from himix_edge.shapes.render import render
    from himix_edge.shapes.scenes import random_scene

    drawn = random_scene(np.random.default_rng(seed))
    with whole_file(output) as file:
        render(drawn, size).save(file, format="PNG")
    print(description(drawn) if answer else output)


def _megabytes(files: Mapping[str, FileRecord]) -> str:
    return f"{sum(record.size for record in files.values()) / 1e6:.1f} MB"
