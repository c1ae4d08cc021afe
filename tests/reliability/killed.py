"""A writer killed before each of its system calls: what is left, and what the next run makes of it.

    python killed.py WAY FOLDER [twice]     prints one JSON line: the kills, and all that was wrong

Python tells an audit hook of every call that changes a folder before it makes it: the n-th kills.
No torch here: each kill is a fork. See `test_kills.py`.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from himix_edge import replacing
from himix_edge.files import Kind, put_back, refuse_foreign_folder, whole_file, whole_folder

CALLS = ("os.", "shutil.", "open", "fcntl.", "ctypes.dlsym")  # renameat2 is looked up by dlsym
LOOKS = ("os.listdir", "os.scandir", "os.walk")
OLD = dict.fromkeys(("manifest.json", "vision.onnx", "old.txt"), "old")
NEW = dict.fromkeys(("manifest.json", "vision.onnx", "zeta"), "new")
THIRD = dict.fromkeys(NEW, "third")
ENGINES = {"engines/a/plan": "built"}
BUNDLE = Kind("bundle", lambda f: None if (f / "manifest.json").is_file() else "no manifest.json")
MOUNTED = {"mount"}


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write(place: Path, texts: dict[str, str]) -> None:
    if place.suffix == ".txt":
        with whole_file(place) as file:
            file.write_text(texts["zeta"])
        return
    refuse_foreign_folder(place, BUNDLE)
    with whole_folder(place, kind=BUNDLE, keep="engines", last="manifest.json") as folder:
        for name, text in texts.items():
            (folder / name).write_text(text)


def prepare(way: str, room: Path) -> Path:
    """An old bundle, or a file, in an otherwise empty folder; mounts stay."""
    os.chdir("/")
    place = room / ("out.txt" if way == "file" else "out")
    for entry in room.iterdir():
        if entry.is_file():
            entry.unlink()
        elif way not in MOUNTED or entry != place:
            shutil.rmtree(entry)
    if way == "file":
        place.write_text("old")
        return place
    place.mkdir(exist_ok=True)
    for entry in place.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if way == "nothing":
        place.rmdir()
    elif way != "empty":
        for name, text in {**OLD, **ENGINES}.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
    if way == "working folder":
        os.chdir(place)
    return place


def forked(act: Callable[[], Any], kill_at: int | None = None) -> int:
    """Runs it in a child, killed before its `kill_at`-th call; the child's wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    seen = 0

    def count(event: str, _: Any) -> None:
        nonlocal seen
        if event.startswith(CALLS) and event not in LOOKS:
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_at is not None:
        sys.addaudithook(count)
    try:
        act()
    except BaseException as error:  # noqa: BLE001 (whatever it is, the child must end here)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def wrong_after(way: str, room: Path, first: int, second: int | None, stages: list[str]) -> str:
    """What is wrong after a kill, a second one during the next run, a look, and an undisturbed run.

    Returns:
        "" if nothing is; "done" if the writer ended before it was killed.
    """
    place = prepare(way, room)
    if not os.WIFSIGNALED(forked(lambda: write(place, NEW), first)):
        return "done"
    if second is not None:
        forked(lambda: write(place, NEW), second)
    if way == "file":
        left: Any = place.read_text()
        whole = left in ("old", "new")
    else:
        if way in ("exchanged", "working folder", "mount", "empty", "nothing"):
            stages.append("whole" if is_whole(way, contents_if(place)) else "in parts")
        forked(lambda: put_back(place))
        left = contents_if(place)
        whole = is_whole(way, left)
    if not whole:
        return f"after the kill: {left}"
    if status := forked(lambda: write(place, THIRD)):
        return f"the next run ended with {status}"
    found = contents(room)
    expected = (
        {"out.txt": "third"}
        if way == "file"
        else {
            f"out/{name}": text
            for name, text in {**THIRD, **({} if way in ("empty", "nothing") else ENGINES)}.items()
        }
    )
    return "" if found == expected else f"after the next run: {found}"


def contents_if(place: Path) -> dict[str, str]:
    """Without what is hidden in a folder that is being filled."""
    found = contents(place) if place.exists() else {}
    return {name: text for name, text in found.items() if not name.startswith(".himix-edge-")}


def is_whole(way: str, found: dict[str, str]) -> bool:
    if way in ("empty", "nothing"):
        return found in ({}, NEW)
    return found in ({**OLD, **ENGINES}, {**NEW, **ENGINES})


def main(way: str, room: Path, *, twice: bool) -> None:
    if way == "no exchange":
        replacing._exchanged = lambda *_: False
    os.fsync = lambda fd: None  # noqa: ARG005 (the disk outlives a killed process)
    draw, kills = random.Random(0), 0
    wrong: list[str] = []
    stages: list[str] = []
    for first in itertools.count(1):
        second = draw.randrange(1, 90) if twice else None
        found = wrong_after(way, room, first, second, stages)
        if found == "done":
            break
        kills += 1
        if found:
            wrong.append(f"killed at {first}, {second}: {found}")
    print(json.dumps({"kills": kills, "in_parts": stages.count("in parts"), "wrong": wrong}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), twice="twice" in sys.argv[3:])
