"""What a killed writer left is put back, and nothing is overwritten by it; places without locks."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from himix_edge import claims
from himix_edge.claims import holder_name
from himix_edge.errors import OutputError
from himix_edge.files import put_back, sole_writer, whole_file, whole_folder


def left_by_a_kill(place: Path, journal: str, **texts: str) -> Path:
    """The hidden folder beside `place`, as if its writer had been killed with that journal."""
    holder = place.parent / holder_name(place.name)
    (holder / "new" / place.name).mkdir(parents=True)
    (holder / "new" / place.name / "zeta").write_text("new")
    (holder / journal).mkdir()
    for name, text in texts.items():
        (holder / journal / name).write_text(text)
    return holder


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_folder_moved_aside_comes_back(tmp_path: Path) -> None:
    left_by_a_kill(tmp_path / "out", "aside", old="old")
    put_back(tmp_path / "out")
    assert contents(tmp_path) == {"out/old": "old"}


def test_a_folder_moved_aside_replaces_nothing(tmp_path: Path) -> None:
    holder = left_by_a_kill(tmp_path / "out", "aside", old="old")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    put_back(tmp_path / "out")  # can't be: all stays as it is
    with (
        pytest.raises(OutputError, match=r"cannot put back .*out, which a stopped run"),
        whole_folder(tmp_path / "out"),
    ):
        raise AssertionError
    found = contents(tmp_path)
    assert found["out/mine"] == "mine"
    assert found[f"{holder.name}/aside/old"] == "old"


def test_files_that_were_leaving_come_back_and_replace_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    holder = left_by_a_kill(tmp_path / "out", "leaving", one="old", two="old")
    (tmp_path / "out" / "two").write_text("mine")
    with (
        pytest.raises(OutputError, match=r"cannot put back .*two, which a stopped run"),
        whole_folder(tmp_path / "out"),
    ):
        raise AssertionError
    assert (tmp_path / "out" / "two").read_text() == "mine"
    assert (holder / "leaving" / "two").read_text() == "old"
    (tmp_path / "out" / "two").unlink()
    put_back(tmp_path / "out")
    assert contents(tmp_path) == {"out/one": "old", "out/two": "old"}


def test_when_all_have_left_the_new_ones_come(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    left_by_a_kill(tmp_path / "out", "left", old="old")
    put_back(tmp_path / "out")
    assert contents(tmp_path) == {"out/zeta": "new"}


def test_who_only_looks_does_not_wait(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "out"):
        holder = tmp_path / holder_name("out")
        before = claims._held.copy()
        claims._held.clear()  # as for another process
        put_back(tmp_path / "out")
        claims._held.update(before)
        assert holder.is_dir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    for text in ("one", "two"):
        with whole_folder(tmp_path / "out") as folder, whole_file(tmp_path / "a") as file:
            (folder / "a").write_text(text)
            file.write_text(text)
        assert contents(tmp_path) == {"out/a": text, "a": text}
    with pytest.raises(ValueError, match="mine"), whole_folder(tmp_path / "out"):
        raise ValueError("mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


def test_a_kept_folder_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "plan").write_text("built")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    (tmp_path / "out" / "engines").symlink_to("../elsewhere")
    with whole_folder(tmp_path / "out", keep="engines") as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "out" / "engines").is_symlink()
    assert (tmp_path / "out" / "engines" / "plan").read_text() == "built"
    assert not (tmp_path / "out" / "old").exists()
