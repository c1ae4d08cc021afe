"""The command that measures: bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from himix_edge.cli_options import Command, Commands, Json, Plot, Threads, given, offering

bench_app = Commands()


class _Bench(Command):
    defaults = ("himix_edge.bench.measure", "Options")


@bench_app.command(cls=_Bench)
def bench(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    image: Annotated[
        Path | None, typer.Option(help="A picture; by default a scene drawn for it.")
    ] = None,
    vs: Annotated[
        str | None,
        typer.Option(
            help="vanilla: time the same pair without HiMix too, in the same rounds.",
            autocompletion=offering("vanilla"),
        ),
    ] = None,
    threads: Threads = None,
    text: Annotated[int | None, typer.Option(help="Tokens of the prompt.")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="How often everything is timed, in turn.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Where to run; cpu alone so far.", autocompletion=offering("cpu")),
    ] = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Time a bundle phase by phase, beside what this machine could do at best."""
    from himix_edge import progress
    from himix_edge.bench.measure import Options, measure
    from himix_edge.bench.plot import check_format, save_plot
    from himix_edge.bench.report import report
    from himix_edge.bench.show import text as text_of

    options = Options(
        **given(image=image, vs=vs, threads=threads, text=text, rounds=rounds, device=device)
    )
    if plot:
        check_format(plot)
    with progress.steps() as bars:
        result = report(measure(bundle, options, bars.update))
    if plot:
        save_plot(plot, result)
    print(json.dumps(result, indent=2) if as_json else text_of(result))
