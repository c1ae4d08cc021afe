"""Files of a checkpoint: pipes, devices and giants are refused at once, links are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from himix_edge.errors import CheckpointError
from himix_edge.models.checkpoint_files import plain_name, read_bytes
from himix_edge.models.checkpoints import read_checkpoint
from himix_edge.models.hub import json_object
from tests.reliability.table import tried


def test_a_file_and_a_link_to_it_are_read(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"{}")
    (tmp_path / "config.json").symlink_to("blob")
    assert read_bytes(tmp_path / "config.json") == b"{}"
    assert json_object(tmp_path / "config.json") == {}


@tried("Bundles", "a pipe or a device as a checkpoint's config.json", "refused at once")
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json: found a pipe or a dev"):
        json_object(path)
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path)


def test_a_giant_is_refused_before_all_of_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 1 << 40)  # no bytes on disk
    with pytest.raises(CheckpointError, match="expected 64 MB at most, found more"):
        json_object(path)


def test_plain_names() -> None:
    path = Path("folder/index.json")
    assert (
        plain_name(path, "model-00001-of-00002.safetensors") == "model-00001-of-00002.safetensors"
    )
    for name in ("../x", "/x", "a/b", "..", ".", "", "a\\b", "a\0", None, 3, ["x"]):
        with pytest.raises(CheckpointError, match=r"cannot use folder/index\.json: expected names"):
            plain_name(path, name)


def test_names_of_weights_in_a_checkpoints_config(tiny_folder: Path, tmp_path: Path) -> None:
    text = (tiny_folder / "config.json").read_text()
    for path in tiny_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(text.replace('"model.safetensors"', '"../secret"'))
    with pytest.raises(CheckpointError, match=r"config\.json: expected names of files in the same"):
        read_checkpoint(tmp_path)
