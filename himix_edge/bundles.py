"""Which bundle to use when none is named: the last export, or else the built-in demo model."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from himix_edge import __version__
from himix_edge.bundle.files import BundleFiles
from himix_edge.contract import MANIFEST
from himix_edge.errors import BundleError, DependencyError, OutputError
from himix_edge.files import sha256_of, sole_writer, whole_file
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
    try:
        from himix_edge.export.bundle import export_bundle
        from himix_edge.models.checkpoints import read_checkpoint
    except ImportError as error:
        raise DependencyError(
            f"no bundle was named, and the demo model can't be exported without {error.name}",
            fix="name a bundle with --bundle, or: pip install 'himix-edge[export]'",
        ) from error
    if os.path.isdir(bundle):  # noqa: PTH112 (damaged; all of the cache can be made again)
        shutil.rmtree(bundle)
    export_bundle(read_checkpoint(DEMO_CHECKPOINT), bundle, progress=progress)
