"""The device's own command line: python -m himix_edge.runtimes IMAGE PROMPT --bundle BUNDLE

Its arguments are those of `himix-edge run`, which takes its place where typer is not installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from himix_edge.bundles import chosen_bundle
from himix_edge.console import run_command
from himix_edge.errors import HimixError
from himix_edge.runtimes.answer import print_answer
from himix_edge.runtimes.devices import DEVICES
from himix_edge.runtimes.model import load
from himix_edge.runtimes.sampling import SamplingOptions


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    given = parser().parse_args(arguments)
    try:
        options = options_from_arguments(given)
        bundle = chosen_bundle(given.bundle, lambda _phase, _done: None)
        model = load(
            bundle,
            device=given.device,
            threads=given.threads,
            auto_build=given.auto_build,
            report=lambda *progress: print(*progress, file=sys.stderr),
        )
        print_answer(model, given.image, given.prompt, options, as_json=given.json)
    except HimixError as error:
        if given.debug:
            raise
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="python -m himix_edge.runtimes", description="Answers a question about an image."
    )
    command.add_argument("image", type=Path)
    command.add_argument("prompt")
    command.add_argument(
        "--bundle", type=Path, help="a folder that himix-edge export wrote; by default the last one"
    )
    sampling = command.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="of the answer")
    sampling.add_argument(
        "--temperature", type=float, metavar="T", help="0, the default, is greedy"
    )
    sampling.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    sampling.add_argument("--top-p", type=float, metavar="P", help="... that hold this probability")
    sampling.add_argument("--repetition-penalty", type=float, metavar="R", help="1 is off")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed, the same answer")
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    command.add_argument("--device", default="auto", help=", ".join(DEVICES))
    command.add_argument(
        "--auto-build", action="store_true", help="build TensorRT engines where none fits"
    )
    command.add_argument("--threads", type=int, metavar="N", help="all cores by default")
    command.add_argument("--json", action="store_true", help="text, token counts, milliseconds")
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    return command


def options_from_arguments(given: argparse.Namespace) -> SamplingOptions:
    """The options given, over the defaults of `SamplingOptions`."""
    values = {
        field.name: getattr(given, field.name) for field in dataclasses.fields(SamplingOptions)
    }
    values["stop"] = tuple(given.stop) if given.stop else None
    return SamplingOptions().updated({name: v for name, v in values.items() if v is not None})


if __name__ == "__main__":
    sys.exit(run_command(main))
