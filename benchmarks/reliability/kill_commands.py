"""The real commands, stopped at random moments: is anything lost, is anything left?

    python benchmarks/reliability/kill_commands.py --moments 50

Each of export, quantize, convert and train writes over an output that it made before, with engines
in it where it is a bundle, and is stopped by SIGKILL, SIGTERM or SIGINT in turn, at moments drawn
between its start and its end. After each: the old output or the new one must be whole, with its
engines; after SIGTERM and SIGINT nothing else may be left. After every few: a run that nobody stops
must end well, and leave nothing in the output's parent, in the cache, or in the temporary folder.
The model is a tiny one, and exports take its graphs as they were traced once; each run is a fork of
a process that has imported everything. Linux alone.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir
from PIL import Image

from himix_edge import cli
from himix_edge.bundle.files import BundleFiles
from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH
from himix_edge.convert.pipeline import STATE
from himix_edge.errors import HimixError
from himix_edge.export import bundle
from himix_edge.models.checkpoints import read_checkpoint
from himix_edge.training import loop, recipe
from himix_edge.training.loop import Phase
from tests import tiny
from tests.convert.llava import write_tiny_llava

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
UNDISTURBED_EVERY = 10
PICTURES = 40
ENGINE = "engines/a/plan"


@dataclass(frozen=True)
class Command:
    """A command, and what it writes.

    Attributes:
        output: within the room.
        resumes: what an interrupted run may leave beside the output, to go on from.
    """

    name: str
    arguments: tuple[str, ...]
    output: str
    is_bundle: bool
    resumes: tuple[str, ...] = ()


def prepare(work: Path) -> list[Command]:
    """The tiny models, and the commands that write from them into `work/NAME`."""
    tiny.tiny_checkpoint(work / "checkpoint", tiny.tiny_config())
    write_tiny_llava(work / "llava", "llava_onevision")
    (work / "pictures").mkdir()
    draw = np.random.default_rng(0)
    for i in range(PICTURES):
        blocks = draw.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(blocks).resize((32, 40)).save(work / "pictures" / f"{i:03}.png")
    phases = (
        Phase("encoder", 20, 2, 1e-3),
        Phase("finetune", 20, 2, 1e-3, asked=("describe", "relation")),
    )
    config = tiny.tiny_config(vocab_size=448)
    recipe.RECIPES["tiny"] = recipe.Recipe("tiny", config, phases)
    loop.SAVE_SECONDS = 0.0
    for name in ("export", "quantize", "convert", "train"):
        (work / name).mkdir()
    source, graphs = work / "source", work / "graphs"
    traced = ("--dialect", "portable", "-o", str(graphs))
    run(("export", "--checkpoint", f"{work}/checkpoint", *traced))
    take_graphs(graphs)
    run(("export", "--checkpoint", f"{work}/checkpoint", "--dialect", "ort", "-o", str(source)))
    out = {name: f"{work}/{name}/out" for name in ("export", "quantize", "convert", "train")}
    checkpoint = f"{work}/checkpoint"
    return [
        Command("export", ("--checkpoint", checkpoint, "-o", out["export"]), "out", True),
        Command(
            "quantize",
            (str(source), "--decoder", "int8", "--scenes", "0", "-o", out["quantize"]),
            "out",
            True,
        ),
        Command(
            "convert",
            (
                *(f"{work}/llava", "--calibration", f"{work}/pictures", "--judge", "1"),
                *("--distil", "6", "--distil-images", "2", "-o", out["convert"]),
            ),
            "out",
            False,
            (f"out{STATE}",),
        ),
        Command(
            "train",
            ("--recipe", "tiny", "--scenes", "4", "-o", out["train"]),
            "out/checkpoint",
            False,
        ),
    ]


def take_graphs(folder: Path) -> None:
    """Has exports take a bundle's graphs: tracing takes half a minute, and writes nothing."""
    for function, name in (
        ("vision_onnx_from_weights", VISION_GRAPH),
        ("decoder_onnx_from_weights", DECODER_GRAPH),
    ):
        setattr(bundle, function, lambda *_, graph=folder / name: onnx_ir.load(graph))


def started(arguments: tuple[str, ...], log: Path) -> int:
    """A fork that runs a command line."""
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        os._exit(int(end.code or 0))
    os._exit(99)


