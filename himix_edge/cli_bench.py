"""The command that measures: bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from himix_edge.cli_lab import Json, Threads

bench_app = typer.Typer()


@bench_app.command()
def bench(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    image: Annotated[
        Path | None, typer.Option(help="A picture; by default a scene drawn for it.")
    ] = None,
    vs: Annotated[
        str | None, typer.Option(help="vanilla: the same pair without HiMix, in the same rounds.")
    ] = None,
    threads: Threads = None,
    text: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 64,
    rounds: Annotated[int, typer.Option(help="How often everything is timed, in turn.")] = 5,
    device: Annotated[str, typer.Option(help="cpu.")] = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Draw it into this .png or .svg file.")] = None,
    as_json: Json = False,
) -> None:
    """Time a bundle phase by phase, beside what this machine could do at best."""
    from himix_edge import progress
    from himix_edge.bench.measure import Options, measure
    from himix_edge.bench.plot import check_format, save_plot
    from himix_edge.bench.report import report
    from himix_edge.bench.show import text as text_of

    options = Options(image, vs, threads, text, rounds, device)
    if plot:
        check_format(plot)
    with progress.steps() as bars:
        result = report(measure(bundle, options, bars.update))
    if plot:
        save_plot(plot, result)
    print(json.dumps(result, indent=2) if as_json else text_of(result))
