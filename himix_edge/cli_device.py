"""The commands for a device: build, plan, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from himix_edge import cli_options
from himix_edge.analysis.devices import DEVICES
from himix_edge.cli_options import Commands, Decoder, Encoder, Json
from himix_edge.console import print_json
from himix_edge.presets import DEFAULT_DECODER, DEFAULT_ENCODER

device = Commands()


@device.command()
def build(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    target: Annotated[
        str,
        typer.Option(
            help="trt, for this device; or rtx-sm86, rtx-sm89, rtx-sm120, rtx-sm121.",
            autocompletion=cli_options.engine_targets,
        ),
    ] = "trt",
    max_prompt: Annotated[
        int | None,
        typer.Option(help="Tokens of one step; by default 512, or as many as there is room for."),
    ] = None,
    max_cache: Annotated[
        int | None, typer.Option(help="Slots of the cache, where the export has not fixed it.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Engines that later TensorRT reads too.")
    ] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Engines without weights: they stay in ONNX.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Build even where memory seems too small.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be built, and build nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build a bundle's graphs into engines of TensorRT, kept in the bundle."""
    from himix_edge import progress
    from himix_edge.engines.build import build_engines
    from himix_edge.engines.plan import plan_build

    plan = plan_build(
        bundle,
        target,
        max_prompt=max_prompt,
        max_cache=max_cache,
        version_compatible=version_compatible,
        strip_weights=strip_weights,
    )
    if dry_run:
        print(json.dumps(plan.to_dict(), indent=2) if as_json else plan.text())
        return
    with progress.steps() as bars:
        built = build_engines(
            plan,
            force=force,
            report=lambda name, done, said: bars.update(name, round(100 * done), 100, said),
        )
    if as_json:
        print_json(built.to_dict())
        return
    for graph, seconds in built.seconds.items():
        print(f"{graph}: built in {seconds:.0f} s")
    print(f"{built.engines.folder}: {built.engines.key}")


@device.command()
def plan(
    on: Annotated[
        str,
        typer.Option(
            "--device",
            help=f"One of: {', '.join(DEVICES)}.",
            autocompletion=cli_options.boards,
        ),
    ],
    encoder: Encoder = DEFAULT_ENCODER,
    decoder: Decoder = DEFAULT_DECODER,
    target: Annotated[
        str | None,
        typer.Option(
            help="A target of `export`; by default what suits the device.",
            autocompletion=cli_options.targets,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16; by default the target's.",
            autocompletion=cli_options.dtypes,
        ),
    ] = None,
    vision: Annotated[
        str | None,
        typer.Option(
            help="The encoder's weights are stored in int8, int4 or fp8.",
            autocompletion=cli_options.storages,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="The decoder's weights are stored in int8, int4 or fp8.",
            autocompletion=cli_options.storages,
        ),
    ] = None,
    text: Annotated[int, typer.Option(help="Tokens of the question.")] = 64,
    max_text: Annotated[int, typer.Option(help="Tokens of question and answer together.")] = 1024,
    as_json: Json = False,
) -> None:
    """Compute whether a pair fits a device, and the least time it takes, by dimensions alone."""
    from himix_edge.analysis.memory import setting_for
    from himix_edge.analysis.plan import plan_report, plan_text
    from himix_edge.analysis.report import pair_config

    setting = setting_for(on, target, dtype, vision, weights, text, max_text)
    config, name = pair_config(encoder, decoder), f"{encoder} + {decoder}"
    result = plan_report(on, config, name, setting)
    print(json.dumps(result, indent=2) if as_json else plan_text(result))


@device.command()
def doctor(as_json: Json = False) -> None:
    """Say what this device has, what fits it, and the command for each thing missing."""
    from himix_edge.doctor.__main__ import examine

    raise typer.Exit(examine(as_json=as_json))
