"""Files and folders are whole or not there, whatever ends the writing."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from himix_edge import files, replacing
from himix_edge.errors import BundleError, OutputError
from himix_edge.files import (
    Kind,
    refuse_foreign_folder,
    refuse_overlap,
    refuse_too_large,
    refuse_unwritable_file,
    sha256_of,
    whole_file,
    whole_folder,
    work_folder,
)


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder`, hidden ones too, and every empty folder."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else "(empty folder)"
        for path in folder.rglob("*")
        if path.exists() and (path.is_file() or not any(path.iterdir()))
    }


def write_file(path: Path, failure: BaseException | None = None) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("new")
        if failure:
            raise failure


def write_folder(path: Path, failure: BaseException | None = None) -> None:
    with whole_folder(path) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "a").write_text("new")
        if failure:
            raise failure


WRITERS = [write_file, write_folder]
Writer = Callable[..., None]
FAILURES = [ValueError("mine"), KeyboardInterrupt(), SystemExit(1), BundleError("mine")]
no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_appears_when_whole(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a.txt").exists()
        assert (
            temporary.parent.parent.parent == tmp_path
        )  # the same disk, so that renaming is atomic
        assert temporary.name == "a.txt"
    assert contents(tmp_path) == {"a.txt": "new"}


def test_a_folder_appears_when_whole(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as temporary:
        (temporary / "a.txt").write_text("new")
        assert not (tmp_path / "out").exists()
    assert contents(tmp_path) == {"out/a.txt": "new"}


def test_parents_are_made(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "b" / "c.txt")
    write_folder(tmp_path / "d" / "e")
    assert contents(tmp_path) == {"a/b/c.txt": "new", "d/e/deep/a": "new"}


def test_what_stood_there_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    with whole_folder(tmp_path / "out") as temporary:
        (temporary / "new.txt").write_text("new")
        assert contents(tmp_path / "out") == {"old.txt": "old"}
    with whole_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert contents(tmp_path) == {"a.txt": "new", "out/new.txt": "new"}


def test_one_folder_within_may_outlive_the_replacement(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for name in ("engines/a", "other"):
        (target / name).mkdir(parents=True)
    (target / "engines" / "a" / "plan").write_text("built")
    with whole_folder(target, keep="engines") as folder:
        (folder / "new").write_text("n")
    assert (target / "engines" / "a" / "plan").read_text() == "built"
    assert sorted(path.name for path in target.iterdir()) == ["engines", "new"]
    with whole_folder(target, keep="engines") as folder:
        (folder / "engines").mkdir()
    assert not list((target / "engines").iterdir())  # the new one has its own
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_a_failure_leaves_nothing(tmp_path: Path, write: Writer, failure: BaseException) -> None:
    with pytest.raises(type(failure)) as raised:
        write(tmp_path / "out", failure)
    assert raised.value is failure
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("failure", [*FAILURES, no_space], ids=repr)
def test_a_failure_leaves_what_stood_there(tmp_path: Path, failure: BaseException) -> None:
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("old")
    before = contents(tmp_path)
    for write, name in ((write_file, "a.txt"), (write_folder, "out")):
        with pytest.raises((type(failure), OutputError)):
            write(tmp_path / name, failure)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_an_output_error(tmp_path: Path, write: Writer) -> None:
    with pytest.raises(OutputError) as error:
        write(tmp_path / "out", no_space)
    assert str(error.value) == (
        f"cannot write {tmp_path / 'out'}: expected a place that can be written, with room on "
        "the disk, found No space left on device. Fix: free some space on the disk, or choose "
        "another place"
    )
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("below", ["file/out", "file/deep/out"])
def test_a_file_where_a_folder_is_needed(tmp_path: Path, write: Writer, below: str) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError, match=r"cannot write .*out: expected a place"):
        write(tmp_path / below)
    assert contents(tmp_path) == {"file": "old"}


def test_a_folder_where_the_file_should_go(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("old")
    with pytest.raises(OutputError, match="Is a directory"):
        write_file(tmp_path / "out")
    assert contents(tmp_path) == {"out/a.txt": "old"}


@pytest.mark.parametrize("failure", [no_space, KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("failing", [1, 2], ids=["old-aside", "new-in-place"])
def test_a_failure_between_old_and_new_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, failure: BaseException
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("old")
    calls = 0
    rename = Path.rename

    def failing_rename(self: Path, target: Any) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    monkeypatch.setattr(replacing, "_exchanged", lambda *_: False)  # a system without that step
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write_folder(tmp_path / "out")
    assert contents(tmp_path) == {"out/a.txt": "old"}


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (2 << 20) + 5])
def test_sha256(tmp_path: Path, size: int) -> None:
    data = bytes(i * 7 % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "a").write_bytes(data[:size])
    assert sha256_of(tmp_path / "a") == hashlib.sha256(data[:size]).hexdigest()


# Where the folder must stay the same: filled.


@pytest.fixture
def short_of_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a folder can't be renamed: a mount point, or another user's."""

    def refuse(*_: object) -> bool:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(replacing, "_exchanged", refuse)


