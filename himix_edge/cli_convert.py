"""The command that makes a HiMix model of a vanilla one: convert."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from himix_edge import cli_options
from himix_edge.cli_options import Commands, Json, offering, output_option
from himix_edge.console import print_json
from himix_edge.errors import ConfigError
from himix_edge.plain import dataclass_from_dict

if TYPE_CHECKING:
    from himix_edge.convert.pipeline import ConvertOptions
    from himix_edge.convert.report import Conversion

convert_app = Commands()

Pictures = Annotated[
    Path,
    typer.Option(help="A folder of pictures, perhaps with prompts.txt or questions.jsonl."),
]


@convert_app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="A LLaVA: a folder, or a hub id; see docs/convert.md.")
    ],
    calibration: Pictures,
    output: Annotated[Path, output_option("The checkpoint's folder.")],
    distil: Annotated[
        int, typer.Option(help="Steps of training after the fit, towards the model's own answers.")
    ] = 0,
    distil_images: Annotated[int, typer.Option(help="Pictures in each step of --distil.")] = 12,
    judge: Annotated[
        int, typer.Option(help="How many of the pictures held out to compare answers on.")
    ] = 16,
    linear: Annotated[
        bool,
        typer.Option("--linear", help="Linear maps of the features alone, as the paper's are."),
    ] = False,
    join: Annotated[
        str, typer.Option(help="Encoder layers to join to the features, such as -7,-14.")
    ] = "",
    neighbourhood: Annotated[
        int,
        typer.Option(
            help="1: each patch by itself; 3: with the eight around it.",
            autocompletion=offering("1", "3"),
        ),
    ] = 1,
    weighting: Annotated[
        str,
        typer.Option(
            help="none; or attention, to fit best where the prompts look.",
            autocompletion=offering("none", "attention"),
        ),
    ] = "none",
    dtype: Annotated[
        str,
        typer.Option(
            help="What the model computes in: float32, float16 or bfloat16.",
            autocompletion=cli_options.dtypes,
        ),
    ] = "float32",
    device: Annotated[
        str, typer.Option(help="A torch device: cpu, cuda.", autocompletion=offering("cpu", "cuda"))
    ] = "cpu",
    batch: Annotated[int, typer.Option(help="Pictures that run through the model at once.")] = 4,
    as_json: Json = False,
) -> None:
    """Make a HiMix checkpoint of a LLaVA, without training, and say how close it comes.

    The same command goes on after an interrupt.
    """
    from himix_edge.convert.pipeline import ConvertOptions

    fit = {
        "joined_layers": _layers(join),
        "neighbourhood": neighbourhood,
        "connector": not linear,
        "weighting": weighting,
    }
    given = {"distil": distil, "distil_images": distil_images, "judge": judge, "batch": batch}
    more = {"fit": fit, "dtype": dtype, "device": device}
    options = dataclass_from_dict(ConvertOptions, {**given, **more})
    conversion = converted(source, calibration, output, options)
    if as_json:
        print_json({"checkpoint": str(output), **conversion.to_dict()})
        return
    print(summary(conversion, output))
    print(f"Make a bundle of it with: himix-edge export --checkpoint {output}")


def converted(source: str, calibration: Path, output: Path, options: ConvertOptions) -> Conversion:
    """`convert` of the pipeline, with bars on a terminal."""
    from himix_edge import progress
    from himix_edge.convert.pipeline import convert

    with progress.steps() as bars:
        return convert(source, calibration, output, options, bars.update)


def converted_checkpoint(source: str, calibration: Path | None, bundle: Path | None) -> Path:
    """What `export --from` exports: a checkpoint of its own, beside the bundle.

    Raises:
        ConfigError: no pictures, or no place for the two.
        as `convert` of the pipeline.
    """
    from himix_edge.convert.pipeline import ConvertOptions
    from himix_edge.export.bundle import BUNDLE
    from himix_edge.files import refuse_foreign_folder

    if calibration is None or bundle is None:
        raise ConfigError(
            "--from needs two folders", fix="add --calibration PICTURES and --output BUNDLE"
        )
    refuse_foreign_folder(bundle, BUNDLE)
    place = bundle.resolve()  # of a name, where the bundle is "."
    output = place.with_name(f"{place.name}-checkpoint")
    conversion = converted(source, calibration, output, ConvertOptions())
    print(summary(conversion, output), file=sys.stderr)
    return output


def summary(conversion: Conversion, output: Path) -> str:
    """What to know of a conversion, in a few lines."""
    from himix_edge.convert import tables
    from himix_edge.convert.pipeline import PAGE
    from himix_edge.models.stated_ids import without_end

    judged = conversion.distilled or conversion.fitted
    said = [
        f"{output}: {conversion.name} as HiMix, fitted on {conversion.fit.images} pictures.",
        f"In {conversion.fit.held_out} held out: {judged.agreement:.1%} of next tokens agree "
        f"(KL {judged.kl:.4f}), {judged.same} of {len(judged.exchanges)} answers are the same.",
        tables.operations(conversion.to_dict()),
    ]
    if skipped := conversion.fit.skipped:
        said.append(f"Passed over, as unreadable: {', '.join(skipped)}.")
    if warning := without_end(conversion.student.decoder):
        said.append(f"Warning: {warning}.")
    return "\n".join([*said, f"All of it: {output / PAGE}"])


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(
            "join is invalid", expected="numbers of layers, such as -7,-14", found=repr(text)
        ) from error
