"""The commands of those who train and compare: train, eval, scene, flops, models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from himix_edge import cli_options
from himix_edge.cli_options import (
    Commands,
    Decoder,
    Device,
    Encoder,
    Json,
    Scenes,
    Seed,
    Threads,
    output_option,
    refuse_beside,
)
from himix_edge.console import print_json
from himix_edge.errors import ConfigError, closest
from himix_edge.presets import DEFAULT_DECODER, DEFAULT_ENCODER

lab = Commands()


@lab.command()
def train(
    recipe: Annotated[
        str,
        typer.Option(
            help="What to train: shapes, shapes-ablation or shapes-teacher.",
            autocompletion=cli_options.recipes,
        ),
    ] = "shapes",
    design: Annotated[
        str,
        typer.Option(
            help="himix, uniform, hierarchical or vanilla: the paper's four.",
            autocompletion=cli_options.designs,
        ),
    ] = "himix",
    seed: Seed = 0,
    output: Annotated[
        Path | None,
        output_option("A folder for states and, at the end, the checkpoint."),
    ] = None,
    scenes: Scenes = 2000,
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


@lab.command("eval")
def evaluate(
    model: Annotated[
        Path | None, typer.Argument(help="A bundle or a checkpoint; by default as for run.")
    ] = None,
    scenes: Scenes = 2000,
    against: Annotated[
        Path | None, typer.Option(help="Another one, on the CPU, to compare every answer with.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure a model on the shapes world: accuracy for each kind of question."""
    from himix_edge import bundles, evaluation, progress

    with progress.phases("Exporting the demo model, once") as report:
        target = bundles.chosen_bundle(model, report)
    with progress.steps() as bars:
        result = evaluation.evaluate(target, scenes, threads, bars.update, device)
        other = None
        if against:
            other = evaluation.evaluate(against, scenes, threads, bars.update, "cpu")
    if as_json:
        print_json(evaluation.report(result, other))
    else:
        print(evaluation.table(result, other))


@lab.command()
def scene(
    context: typer.Context,
    output: Annotated[Path, output_option("A .png file; with --count, a folder.")],
    seed: Seed = 0,
    size: Annotated[int, typer.Option(help="Width and height in pixels.", min=16, max=4096)] = 336,
    answer: Annotated[bool, typer.Option("--answer", help="Print its true description.")] = False,
    count: Annotated[
        int | None,
        typer.Option(help="Draw so many into a folder, with questions and right answers.", min=1),
    ] = None,
) -> None:
    """Draw a random scene of the demo model's world, or a folder of them."""
    import numpy as np

    from himix_edge import progress
    from himix_edge.files import PNG, whole_file
    from himix_edge.shapes.album import write_album
    from himix_edge.shapes.questions import description
    from himix_edge.shapes.render import render
    from himix_edge.shapes.scenes import random_scene

    if count is not None:
        refuse_beside("--count", context, "size", "answer")
        with progress.steps() as bars:
            write_album(output, count, seed, lambda done: bars.update("drawing", done, count, ""))
        print(output)
        return
    drawn = random_scene(np.random.default_rng(seed))
    with whole_file(output, begins=PNG) as file:
        render(drawn, size).save(file, format="PNG")
    print(description(drawn) if answer else output)


@lab.command()
def flops(
    context: typer.Context,
    encoder: Encoder = DEFAULT_ENCODER,
    decoder: Decoder = DEFAULT_DECODER,
    text: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 64,
    image_tokens: Annotated[
        int | None,
        typer.Option(
            help="Image tokens; by default the encoder's. The paper counts 728 of SigLIP's 729."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the costs into this .png file.")] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's tables, each figure beside ours.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compute what a model costs in each design, by its dimensions alone."""
    from himix_edge.analysis import report
    from himix_edge.analysis.paper import cells
    from himix_edge.analysis.plot import save_plot

    if paper:
        refuse_beside("--paper", context, "encoder", "decoder", "text", "image_tokens", "plot")
        figures = cells()
        if as_json:
            print_json({"cells": report.paper_report(figures)})
            return
        report.print_tables(report.paper_tables(figures))
        print(report.paper_summary(figures))
        return
    result = report.pair_report(encoder, decoder, text, image_tokens)
    if plot:
        config = report.pair_config(encoder, decoder)
        save_plot(plot, config, f"{encoder} + {decoder}", text, result["image_tokens"])
    if as_json:
        print_json(result)
    else:
        report.print_tables(report.pair_tables(result))


@lab.command()
def models(as_json: Json = False) -> None:
    """List the encoders and decoders that are known by name, with their sizes and costs."""
    from himix_edge.analysis import report

    result = report.models_report()
    if as_json:
        print_json(result)
    else:
        report.print_tables(report.models_tables(result))
