"""Which checkpoints were trained here: the newest first, and only those that are still there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from himix_edge.trained import TRAINED, remember_checkpoint, trained_checkpoints


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("HIMIX_EDGE_CACHE", str(folder))
    return folder


def folders(tmp_path: Path, *names: str) -> list[Path]:
    """Remembered one after the other, each a minute after the one before."""
    made = [tmp_path / name for name in names]
    for minute, folder in enumerate(made):
        folder.mkdir()
        remember_checkpoint(folder)
        newest = max((tmp_path / "cache" / TRAINED).iterdir(), key=lambda p: p.stat().st_mtime_ns)
        os.utime(newest, (60 * minute, 60 * minute))
    return made


def test_none_yet() -> None:
    assert trained_checkpoints() == []


def test_the_newest_comes_first_and_none_twice(tmp_path: Path) -> None:
    one, two, three = folders(tmp_path, "one", "two", "three")
    assert trained_checkpoints() == [three, two, one]
    remember_checkpoint(one)
    assert trained_checkpoints() == [one, three, two]


def test_one_that_is_gone_is_left_out(tmp_path: Path) -> None:
    one, two = folders(tmp_path, "one", "two")
    shutil.rmtree(two)
    assert trained_checkpoints() == [one]
    two.write_text("a file by now")
    assert trained_checkpoints() == [one]


def test_a_relative_path_stays_true_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    remember_checkpoint(Path("checkpoint"))
    monkeypatch.chdir(tmp_path)
    assert trained_checkpoints() == [tmp_path / "run" / "checkpoint"]
