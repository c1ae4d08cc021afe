"""A kill between any two system calls of a writer loses neither the old output nor the new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from himix_edge import files
from tests.reliability import killed
from tests.reliability.table import tried

HAPPENS = "after the next look the old or the new is whole; after the next run nothing is left"


def kills(way: str, room: Path, *options: str, within: tuple[str, ...] = ()) -> dict[str, object]:
    """What `killed.py` reports."""
    room.mkdir()
    done = subprocess.run(
        [*within, sys.executable, killed.__file__, way, str(room), *options],
        env={**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    report: dict[str, object] = json.loads(done.stdout)
    return report


@tried("Interruptions", "SIGKILL before every system call that writes a file", HAPPENS)
def test_a_file(tmp_path: Path) -> None:
    report = kills("file", tmp_path / "room")
    assert report["wrong"] == []
    assert int(str(report["kills"])) > 10


@tried(
    "Interruptions",
    "SIGKILL before every system call that replaces a bundle",
    "the old one or the new one, with its engines, is whole at once; nothing is left after the "
    "next run",
)
def test_an_exchange(tmp_path: Path) -> None:
    report = kills("exchanged", tmp_path / "room")
    assert report["wrong"] == []
    assert report["in_parts"] == 0
    assert int(str(report["kills"])) > 40


@tried("Interruptions", "the same in an empty folder, and where there is none yet", HAPPENS)
@pytest.mark.slow
@pytest.mark.parametrize("way", ["nothing", "empty"])
def test_a_new_bundle(tmp_path: Path, way: str) -> None:
    assert kills(way, tmp_path / "room")["wrong"] == []


@tried("Interruptions", "the same in the working folder, which must stay the same folder", HAPPENS)
@pytest.mark.slow
def test_the_working_folder(tmp_path: Path) -> None:
    report = kills("working folder", tmp_path / "room")
    assert report["wrong"] == []
    assert int(str(report["in_parts"])) > 0  # what a reader finds until the next look


@tried("Interruptions", "the same on a system that can't exchange two folders in one step", HAPPENS)
@pytest.mark.slow
def test_without_an_exchange(tmp_path: Path) -> None:
    assert kills("no exchange", tmp_path / "room")["wrong"] == []


@tried("Interruptions", "a second SIGKILL, at random, in the run after the first", HAPPENS)
@pytest.mark.slow
@pytest.mark.parametrize("way", ["exchanged", "working folder"])
def test_two_kills(tmp_path: Path, way: str) -> None:
    assert kills(way, tmp_path / "room", "twice")["wrong"] == []


@tried("Interruptions", "SIGKILL before every system call that fills a mount point", HAPPENS)
@pytest.mark.slow
def test_a_mount_point(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("mounts need a namespace of their own, and `unshare -rm` makes none here")
    mount = 'mkdir "$0/out"; mount -t tmpfs none "$0/out"; exec "$@"'
    room = tmp_path / "room"
    report = kills("mount", room, within=("unshare", "-rm", "sh", "-ec", mount, str(room)))
    assert report["wrong"] == []
    assert int(str(report["in_parts"])) > 0
