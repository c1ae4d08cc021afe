"""`convert`, `export --from` and `scene --count` as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGINT
from typing import Any

import pytest

from himix_edge.contract import Manifest
from himix_edge.convert.pipeline import PAGE, STATE
from himix_edge.models.checkpoints import read_checkpoint
from himix_edge.shapes.album import album_scene
from tests import tiny


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's own cache."""
    monkeypatch.setenv("HIMIX_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def album(himix: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    assert himix("scene", "--count", 40, "--seed", 2, "-o", folder).out == f"{folder}\n"
    return folder


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vanilla") / "checkpoint"
    tiny.tiny_checkpoint(folder, tiny.tiny_config("vanilla"))
    return folder


def test_scenes_by_the_folder(album: Path, himix: Any, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (album / "questions.jsonl").read_text().splitlines()]
    _, questions = album_scene(2, 0)
    first = [(line["prompt"], line["answer"]) for line in lines if "00000" in line["image"]]
    assert first == [(question.text, question.answer) for question in questions]
    assert len(list(album.glob("*.png"))) == 40
    misuse = himix("scene", "--count", 2, "--answer", "-o", tmp_path / "x")
    assert misuse.code == 2
    assert "--answer means nothing beside --count" in misuse.err


def test_convert_says_how_close_it_comes(
    himix: Any, vanilla: Path, album: Path, tmp_path: Path
) -> None:
    output = tmp_path / "converted"
    command = ("convert", vanilla, "--calibration", album, "-o", output, "--judge", 1)
    done = himix(*command)
    assert done.code == 0
    assert done.err == ""  # no bars where there is no terminal
    report = json.loads((output / "conversion.json").read_text())
    judged = report["judgements"]["fitted"]
    assert f"{output}: tiny as HiMix, fitted on 35 pictures." in done.out
    assert f"In 5 held out: {judged['agreement']:.1%} of next tokens agree" in done.out
    assert f"{judged['same']} of 3 answers are the same" in done.out
    assert str(output / PAGE) in done.out
    assert f"himix-edge export --checkpoint {output}" in done.out
    assert read_checkpoint(output).config.vision_key_rotation == "slots"

    linear = json.loads(himix(*command, "--linear", "--join=-2", "--json").out)
    assert linear["checkpoint"] == str(output)
    assert linear["options"]["connector"] is False
    assert linear["config"]["vision"]["joined_layers"] == [-2]
    assert linear["config"]["projection"]["connector_size"] is None


def test_export_from_a_vanilla_model(
    himix: Any, vanilla: Path, album: Path, tmp_path: Path
) -> None:
    """Both in one go: a checkpoint beside the bundle."""
    bundle = tmp_path / "bundle"
    command = ("export", "--from", vanilla, "--calibration", album, "-o", bundle)
    done = himix(*command, "--dialect", "portable", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["bundle"] == str(bundle)  # stdout is JSON and nothing else
    assert "next tokens agree" in done.err
    checkpoint = read_checkpoint(tmp_path / "bundle-checkpoint")
    assert Manifest.read(bundle).config == checkpoint.config
    assert Manifest.read(bundle).name == "tiny-himix"


def test_what_convert_refuses(himix: Any, vanilla: Path, album: Path, tmp_path: Path) -> None:
    def refused(saying: str, *arguments: object) -> None:
        done = himix(*arguments)
        assert done.code == 1
        assert done.out == ""
        assert done.err.startswith("Error: ")
        assert done.err.count("\n") == 1
        assert saying in done.err

    end = ("--calibration", album, "-o", tmp_path / "new")
    refused("join is invalid", "convert", vanilla, *end, "--join", "two")
    refused("joined_layers are off", "convert", vanilla, *end, "--join=-1")
    refused("neighbourhood can't be 2", "convert", vanilla, *end, "--neighbourhood", 2)
    refused("did you mean 'attention'", "convert", vanilla, *end, "--weighting", "attentive")
    refused("did you mean 'float16'", "convert", vanilla, *end, "--dtype", "float61")
    refused("can't compute on 'cuda:9'", "convert", vanilla, *end, "--device", "cuda:9")
    refused("a folder, or a hub id", "convert", tmp_path / "gone", *end)
    refused("--from needs two folders", "export", "--from", vanilla, "-o", tmp_path / "new")
    himix_design = tmp_path / "himix"
    tiny.tiny_checkpoint(himix_design, tiny.tiny_config())
    refused("a checkpoint of the design 'vanilla'", "convert", himix_design, *end)
    misuse = himix("export", "--from", vanilla, "--checkpoint", vanilla, *end)
    assert misuse.code == 2
    assert "--checkpoint means nothing beside --from" in misuse.err
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / f"new{STATE}").exists()


def test_ctrl_c_leaves_a_state_to_go_on_from_and_nothing_else(
    vanilla: Path, album: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "converted"
    arguments = ["convert", vanilla, "--calibration", album, "-o", output, "--distil", 100_000]
    process = subprocess.Popen(
        [sys.executable, "-m", "himix_edge", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    state = output.with_name(f"converted{STATE}") / "fit.safetensors"
    deadline = time.monotonic() + 200
    while not state.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert {path.name for path in output.parent.iterdir()} == {f"converted{STATE}"}
    assert "Traceback" not in said
