"""docs/jetson.md: its commands parse, its tables are what is computed, its app runs."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from himix_edge import __version__
from himix_edge.analysis.devices import DEVICES as BOARDS
from himix_edge.cli import app
from himix_edge.doctor.facts import JETPACK
from himix_edge.engines.plan import TARGETS as BUILD_TARGETS
from himix_edge.presets import DECODERS, ENCODERS
from himix_edge.runtimes import load
from himix_edge.runtimes.devices import DEVICES
from himix_edge.targets import TARGETS
from tests.jetson_tables import tables

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "jetson.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.M | re.S)


def commands() -> Iterator[list[str]]:
    """The arguments of every himix-edge command, in code blocks and within sentences."""
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "himix-edge" in words:
                yield words[words.index("himix-edge") + 1 :]
    prose = re.sub(r"^```.*?^```$", "", DOCUMENT, flags=re.M | re.S)
    for quoted in re.findall(r"`himix-edge ([^`\s]+ [^`]+)`", prose):  # not a command's name alone
        yield shlex.split(quoted)


def parsed(arguments: list[str]) -> dict[str, Any]:
    """A command's parameters, by the command line's own parser; nothing is run."""
    group = typer.main.get_command(app)
    name, *rest = arguments
    command = group.commands[name]  # type: ignore[attr-defined]
    parameters: dict[str, Any] = command.make_context(name, rest).params
    return parameters


def test_there_are_commands_of_every_kind() -> None:
    found = list(commands())
    kinds = {"doctor", "export", "info", "build", "run", "plan"}
    assert {arguments[0] for arguments in found} == kinds
    assert len(found) >= 15


@pytest.mark.parametrize("arguments", list(commands()), ids=shlex.join)
def test_a_command_parses(arguments: list[str]) -> None:
    """Its options exist, none is missing, and the names it gives are known."""
    given = parsed(arguments)
    known: dict[str, Any] = {
        "encoder": ENCODERS,
        "decoder": DECODERS,
        "on": BOARDS,
        "device": DEVICES,
        "target": BUILD_TARGETS if arguments[0] == "build" else TARGETS,
    }
    for option in known.keys() & given.keys():
        assert given[option] is None or given[option] in known[option]


def test_what_does_not_parse_is_caught() -> None:
    with pytest.raises(Exception, match="--devise"):
        parsed(["run", "a.jpg", "what", "--devise", "tensorrt"])
    with pytest.raises(Exception, match=r"(?i)missing"):
        parsed(["build", "--dry-run"])


def test_the_tables_are_what_is_computed() -> None:
    for name, lines in tables().items():
        [shown] = re.findall(rf"^<!-- {name} -->\n((?:\|.*\n)+)", DOCUMENT, re.M)
        assert shown.splitlines() == lines


def test_the_releases_are_those_that_doctor_knows() -> None:
    [text] = re.findall(r"<!-- releases -->\n(.*?)\.\n", DOCUMENT, re.S)
    pairs = dict(item.split(" is ") for item in text.replace("\n", " ").split(", "))
    assert pairs == JETPACK


def test_the_wheel_is_this_version() -> None:
    named = re.findall(r"himix_edge-(.+?)-py3-none-any\.whl", DOCUMENT)
    assert len(named) >= 2
    assert set(named) == {__version__}


def test_the_unit_and_its_variables() -> None:
    variables, unit = blocks("ini")
    parser = configparser.ConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit)
    service = parser["Service"]
    assert service["EnvironmentFile"] == "/etc/himix/camera.env"
    assert (service["User"], service["Restart"]) == ("himix", "always")
    assert parser["Install"]["WantedBy"] == "multi-user.target"
    names = set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', blocks("python")[0]))
    assert {line.split("=")[0] for line in variables.split("\n") if line} == names


def test_the_app_answers(tiny_bundle: Path, tmp_path: Path) -> None:
    """With a camera that is a file, on the CPU."""
    Image.new("RGB", (40, 30), (200, 30, 60)).save(tmp_path / "frame.jpg")
    camera = tmp_path / "ffmpeg"
    camera.write_text(f"#!/bin/sh\ncat {shlex.quote(str(tmp_path / 'frame.jpg'))}\n")
    camera.chmod(camera.stat().st_mode | stat.S_IXUSR)
    script = tmp_path / "camera.py"
    script.write_text(blocks("python")[0])
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HIMIX_BUNDLE": str(tiny_bundle),
        "HIMIX_DEVICE": "cpu",
        "HIMIX_PROMPT": "describe",
        "HIMIX_SECONDS": "0",
    }
    running = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert running.stdout is not None
    with running:
        first, second = running.stdout.readline(), running.stdout.readline()
        running.kill()
    model = load(tiny_bundle)
    image = model.encode(tmp_path / "frame.jpg")
    expected = model.generate(image, "describe", max_tokens=60).read()
    assert first == expected.splitlines()[0] + "\n"
    assert second
