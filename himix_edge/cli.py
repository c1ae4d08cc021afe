"""The `himix-edge` commands. Each is thin: what it does lives in the package it calls.

Here: bundles, made, looked into and asked. In `cli_device.py`: engines and devices.
In `cli_trust.py`: signatures, and engines from elsewhere.
In `cli_lab.py`: models, trained, judged and reckoned. In `cli_convert.py`: models of another kind,
made into ours. In `cli_bench.py`: bundles, timed. In `cli_options.py`: what they share.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from himix_edge import __version__, cli_options
from himix_edge.cli_bench import bench_app
from himix_edge.cli_convert import convert_app, converted_checkpoint
from himix_edge.cli_device import device
from himix_edge.cli_lab import lab
from himix_edge.cli_options import (
    Command,
    Commands,
    Device,
    Json,
    Threads,
    given,
    offering,
    output_option,
    refuse_beside,
)
from himix_edge.cli_trust import trust_app
from himix_edge.console import print_json, printable, run_command
from himix_edge.errors import missing_package
from himix_edge.presets import DEFAULT_DECODER

app = Commands(
    help="HiMix vision-language models from PyTorch to the device.",
    epilog="--debug, anywhere, shows the traceback of an error.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(device)
app.add_typer(trust_app)
app.add_typer(convert_app)
app.add_typer(lab)
app.add_typer(bench_app)


def main(arguments: list[str]) -> None:
    """Runs a command line and exits: 0 done, 1 an error in one line, 2 misuse, 130 Ctrl-C."""
    kept, debug = _without_debug(arguments)
    sys.exit(run_command(lambda: _run_app(kept), debug=debug))


def _run_app(arguments: list[str]) -> int:
    try:
        app(arguments, prog_name="himix-edge")
    except ImportError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        raise missing from error
    return 0


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The command line without --debug, and whether it was there; what follows -- is no option."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != "--debug"]
    return [*options, *arguments[end:]], "--debug" in arguments[:end]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"himix-edge {__version__}")
        raise typer.Exit


class _Run(Command):
    defaults = ("himix_edge.runtimes.sampling", "SamplingOptions")


@app.command(cls=_Run)
def run(
    image: Annotated[str, typer.Argument(help="A picture; - reads it from stdin.")],
    prompt: Annotated[str, typer.Argument(help="What to ask about it.")],
    bundle: Annotated[
        Path | None, typer.Option(help="A bundle; by default the last export, or the demo.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The longest answer, in tokens.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token; above 0 draws one.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the K likeliest tokens; 0 is all of them.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the fewest tokens whose probabilities sum to this."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Above 1, makes tokens of the text so far less likely; 1 changes none."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed draws the same answer.", min=0)
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="A system prompt, where the chat template has one.")
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(help="squash, crop or pad to the model's square; by default as trained."),
    ] = None,
    device: Device = "auto",
    auto_build: Annotated[
        bool, typer.Option("--auto-build", help="Build TensorRT engines where none fits.")
    ] = False,
    threads: Threads = None,
    public_key: Annotated[
        Path | None, typer.Option(help="Run only what this key has signed: a PEM file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask about a picture."""
    from himix_edge import bundles, progress
    from himix_edge.runtimes import SamplingOptions, load
    from himix_edge.runtimes.answer import print_answer
    from himix_edge.runtimes.image_sources import picture_argument

    picture = picture_argument(image)
    changes = given(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop) if stop else None,
    )
    options = SamplingOptions().updated(changes)
    with progress.phases("Exporting the demo model, once") as report:
        chosen = bundles.chosen_bundle(bundle, report)
    with progress.steps() as bars:
        model = load(
            chosen,
            device=device,
            threads=threads,
            auto_build=auto_build,
            public_key=public_key,
            report=lambda name, done, said: bars.update(name, round(100 * done), 100, said),
        )
    print_answer(model, picture, prompt, options, as_json=as_json, resize=resize, system=system)