def old_folder(path: Path) -> Path:
    """Three files of a bundle, and engines."""
    for name in ("manifest.json", "vision.onnx", "old.txt", "engines/a/plan"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("old")
    return path


def write_bundle(path: Path, failure: BaseException | None = None) -> None:
    with whole_folder(path, keep="engines", last="manifest.json") as folder:
        for name in ("manifest.json", "vision.onnx", "zeta"):
            (folder / name).write_text("new")
        if failure:
            raise failure


OLD = dict.fromkeys(("manifest.json", "vision.onnx", "old.txt", "engines/a/plan"), "old")
NEW = {"manifest.json": "new", "vision.onnx": "new", "zeta": "new", "engines/a/plan": "old"}


def test_an_empty_folder_stays_the_same_folder(tmp_path: Path) -> None:
    """Whoever has mounted it, or works in it, sees what is written."""
    out = tmp_path / "out"
    out.mkdir(mode=0o750)
    before = out.stat().st_ino
    write_folder(out)
    assert contents(tmp_path) == {"out/deep/a": "new"}
    assert (out.stat().st_ino, out.stat().st_mode & 0o777) == (before, 0o750)


def test_the_working_folder_stays_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = old_folder(tmp_path / "out")
    monkeypatch.chdir(out)
    before = out.stat().st_ino
    write_bundle(Path())
    assert contents(tmp_path) == {f"out/{name}": text for name, text in NEW.items()}
    assert out.stat().st_ino == before
    monkeypatch.chdir(out / "engines")
    write_bundle(Path(".."))
    assert out.stat().st_ino == before


@pytest.mark.parametrize("name", ["link", "sub/../out", "out/.", "./out"])
def test_a_folder_by_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    old_folder(tmp_path / "out")
    Path("link").symlink_to("out")
    write_bundle(Path(name))
    assert Path("link").is_symlink()
    assert contents(tmp_path / "out") == NEW


def test_a_file_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "link").symlink_to("a.txt")
    write_file(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.usefixtures("short_of_exchanges")
def test_a_folder_that_cannot_be_renamed_is_filled(tmp_path: Path) -> None:
    out = old_folder(tmp_path / "out")
    before = out.stat().st_ino
    write_bundle(out)
    assert contents(tmp_path) == {f"out/{name}": text for name, text in NEW.items()}
    assert out.stat().st_ino == before


@pytest.mark.usefixtures("short_of_exchanges")
@pytest.mark.parametrize("failure", [no_space, KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("failing", range(1, 7))
@pytest.mark.parametrize("after", [False, True])
def test_filling_is_undone_whenever_it_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: int,
    failure: BaseException,
    after: bool,
) -> None:
    """Three old entries out, three new ones in; and never a manifest without its files."""
    out = old_folder(tmp_path / "out")
    rename, calls = Path.rename, 0

    def failing_rename(self: Path, target: Any) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing and not after:
            raise failure
        done = rename(self, target)
        texts = {path.name: path.read_text() for path in out.iterdir() if path.is_file()}
        if "manifest.json" in texts:  # whole: all is old, or all is new
            assert len(texts) == 3
            assert len(set(texts.values())) == 1
        if calls == failing:
            raise failure
        return done

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write_bundle(out)
    assert contents(out) == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_a_failure_leaves_a_filled_folder_empty(tmp_path: Path, failure: BaseException) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(type(failure)):
        write_bundle(tmp_path / "out", failure)
    assert contents(tmp_path) == {"out": "(empty folder)"}


def test_a_failure_takes_back_the_parents_that_it_made(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for write in WRITERS:
        with pytest.raises(ValueError, match="mine"):
            write(tmp_path / "a" / "b" / "c" / "d", ValueError("mine"))
    assert contents(tmp_path) == {"a": "(empty folder)"}


def test_the_replaced_folder_keeps_who_may_read_it(tmp_path: Path) -> None:
    out = old_folder(tmp_path / "out")
    out.chmod(0o700)
    write_bundle(out)
    assert out.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["a" * 255, "b" * 250 + ".png", "caf\u00e9", "\udcff", " ", "-o"])
@pytest.mark.parametrize("write", WRITERS)
def test_every_name_that_the_system_takes(tmp_path: Path, write: Writer, name: str) -> None:
    for _ in range(2):  # anew, and in place of the first
        write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


# Readers and writers at the same time; kills.

exchanging = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="exchanging two folders in one step is Linux's"
)


@exchanging
def test_readers_always_find_a_whole_folder_and_writers_never_fail(tmp_path: Path) -> None:
    out, absent, failed = old_folder(tmp_path / "out"), 0, []

    def write() -> None:
        try:
            for _ in range(40):
                write_bundle(out)
        except OutputError as error:
            failed.append(error)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        absent += not (out / "manifest.json").exists()
        absent += not (out / "engines" / "a" / "plan").exists()
    for writer in writers:
        writer.join()
    assert (failed, absent) == ([], 0)
    assert contents(tmp_path) == {f"out/{name}": text for name, text in NEW.items()}


KILLED = """
import os, signal, sys
from pathlib import Path
from himix_edge import files, replacing

real, calls = replacing._exchanged, 0
def exchanged(*folders):
    done = real(*folders)
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "before":
    exchanged = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
replacing._exchanged = exchanged
with files.whole_folder(Path(sys.argv[1]), keep="engines") as folder:
    for name in ("manifest.json", "vision.onnx", "zeta"):
        (folder / name).write_text("new")
"""


@exchanging
@pytest.mark.parametrize(("moment", "left"), [("before", OLD), ("after", NEW)])
def test_a_kill_at_the_exchange_leaves_a_whole_folder(
    tmp_path: Path, moment: str, left: dict[str, str]
) -> None:
    out = old_folder(tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert contents(out) == left


# What can't work, refused before the work.


def stranger(folder: Path) -> str | None:
    return None if (folder / "manifest.json").is_file() else "it has no manifest.json"


BUNDLE = Kind("bundle", stranger)


@pytest.mark.parametrize(
    "place", ["nothing", "a/b/c", "empty", "bundle", "link", "left over", "fs"]
)
def test_places_that_can_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    old_folder(tmp_path / "bundle")
    (tmp_path / "link").symlink_to("bundle")
    (tmp_path / "left over" / ".himix-edge-abc.partial").mkdir(parents=True)
    (tmp_path / "fs" / "lost+found").mkdir(parents=True)
    before = contents(tmp_path)
    refuse_foreign_folder(tmp_path / place, BUNDLE)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("file", "a file"),
        ("dangling", "a file"),
        ("foreign", "another folder"),
        ("file/out", "Not a directory"),
        ("file/deep/out", "Not a directory"),
        ("a" * 256, "File name too long"),
    ],
)
def test_places_that_cannot(tmp_path: Path, place: str, found: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=found):
        refuse_foreign_folder(tmp_path / place, BUNDLE)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["folder", "file/a.png", "pipe"])
