"""Which checkpoints were trained on this machine: `export` looks among them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from himix_edge.bundles import cache_folder, remember, remembered
from himix_edge.errors import OutputError

TRAINED = "trained"  # a folder of files, each with the path of a checkpoint


def remember_checkpoint(folder: Path) -> None:
    """Puts a checkpoint first among those that `trained_checkpoints` gives."""
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    remember(folder, f"{TRAINED}/{name}")


def trained_checkpoints() -> list[Path]:
    """The folders that are still there, newest first; none where the cache can't be read."""
    with contextlib.suppress(OutputError, OSError):
        notes = (cache_folder() / TRAINED).glob("[!.]*")
        newest = sorted(notes, key=lambda note: -note.stat().st_mtime_ns)
        folders = [remembered(note) for note in newest]
        return [folder for folder in folders if folder and os.path.isdir(folder)]  # noqa: PTH112
    return []