@app.command()
def export(
    context: typer.Context,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="A vision encoder: a name that `models` lists, a folder, or a hub id.",
            autocompletion=cli_options.encoders,
        ),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            help="A language decoder, likewise; by default qwen2-0.5b.",
            autocompletion=cli_options.decoders,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A HiMix checkpoint; by default one trained here, or the demo model's."),
    ] = None,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights",
            help="Random projections, and random weights of what is named by a preset's name; a "
            "folder or a hub id keeps its own.",
        ),
    ] = False,
    llava: Annotated[
        str | None,
        typer.Option("--from", help="A LLaVA, to `convert` first with the --calibration pictures."),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="Where it will run: cpu, jetpack-6.2, jetpack-7.2, tensorrt or rtx.",
            autocompletion=cli_options.targets,
        ),
    ] = "cpu",
    dialect: Annotated[
        str | None,
        typer.Option(
            help="Operators of the graphs: portable, native or ort; by default the target's.",
            autocompletion=cli_options.dialects,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16; by default the target's.",
            autocompletion=cli_options.dtypes,
        ),
    ] = None,
    max_text: Annotated[
        int | None,
        typer.Option(
            help="Text tokens that the cache holds, in the native dialect; by default 1024."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="A folder of pictures: for --from, and to find what float16 can't hold."),
    ] = None,
    output: Annotated[
        Path | None, output_option("The bundle's folder; by default the model's name, here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a bundle of a checkpoint: ONNX graphs, verified against the model, and all they need."""
    from himix_edge import bundles, progress, targets
    from himix_edge.bundle.summary import megabytes
    from himix_edge.export.bundle import export_bundle
    from himix_edge.models.pairs import Pair, chosen_checkpoint, random_parts
    from himix_edge.models.stated_ids import without_end

    graphs = targets.target(target).updated(dialect, dtype)
    if llava is not None:
        refuse_beside("--from", context, "encoder", "decoder", "checkpoint", "random_weights")
        checkpoint = converted_checkpoint(llava, calibration, output)
    source = chosen_checkpoint(encoder, decoder, checkpoint, random_weights=random_weights)
    folder = output or Path(source.name)
    if random_weights and encoder is not None:
        parts = random_parts(Pair(encoder, decoder or DEFAULT_DECODER))
        print(printable(f"{source.name}: {parts}."), file=sys.stderr)
    if warning := without_end(source.config.decoder):
        print(f"Warning: in {source.name}, {warning}.", file=sys.stderr)
    with progress.phases(f"Exporting {source.name}") as report:
        exported = export_bundle(
            source,
            folder,
            dtype=graphs.dtype,
            dialect=graphs.dialect,
            max_text=max_text,
            calibration=calibration,
            progress=report,
        )
    bundles.remember_export(folder)
    if as_json:
        print_json({"bundle": str(folder), **dataclasses.asdict(exported)})
        return
    manifest, made, checked = exported.manifest, exported.making, exported.checking
    print(f"{folder}: {megabytes(manifest.files)}, equal to the model in PyTorch.")
    print(f"made in {made.seconds:.0f} s and {made.peak_bytes / 1e6:,.0f} MB of memory, ", end="")
    print(f"checked in {checked.seconds:.0f} s and {checked.peak_bytes / 1e6:,.0f} MB.")
    if ranges := manifest.ranges:
        print(f"in float32, since float16 can't hold the values: {ranges['in_float32']}", end="")
        print(f" (measured on {ranges['images']} images; the model card has the largest values).")


@app.command()
def quantize(
    bundle: Annotated[Path, typer.Argument(help="In float32 for CPUs, or float16 for TensorRT.")],
    output: Annotated[Path, output_option("The new bundle's folder.")],
    vision: Annotated[
        str | None,
        typer.Option(
            help="int8; in the native dialect also int4 or fp8; by default as it is.",
            autocompletion=cli_options.storages,
        ),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            help="int8 or int4; in the native dialect also fp8; by default as it is.",
            autocompletion=cli_options.storages,
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Int4 weights that share a scale: 32, 64 or 128; by default 32 on a CPU.",
            autocompletion=offering("32", "64", "128"),
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Bits a weight, scales counted, that int4 layers may take on average on a CPU: "
            "more than 5.2 puts those that lose most into 8 bits; by default none are."
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="The decoder's head and embedding on a CPU: int8, the default, or int4, faster.",
            autocompletion=offering("int8", "int4"),
        ),
    ] = None,
    prefill: Annotated[
        str | None,
        typer.Option(
            help="int8: a second copy of an int4 decoder that reads prompts faster.",
            autocompletion=offering("int8"),
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="How to round the decoder: gptq, by its inputs, the default on a CPU: slower and "
            "closer; or rtn, to nearest.",
            autocompletion=offering("rtn", "gptq"),
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="A folder of pictures, and perhaps prompts.txt, to calibrate with."),
    ] = None,
    judge_text: Annotated[
        Path | None,
        typer.Option(help="A text file to judge the bundle with; by default one of himix-edge's."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Write the bundle though its perplexity grows by more than 10 %."
        ),
    ] = False,
    scenes: Annotated[
        int | None,
        typer.Option(
            help="Scenes to measure accuracy on; by default 500 for a shapes model, else none.",
            min=0,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Store a bundle's weights in 4 or 8 bits, and judge what that costs."""
    from himix_edge import bundles, evaluation, progress
    from himix_edge.bundle.quality import cost_table, quality_of, summary
    from himix_edge.bundle.summary import megabytes
    from himix_edge.contract import Manifest
    from himix_edge.export.quantized_bundle import quantize_bundle
    from himix_edge.export.recipes import WeightChoice

    choice = WeightChoice(vision, decoder, block_size, method, head, prefill, bits)
    with progress.phases(f"Quantizing {bundle}") as report:
        manifest = quantize_bundle(
            bundle,
            output,
            choice,
            calibration=calibration,
            text=judge_text,
            force=force,
            judge=lambda folder: evaluation.accuracies(folder, scenes),
            progress=report,
        )
    bundles.remember_export(output)
    if (quality := quality_of(manifest.quantization)) and quality.verdict != "kept":
        print(printable(f"Warning: {output}: {summary(quality)}."), file=sys.stderr)
    if as_json:
        print_json({"bundle": str(output), **dataclasses.asdict(manifest)})
        return
    before = megabytes(Manifest.read(bundle).files)
    size = megabytes(manifest.files)
    print(printable(f"{output}: {size}, before {before}; {manifest.quantization}."))
    print(printable(cost_table(manifest.quantization)))


@app.command()
def info(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    as_json: Json = False,
) -> None:
    """Check a bundle, file by file, and say what it is."""
    from himix_edge.bundle.files import BundleFiles
    from himix_edge.bundle.summary import summary_of
    from himix_edge.engines.listing import engine_states
    from himix_edge.files import put_back

    put_back(bundle)
    with BundleFiles.open(bundle) as files:
        files.check()
        engines = engine_states(bundle, files.manifest)
        if as_json:
            listed = [engine.to_dict() for engine in engines]
            print_json({**dataclasses.asdict(files.manifest), "engines": listed})
            return
        lines = [*summary_of(files), *map(str, engines)]
        print(printable("\n".join(lines)))