def test_files_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # as /dev/null, which is no file to be replaced either
    with pytest.raises(OutputError):
        refuse_unwritable_file(tmp_path / place)
    with pytest.raises(OutputError):
        write_file(tmp_path / place)
    assert (tmp_path / "pipe").is_fifo()
    refuse_unwritable_file(tmp_path / "new" / "a.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]


@pytest.mark.parametrize("output", ["b", "b/new", "b/sub/new", "", "link", "sub/../b", "link/new"])
def test_an_output_that_is_its_source(tmp_path: Path, output: str) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "link").symlink_to("b")
    (tmp_path / "sub").mkdir()
    with pytest.raises(OutputError, match="which is read"):
        refuse_overlap(tmp_path / output, tmp_path / "b")
    refuse_overlap(tmp_path / "c", tmp_path / "b")
    refuse_overlap(tmp_path / "b2", tmp_path / "b")


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    refuse_too_large(tmp_path / "not" / "yet", 1000)
    with pytest.raises(OutputError, match=r"expected about 1,000,000,000,000 MB free"):
        refuse_too_large(tmp_path / "not" / "yet", 10**18)
    assert not contents(tmp_path)


def test_what_a_long_run_goes_on_from_lies_beside(tmp_path: Path) -> None:
    for place in ("out", "sub/../out"):
        assert work_folder(tmp_path / place, ".state") == tmp_path / "out.state"


