"""Which bundle to use when none is named: the last export, or else the built-in demo model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from himix_edge import __version__
from himix_edge.contract import MANIFEST
from himix_edge.errors import DependencyError
from himix_edge.files import sha256_of, whole_file

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
    """Where himix-edge keeps what it can make again: $HIMIX_EDGE_CACHE, or ~/.cache/himix-edge."""
    if own := os.environ.get("HIMIX_EDGE_CACHE"):
        return Path(own)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "himix-edge"


def remember_export(bundle: Path) -> None:
    """Makes a bundle the one that is used when none is named."""
    with whole_file(cache_folder() / LAST_EXPORT) as file:
        file.write_text(str(bundle.resolve()), encoding="utf-8")


def last_export() -> Path | None:
    """The bundle exported last, if it is still there."""
    try:
        bundle = Path((cache_folder() / LAST_EXPORT).read_text(encoding="utf-8"))
    except OSError:
        return None
    return bundle if (bundle / MANIFEST).is_file() else None


def demo_bundle(progress: Progress) -> Path:
    """The built-in demo model's bundle, exported on first use.

    Raises:
        DependencyError: it has to be exported, and torch is not there.
        OutputError: the cache folder can't be written.
    """
    weights = sha256_of(DEMO_CHECKPOINT / "model.safetensors")
    bundle = cache_folder() / f"shapes-demo-{__version__}-{weights[:12]}"
    if not (bundle / MANIFEST).is_file():
        try:
            from himix_edge.export.bundle import export_bundle
            from himix_edge.models.checkpoints import read_checkpoint
        except ImportError as error:
            raise DependencyError(
                f"no bundle was named, and the demo model can't be exported without {error.name}",
                fix="name a bundle with --bundle, or: pip install 'himix-edge[export]'",
            ) from error
        export_bundle(read_checkpoint(DEMO_CHECKPOINT), bundle, progress=progress)
    return bundle
