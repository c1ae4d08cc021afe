"""Which checkpoints were trained on this machine: `export` looks among them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from himix_edge.bundles import cache_folder
from himix_edge.files import whole_file

TRAINED = "trained"  # a folder of files, each with the path of a checkpoint


def remember_checkpoint(folder: Path) -> None:
    """Puts a checkpoint first among those that `trained_checkpoints` gives."""
    path = str(folder.resolve())
    name = hashlib.sha256(path.encode()).hexdigest()[:16]
    with whole_file(cache_folder() / TRAINED / name) as file:
        file.write_text(path, encoding="utf-8")


def trained_checkpoints() -> list[Path]:
    """The folders that are still there, newest first."""
    notes = sorted((cache_folder() / TRAINED).glob("*"), key=lambda note: -note.stat().st_mtime_ns)
    folders = [Path(note.read_text(encoding="utf-8")) for note in notes if note.is_file()]
    return [folder for folder in folders if folder.is_dir()]