# Mount points, and folders that others own: in a namespace of their own.

MOUNTED = """
set -e
mkdir mounted bound-from 'bound to' locked locked/out small read-only
mount -t tmpfs none mounted
mount --bind bound-from 'bound to'
mount --bind locked locked
mount -t tmpfs none locked/out
mount -o remount,ro,bind locked
mount -t tmpfs -o size=1m none small
mount -t tmpfs none read-only
mount -o remount,ro read-only
exec "$0" -c "$1"
"""
CHECKS = """
from pathlib import Path
from himix_edge.errors import OutputError
from himix_edge.files import *

def files_in(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}

BUNDLE = Kind("bundle", lambda f: None if (f / "manifest.json").is_file() else "no manifest")

def write(path, text, names=("manifest.json", "vision.onnx", "a")):
    refuse_foreign_folder(path, BUNDLE)
    with whole_folder(path, keep="engines", last="manifest.json") as folder:
        for name in names:
            (folder / name).write_text(text)

for name in ("mounted", "bound to", "locked/out"):
    place = Path(name)
    write(place, "one")
    (place / "engines").mkdir()
    (place / "engines" / "plan").write_text("built")
    write(place, "two", ("manifest.json", "vision.onnx"))
    assert files_in(place) == {
        "manifest.json": "two", "vision.onnx": "two", "engines/plan": "built"
    }, files_in(place)
    assert sorted(p.name for p in place.iterdir()) == ["engines", "manifest.json", "vision.onnx"]
    write(place / "within", "three")
    assert len(files_in(place / "within")) == 3
assert len(files_in(Path("bound-from"))) == 6
assert work_folder(Path("locked/out"), ".state") == Path("locked/out").resolve() / (
    ".himix-edge-state.partial")
assert work_folder(Path("mounted"), ".state") == Path("mounted.state").resolve()
for name in ("locked/new", "read-only", "read-only/new", "read-only/deep/new", "/proc/new"):
    try:
        refuse_foreign_folder(Path(name), BUNDLE)
    except OutputError as error:
        assert "cannot write" in str(error), error
        continue
    raise AssertionError(name)
try:
    refuse_too_large(Path("small/deep/out"), 2_000_000)
    raise AssertionError("small")
except OutputError as error:
    assert "found 1 MB" in str(error), error
for folder in ("small", "small/out"):
    try:
        write(Path(folder), "x" * 2_000_000)
        raise AssertionError("room?")
    except OutputError as error:
        assert "No space left on device" in str(error), error
    assert list(Path("small").iterdir()) == []
"""


def test_mount_points(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("mounts need a namespace of their own, and `unshare -rm` makes none here")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", MOUNTED, sys.executable, CHECKS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
