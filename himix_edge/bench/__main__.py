"""The device's own command line: python -m himix_edge.bench BUNDLE

Its arguments are those of `himix-edge bench`, which takes its place where typer is not installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from himix_edge.bench.measure import Options, measure
from himix_edge.bench.plot import check_format, save_plot
from himix_edge.bench.report import report
from himix_edge.bench.show import text
from himix_edge.console import run_command
from himix_edge.errors import HimixError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    given = parser().parse_args(arguments)
    try:
        names = ("image", "vs", "threads", "text", "rounds", "device")
        options = Options(**{name: getattr(given, name) for name in names})
        if given.plot:
            check_format(given.plot)
        result = report(measure(given.bundle, options))
        if given.plot:
            save_plot(given.plot, result)
        print(json.dumps(result, indent=2) if given.json else text(result))
    except HimixError as error:
        if given.debug:
            raise
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="python -m himix_edge.bench",
        description="Times a bundle, beside what this machine could do at best.",
    )
    default = Options()
    command.add_argument("bundle", type=Path)
    command.add_argument("--image", type=Path, help="a picture; by default a scene drawn for it")
    command.add_argument("--vs", help="vanilla: the same pair without HiMix, in the same rounds")
    command.add_argument("--threads", type=int, metavar="N", help="all cores by default")
    command.add_argument("--text", type=int, default=default.text, help="tokens of the prompt")
    command.add_argument(
        "--rounds", type=int, default=default.rounds, help="how often everything is timed, in turn"
    )
    command.add_argument("--device", default=default.device, help="cpu")
    command.add_argument("--plot", type=Path, help="draw it into this .png or .svg file")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    return command


if __name__ == "__main__":
    sys.exit(run_command(main))
