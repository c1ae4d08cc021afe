"""Whose folders are replaced, who waits for whom, and what goes on after a cut file."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from himix_edge import bundles, files
from himix_edge.claims import SCRATCH, scratch_folder
from himix_edge.errors import OutputError, TrainingError
from himix_edge.export.bundle import BUNDLE
from himix_edge.files import refuse_foreign_folder, whole_file, whole_folder
from himix_edge.training.log import LOG, LogLine, TrainingLog, read_log
from himix_edge.training.state import load_state, save_state
from tests.reliability.table import tried

WRITER = """
import sys
from pathlib import Path
from himix_edge.console import run_command
from himix_edge.files import whole_folder

def write():
    with whole_folder(Path(sys.argv[1]), keep="engines") as folder:
        print("writing", flush=True)
        sys.stdin.read()
        (folder / "who").write_text(sys.argv[2])
    return 0

sys.exit(run_command(write))
"""


def writer(place: Path, who: str, **more: str) -> subprocess.Popen[str]:
    """Another process, which writes until its stdin ends."""
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(place), who],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1]), **more},
    )


def begun(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    assert process.stdout
    assert process.stdout.readline() == "writing\n"
    return process


def sealed_bundle(folder: Path, version: int = 4, **more: str) -> Path:
    """A folder with a right manifest, as far as replacing looks at it."""
    folder.mkdir()
    names = ("vision.onnx", "decoder.onnx")
    body = {"schema_version": version, "files": {name: {} for name in names}}
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**body, "seal": seal}))
    for name, text in {**dict.fromkeys(names, "old"), **more}.items():
        (folder / name).write_text(text)
    (folder / "engines").mkdir()
    return folder


@tried("Interruptions", "two exports into one folder", "the second waits, and says so")
def test_two_writers(tmp_path: Path) -> None:
    first = begun(writer(tmp_path / "out", "first"))
    second = writer(tmp_path / "out", "second")
    assert second.stderr
    notice = second.stderr.readline()
    assert notice == f"Waiting for another himix-edge that writes {tmp_path / 'out'}\n"
    assert not (tmp_path / "out").exists()
    assert first.communicate("")[1] == ""
    begun(second).communicate("")
    assert (first.returncode, second.returncode) == (0, 0)
    assert (tmp_path / "out" / "who").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@tried(
    "Interruptions",
    "a writer that is killed while another one waits",
    "the other goes on, and clears what the first has left",
)
def test_a_killed_writer_lets_the_next_one_in(tmp_path: Path) -> None:
    first = begun(writer(tmp_path / "out", "first"))
    second = writer(tmp_path / "out", "second")
    assert second.stderr
    assert second.stderr.readline().startswith("Waiting")
    first.kill()
    first.communicate()
    begun(second).communicate("")
    assert (tmp_path / "out" / "who").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@tried("Interruptions", "SIGTERM and SIGHUP, as of `docker stop`", "what was begun is cleared")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals(tmp_path: Path, number: signal.Signals) -> None:
    process = begun(writer(tmp_path / "out", "first"))
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    process.communicate()
    assert list(tmp_path.iterdir()) == []


@tried("Interruptions", "two first runs of the demo model", "it is exported once")
def test_two_first_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exports = []

    def export(bundle: Path, *_: object) -> None:
        exports.append(bundle)
        time.sleep(0.2)
        with whole_folder(bundle) as folder:
            (folder / "manifest.json").write_text("{}")

    monkeypatch.setenv("HIMIX_EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(bundles, "_export_demo", export)
    monkeypatch.setattr(bundles, "_is_whole", lambda bundle: (bundle / "manifest.json").is_file())
    runs = [threading.Thread(target=bundles.demo_bundle, args=(lambda *_: None,)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(exports) == 1
    assert list(tmp_path.iterdir()) == exports


@tried(
    "Interruptions", "temporary files of a killed run", "the next run clears them, and only them"
)
def test_scratch_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"{SCRATCH}dead.partial" / "deep").mkdir(parents=True)
    (tmp_path / f"{SCRATCH}link.partial").symlink_to(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with scratch_folder() as alive, scratch_folder() as second:
        assert alive.is_dir()
        assert second != alive
        assert not (tmp_path / f"{SCRATCH}dead.partial").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{SCRATCH}link.partial", "mine"]
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


@tried(
    "Interruptions",
    "a link, or another user's folder, under the name of what a run writes into",
    "refused, nothing is followed or removed",
)
def test_a_planted_link(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a.txt") as file:
        hidden = file.parents[1].name
        file.write_text("a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / hidden).symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match="another user's"), whole_file(tmp_path / "a.txt"):
        raise AssertionError
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"name": "my web app"}')


def broken_seal(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("decoder.onnx", "mine.onnx"))


def notes(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def a_folder_of_notes(folder: Path) -> None:
    (folder / "decoder.onnx").unlink()
    (folder / "decoder.onnx").mkdir()
    (folder / "decoder.onnx" / "notes.txt").write_text("mine")


FOREIGN = [
    (no_manifest, "it has no manifest.json with a bundle's seal"),
    (broken_seal, "it has no manifest.json with a bundle's seal"),
    (notes, "notes.txt in it is not the bundle's"),
    (a_folder_of_notes, "decoder.onnx in it is not the bundle's"),
]


foreign = pytest.mark.parametrize(
    ("spoil", "named"), FOREIGN, ids=[of[0].__name__ for of in FOREIGN]
)


def contents(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in folder.rglob("*") if path.is_file()}


@tried("Errors", "`-o` names a folder with files of someone else's", "refused, with a file's name")
@foreign
def test_foreign_folders(tmp_path: Path, spoil: Callable[[Path], None], named: str) -> None:
    place = sealed_bundle(tmp_path / "out")
    spoil(place)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=f"will not replace .*another folder: {named}"):
        refuse_foreign_folder(place, BUNDLE)
    assert contents(tmp_path) == before


@tried("Errors", "the same, put there while the export runs", "refused, and the old bundle stays")
@foreign
def test_foreign_files_that_come_late(
    tmp_path: Path, spoil: Callable[[Path], None], named: str
) -> None:
    place = sealed_bundle(tmp_path / "out")
    before = {}

    def export() -> None:
        with whole_folder(place, kind=BUNDLE) as folder:
            (folder / "new").write_text("new")
            spoil(place)
            before.update(contents(place))

    with pytest.raises(OutputError, match=named):
        export()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("version", [1, 4, 99])
def test_bundles_of_any_version_are_replaced(tmp_path: Path, version: int) -> None:
    place = sealed_bundle(tmp_path / "out", version)
    refuse_foreign_folder(place, BUNDLE)
    with whole_folder(place, kind=BUNDLE) as folder:
        (folder / "new").write_text("new")
    assert contents(tmp_path) == {str(place / "new"): "new"}


@tried("Errors", "`scene -o` or `--plot` names a file of another format", "refused, it stays")
def test_files_of_another_format(tmp_path: Path) -> None:
    place = tmp_path / "letter.txt"
    place.write_text("mine")
    with (
        pytest.raises(OutputError, match="a file of another format"),
        whole_file(place, begins=files.PNG),
    ):
        raise AssertionError
    assert place.read_text() == "mine"


def plain_state(path: Path) -> None:
    save_state(path, {"seed": 0}, {"weight": torch.arange(5.0)}, {"step": 3})


@tried("Interruptions", "a training state cut or changed at any byte", "its phase begins anew")
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_states(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.safetensors"
    plain_state(path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        byte = bytes([whole[at] ^ 1])
        path.write_bytes(whole[:at] + (b"" if damage == "cut" else byte + whole[at + 1 :]))
        weight = torch.full((5,), 7.0)
        try:
            found = load_state(path, {"seed": 0}, {"weight": weight})
        except TrainingError:  # a name in it was changed: it is no state, or another run's
            found = None
        if found is None:
            assert weight.tolist() == [7.0] * 5, at  # nothing of it was taken
        else:  # the name of the sum was changed, as of a state from before states had one
            assert damage == "changed"
            assert (found, weight.tolist()) == ({"step": 3}, [0.0, 1.0, 2.0, 3.0, 4.0])
        capsys.readouterr()
    plain_state(path)
    weight = torch.zeros(5)
    assert load_state(path, {"seed": 0}, {"weight": weight}) == {"step": 3}
    assert weight.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


LINES = [LogLine("encoder", step, 1.5, 0.25, {"count": 0.5}) for step in (25, 50, 75)]


@tried("Interruptions", "a log cut at any byte", "the run goes on after the last whole line")
def test_a_cut_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [json.dumps(vars(line)) + "\n" for line in LINES]
    whole = "".join(texts)
    for at in range(len(texts[0]), len(whole), 7):
        (tmp_path / LOG).write_text(whole[:at])
        log = TrainingLog(tmp_path)
        left = [line for i, line in enumerate(LINES) if at >= len("".join(texts[: i + 1]))]
        assert read_log(tmp_path) == left
        assert log.last["encoder"] == left[-1]
        assert (tmp_path / LOG).read_text() == "".join(texts[: len(left)])
        assert capsys.readouterr().err.count("\n") <= 1
    assert [path.name for path in tmp_path.iterdir()] == [LOG]


@tried("Interruptions", "a log with a line that can't be read", "kept under another name")
@pytest.mark.parametrize("bad", [b"\0" * 40 + b"\n", b"{}\n", b"\xff\n", b"[" * 9999 + b"\n"])
def test_a_damaged_log(tmp_path: Path, bad: bytes) -> None:
    good = (json.dumps(vars(LINES[0])) + "\n").encode()
    (tmp_path / LOG).write_bytes(good + bad + good)
    TrainingLog(tmp_path)
    assert (tmp_path / LOG).read_bytes() == good + good
    assert (tmp_path / f"{LOG}.damaged").read_bytes() == good + bad + good


@tried(
    "Errors", "`train -o` names a folder with a log.jsonl of someone else's", "refused, it stays"
)
def test_a_foreign_log(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text('{"mine": 1}\n')
    with pytest.raises(TrainingError, match="is not the log of a run that could go on"):
        TrainingLog(tmp_path)
    assert (tmp_path / LOG).read_text() == '{"mine": 1}\n'
