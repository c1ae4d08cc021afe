"""Files and folders are whole or not there, whatever ends the writing."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from himix_edge.errors import BundleError, OutputError
from himix_edge.files import sha256_of, whole_file, whole_folder


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder`, hidden ones too, and every empty folder."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else "(empty folder)"
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
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
        assert temporary.parent.parent == tmp_path  # the same disk, so that renaming is atomic
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
        f"cannot write {tmp_path / 'out'}: expected a folder that can be written, with room on "
        "the disk, found No space left on device. To mend it: choose another place, or free some "
        "space"
    )
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("below", ["file/out", "file/deep/out"])
def test_a_file_where_a_folder_is_needed(tmp_path: Path, write: Writer, below: str) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError, match=r"cannot write .*out: expected a folder"):
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
    replace = Path.replace

    def failing_replace(self: Path, target: Any) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise failure
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing_replace)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write_folder(tmp_path / "out")
    assert contents(tmp_path) == {"out/a.txt": "old"}


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (2 << 20) + 5])
def test_sha256(tmp_path: Path, size: int) -> None:
    data = bytes(i * 7 % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "a").write_bytes(data[:size])
    assert sha256_of(tmp_path / "a") == hashlib.sha256(data[:size]).hexdigest()
