"""What is remembered of an export, and what happens where nothing can be kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from himix_edge import bundles, cli
from himix_edge.errors import DependencyError, ExportError, HimixError, OutputError
from himix_edge.trained import remember_checkpoint, trained_checkpoints


def no_home(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)


def a_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "file").write_text("mine")
    monkeypatch.setenv("HIMIX_EDGE_CACHE", str(folder / "file"))


def below_a_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "file").write_text("mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file" / "cache"))


def no_disk(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setenv("HIMIX_EDGE_CACHE", "/proc/himix-edge")


@pytest.fixture(params=[no_home, a_file, below_a_file, no_disk])
def nowhere(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[None]:
    """A cache folder that can't be written, in one way or another."""
    for name in ("HIMIX_EDGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    spoil: Callable[[pytest.MonkeyPatch, Path], None] = request.param
    spoil(monkeypatch, tmp_path)
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("nowhere")
def test_what_cannot_be_remembered_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for remember in (bundles.remember_export, remember_checkpoint):
        remember(tmp_path)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"Warning: {tmp_path} is not remembered for later commands: ")
        assert err.count("\n") == 1
    assert bundles.last_export() is None
    assert trained_checkpoints() == []


@pytest.mark.usefixtures("nowhere")
def test_a_demo_that_cannot_be_kept_is_refused_before_its_export() -> None:
    said: list[str] = []
    with pytest.raises(OutputError) as error:
        bundles.chosen_bundle(None, lambda phase, _: said.append(phase))
    assert "no bundle was named" in str(error.value)
    assert error.value.fix
    assert "--bundle" in error.value.fix
    assert "HIMIX_EDGE_CACHE" in error.value.fix
    assert said == []


def test_an_export_ends_well_all_the_same(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a_file(monkeypatch, tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", "--checkpoint", str(tiny_folder), "-o", str(tmp_path / "b")])
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'b'}: ")
    assert "Warning: " in err
    assert (tmp_path / "b" / "manifest.json").is_file()


@pytest.mark.parametrize("name", ["plain", "caf\u00e9", "\udcff", "two\nlines"])
def test_every_path_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HIMIX_EDGE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / name
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    bundles.remember_export(folder)
    remember_checkpoint(folder)
    assert bundles.last_export() == folder
    assert trained_checkpoints() == [folder]


@pytest.mark.parametrize("note", [b"", b"\xff\xfe", b"a\0b", b"x" * 5000])
def test_a_note_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: bytes) -> None:
    monkeypatch.setenv("HIMIX_EDGE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / bundles.LAST_EXPORT).write_bytes(note)
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "0").write_bytes(note)
    assert bundles.last_export() is None
    assert [folder for folder in trained_checkpoints() if folder != Path()] == []


def himix(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "himix_edge", *map(os.fsencode, arguments)],
        capture_output=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "arguments",
    [("info", "\udcff"), ("run", "\udcff.png", "\udcff", "--bundle", "\udcff"), ("doctor",)],
)
def test_names_that_are_no_text(arguments: tuple[str, ...]) -> None:
    """Undecodable bytes in arguments, and a stdout that can say nothing but ASCII."""
    done = himix(*arguments, PYTHONIOENCODING="ascii")
    assert done.returncode in (0, 1)
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") <= 1


@pytest.mark.slow
def test_a_bundle_whose_name_is_no_text(tiny_bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "\udcff"
    place.symlink_to(tiny_bundle)
    from PIL import Image

    Image.new("RGB", (9, 9)).save(place.parent / "a.png")
    for arguments in (
        ("info", place),
        ("info", place, "--json"),
        ("run", tmp_path / "a.png", "describe", "--bundle", place, "--max-tokens", "2"),
        ("bench", place, "--rounds", "1"),
        ("build", place, "--dry-run"),
        ("quantize", place, "-o", tmp_path / "\udcfe", "--decoder", "int8", "--scenes", "1"),
        ("scene", "-o", tmp_path / "\udcfd.png"),
    ):
        done = himix(*arguments, PYTHONIOENCODING="ascii", HIMIX_EDGE_CACHE=str(tmp_path / "c"))
        assert done.returncode in (0, 1), done.stderr
        assert b"Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("torch", "kind", "message"),
    [
        ("raise ModuleNotFoundError('no', name='torch')", DependencyError, r"without torch\."),
        ("raise MemoryError", ExportError, "can't be exported: not enough memory"),
        ("import os; os._exit(9)", ExportError, "it ended without a word"),
    ],
)
def test_a_first_run_that_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    torch: str,
    kind: type[HimixError],
    message: str,
) -> None:
    """The demo model is exported in another process, which says why it can't be."""
    (tmp_path / "torch.py").write_text(torch)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HIMIX_EDGE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(kind, match=message):
        bundles.demo_bundle(lambda *_: None)
    assert list((tmp_path / "cache").glob("*")) == []