def run(arguments: tuple[str, ...]) -> float:
    """A run that nobody stops; its seconds."""
    log = Path(tempfile.gettempdir()).parent / "log"
    begun = time.monotonic()
    _, status = os.waitpid(started(arguments, log), 0)
    if status:
        sys.exit(f"{arguments[0]} ended with {status}: {log.read_text()[-2000:]}")
    return time.monotonic() - begun


def is_whole(command: Command, place: Path) -> bool:
    """Whether the output is there and verifies, with its engines if it is a bundle."""
    try:
        if command.is_bundle:
            with BundleFiles.open(place) as files:
                files.check()
            return (place / ENGINE).read_text() == "built"
        read_checkpoint(place).check()
    except (HimixError, OSError) as error:
        print(error, file=sys.stderr)
        return False
    return True


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def campaign(command: Command, work: Path, moments: int, draw: random.Random) -> dict[str, object]:
    """Stops the command so many times."""
    room = work / command.name
    place = room / command.output
    line = (command.name, *command.arguments)
    log = work / "log"

    def seconds_of_a_run() -> float:
        if command.name == "train":  # or it would find everything done
            for state in (room / "out").glob("*.safetensors"):
                state.unlink()
        return run(line)

    run(line)
    if command.is_bundle:
        (place / ENGINE).parent.mkdir(parents=True)
        (place / ENGINE).write_text("built")
    seconds = seconds_of_a_run()
    rooms = (room, work / "cache", work / "tmp")
    clean = [listing(folder) for folder in rooms]
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    for moment in range(moments):
        number = SIGNALS[moment % len(SIGNALS)]
        if command.name == "train":
            for state in (room / "out").glob("*.safetensors"):
                state.unlink()
        after = draw.random() * seconds
        child = started(line, log)
        time.sleep(after)
        os.kill(child, number)
        _, status = os.waitpid(child, 0)
        ended = os.waitstatus_to_exitcode(status)
        counts["ended before the signal" if ended == 0 else number.name] += 1
        if ended not in (0, -signal.SIGKILL, 143, 130):
            wrong.append(f"{number.name} after {after:.2f} s: exit code {ended}")
        if not is_whole(command, place):
            wrong.append(f"{number.name} after {after:.2f} s: the output is not whole")
        if number is not signal.SIGKILL and not counts["killed since"]:
            wrong += left_over(command, rooms, clean, f"{number.name} after {after:.2f} s")
        if number is signal.SIGKILL:
            counts["killed since"] += 1
            held = [*listing(room), *listing(work / "tmp")]
            counts["kills that left something"] += any(".partial" in name for name in held)
        if moment % UNDISTURBED_EVERY == UNDISTURBED_EVERY - 1 or moment == moments - 1:
            run(line)
            counts["undisturbed runs"] += 1
            counts["killed since"] = 0
            wrong += left_over(command, rooms, clean, f"the run after moment {moment + 1}")
            if not is_whole(command, place):
                wrong.append(f"after moment {moment + 1}, undisturbed: the output is not whole")
    del counts["killed since"]
    return {"command": command.name, "seconds": round(seconds, 1), **counts, "wrong": wrong}


def left_over(
    command: Command, rooms: tuple[Path, ...], clean: list[set[str]], when: str
) -> list[str]:
    """What is there that was not before, but for what a run is to go on from."""
    found: list[str] = []
    for folder, before in zip(rooms, clean, strict=True):
        new = {
            name
            for name in listing(folder) - before
            if not any(name == state or name.startswith(f"{state}/") for state in command.resumes)
        }
        if command.name == "train":
            new = {name for name in new if not name.endswith(".safetensors")}
        found += [f"{when}: {folder.name} has {name}" for name in sorted(new)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=["export", "quantize", "convert", "train"])
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="kills-"))
    (work / "tmp").mkdir()
    os.environ.update(TMPDIR=str(work / "tmp"), HIMIX_EDGE_CACHE=str(work / "cache"))
    tempfile.tempdir = None
    try:
        wrong = False
        for command in prepare(work):
            if command.name in given.only:
                report = campaign(command, work, given.moments, random.Random(given.seed))
                wrong |= bool(report["wrong"])
                print(json.dumps(report), flush=True)
    finally:
        shutil.rmtree(work)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
