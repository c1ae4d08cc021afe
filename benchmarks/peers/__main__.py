"""HiMix beside vanilla models in ONNX Runtime GenAI, OpenVINO GenAI, llama.cpp and transformers.

    setup     an environment for each peer, from PyPI
    make      random weights at true size, in every peer's own format
    measure   all that run, interleaved; results.json
    report    peers.md, peers.png and peers.svg of it

    python -m benchmarks.peers setup --envs build/peers/envs
    python -m benchmarks.peers make --envs build/peers/envs --models build/peers/models
    python -m benchmarks.peers measure --envs build/peers/envs --models build/peers/models \\
        --himix tinyclip-int4=BUNDLE --himix siglip-int4=BUNDLE --output build/peers/run
    python -m benchmarks.peers report build/peers/run

No peer knows HiMix, so each pushes N + 64 tokens through the decoder where HiMix pushes 64; each
pair gets its encoder in the fastest form its tools make. It runs in himix-edge's own environment
(`[export,plot]`), from the root of the source tree. A peer that does not install, build or run is
named in the results with its error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.peers import plot
from benchmarks.peers.contestants import CLASSES, IMAGE_TOKENS
from benchmarks.peers.make import make, setup
from benchmarks.peers.measure import measure
from benchmarks.peers.report import markdown
from himix_edge.files import whole_file


def bundles_of(named: list[str]) -> dict[str, Path]:
    """["tinyclip-int4=BUNDLE", ...] by name; what follows the class in a name is free.

    Raises:
        ValueError: another name, or no such folder.
    """
    found = {}
    known = [f"{encoder}-{group}" for encoder in IMAGE_TOKENS for group in CLASSES]
    for one in named:
        name, _, folder = one.partition("=")
        if "-".join(name.split("-")[:2]) not in known or not Path(folder).is_dir():
            raise ValueError(f"--himix {one}: expected NAME=FOLDER, NAME like {', '.join(known)}")
        found[name] = Path(folder).resolve()
    return found


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("setup", "make", "measure"):
        command = commands.add_parser(name)
        command.add_argument("--envs", type=Path, required=True)
        if name != "setup":
            command.add_argument("--models", type=Path, required=True)
        if name == "measure":
            command.add_argument("--himix", action="append", default=[], metavar="NAME=BUNDLE")
            command.add_argument("--output", type=Path, required=True)
            command.add_argument("--rounds", type=int, default=5)
            command.add_argument("--class", dest="groups", nargs="+", choices=CLASSES)
            command.add_argument("--only", nargs="+", default=[], help="parts of names")
            command.add_argument("--no-cold", dest="cold", action="store_false")
    command = commands.add_parser("report")
    command.add_argument("output", type=Path)
    command.add_argument("--plot", choices=CLASSES, help="the class drawn; the first by default")
    return parser


def main() -> None:
    """Runs one command."""
    options = parser().parse_args()
    if options.command == "setup":
        sys.exit(setup(options.envs, say))
    if options.command == "make":
        sys.exit(make(options.envs.resolve(), options.models.resolve(), say))
    if options.command == "measure":
        try:
            bundles = bundles_of(options.himix)
        except ValueError as error:
            sys.exit(str(error))
        measure(
            bundles,
            options.models.resolve(),
            options.envs.resolve(),
            options.output,
            options.rounds,
            options.groups or list(CLASSES),
            options.only,
            options.cold,
            say,
        )
        return
    results = json.loads((options.output / "results.json").read_text())
    with whole_file(options.output / "peers.md") as file:
        file.write_text(markdown(results))
    plot.save_plots(options.output, results, options.plot or next(iter(results["classes"])))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
