"""Which bundle to use when none is named: the last export, or else the built-in demo model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from himix_edge import __version__
from himix_edge.bundle.files import BundleFiles
from himix_edge.contract import MANIFEST
from himix_edge.errors import BundleError, DependencyError, ExportError, OutputError
from himix_edge.files import sha256_of, sole_writer, whole_file, whole_folder
from himix_edge.remedies import output_errors

DEMO_CHECKPOINT = Path(__file__).parent / "assets" / "shapes-demo"
LAST_EXPORT = "last-export"  # a file with the folder's path


Progress = Callable[[str, float], None]  # the phase that begins, and how much of all is done, 0..1


def chosen_bundle(given: Path | None, progress: Progress) -> Path:
    """The bundle that was named, or the last export, or the demo model's.

    Raises:
        DependencyError: the demo model has to be exported, and torch is not there.
        OutputError: it has to be exported, and the cache folder can't be written.
    """
    return given or last_export() or demo_bundle(progress)


def cache_folder() -> Path:
    """Where himix-edge keeps what it can make again: $HIMIX_EDGE_CACHE, or ~/.cache/himix-edge.

    Raises:
        OutputError: the user has no home folder, and no variable names another place.
    """
    if own := os.environ.get("HIMIX_EDGE_CACHE"):
        return Path(own)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "himix-edge"
    try:
        return Path.home() / ".cache" / "himix-edge"
    except RuntimeError as error:
        raise OutputError(
            "no place for a cache",
            expected="a home folder",
            found=str(error),
            fix="set HIMIX_EDGE_CACHE to a folder that can be written",
        ) from error


def remember_export(bundle: Path) -> None:
    """Makes a bundle the one that is used when none is named."""
    remember(bundle, LAST_EXPORT)


def remember(folder: Path, note: str) -> None:
    """Notes a folder's path in the cache folder; where that can't be, a warning is all.

    Args:
        note: the file's name, below the cache folder.
    """
    try:
        with whole_file(cache_folder() / note) as file:
            file.write_bytes(os.fsencode(folder.resolve()))
    except OutputError as error:
        print(f"Warning: {folder} is not remembered for later commands: {error}", file=sys.stderr)


def remembered(note: Path) -> Path | None:
    """The path in a note of `remember`; None where there is none that can be read."""
    try:
        return Path(os.fsdecode(note.read_bytes()))
    except OSError:
        return None


def last_export() -> Path | None:
    """The bundle exported last, if it is still there."""
    try:
        bundle = remembered(cache_folder() / LAST_EXPORT)
        return bundle if bundle and (bundle / MANIFEST).is_file() else None
    except (OutputError, OSError):
        return None


def demo_bundle(progress: Progress) -> Path:
    """The built-in demo model's bundle, exported on first use.

    Raises:
        DependencyError: it has to be exported, and torch is not there.
        OutputError: the cache folder can't be written.
    """
    weights = sha256_of(DEMO_CHECKPOINT / "model.safetensors")
    try:
        bundle = cache_folder() / f"shapes-demo-{__version__}-{weights[:12]}"
        with output_errors(bundle):
            if not _is_whole(bundle):
                with sole_writer(bundle):  # of two first runs, the second waits for the first's
                    if not _is_whole(bundle):
                        _export_demo(bundle, progress)
    except OutputError as error:
        raise OutputError(
            f"no bundle was named, and the demo model's can't be kept: {error.failed}",
            expected=error.expected,
            found=error.found,
            fix="name a bundle with --bundle, or set HIMIX_EDGE_CACHE to a folder that can be "
            "written",
        ) from error
    return bundle


def _is_whole(bundle: Path) -> bool:
    try:
        with BundleFiles.open(bundle) as files:
            files.check()
    except BundleError:
        return False
    return True


def _export_demo(bundle: Path, progress: Progress) -> None:
    """Exports the demo model in a process of its own: torch and its memory are gone with it."""
    if os.path.isdir(bundle):  # noqa: PTH112 (damaged; all of the cache can be made again)
        shutil.rmtree(bundle)
    package = str(Path(__file__).parents[1])
    paths = filter(None, (package, os.environ.get("PYTHONPATH")))
    with whole_folder(bundle, last=MANIFEST) as folder:
        child = subprocess.Popen(
            [sys.executable, "-m", "himix_edge.export_demo", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            text=True,
        )
        with child:
            ended = _follow(child, progress)
        if child.returncode:
            raise _failed(ended)


def _follow(child: subprocess.Popen[str], progress: Progress) -> dict[str, str | None]:
    """Reports what the child reports, line by line; returns how it says that it failed."""
    ended: dict[str, str | None] = {"failed": "it ended without a word"}
    assert child.stdout is not None  # noqa: S101 (it is a pipe)
    for line in child.stdout:
        said = json.loads(line)
        if "phase" in said:
            progress(said["phase"], said["share"])
        else:
            ended = said
    return ended


def _failed(ended: dict[str, str | None]) -> DependencyError | ExportError:
    if missing := ended.get("missing"):
        return DependencyError(
            f"no bundle was named, and the demo model can't be exported without {missing}",
            fix="name a bundle with --bundle, or: pip install 'himix-edge[export]'",
        )
    return ExportError(
        f"no bundle was named, and the demo model can't be exported: {ended['failed']}",
        expected=ended.get("expected"),
        found=ended.get("found"),
        fix=ended.get("fix") or "name a bundle with --bundle",
    )
