"""A user's folder of pictures, to calibrate and to measure with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from himix_edge.config import PreprocessConfig
from himix_edge.errors import ConfigError
from himix_edge.runtimes.preprocess import FORMATS, prepare

PROMPTS = "prompts.txt"  # what else such a folder may hold: a prompt a line,
QUESTIONS = "questions.jsonl"  # and prompts about single pictures; see `questions.py`

LEFT_BEHIND = {"thumbs.db", "desktop.ini"}  # in folders, by Windows


def picture_files(folder: Path, at_least: int = 1) -> list[Path]:
    """A folder's pictures, by name: all files but PROMPTS, QUESTIONS and what systems leave there.

    Raises:
        ConfigError: fewer than `at_least`, or a folder that can't be read.
    """
    try:
        found = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise ConfigError(f"{folder} can't be read", found=error.strerror or str(error)) from error
    files = [path for path in found if path.is_file() and not _is_other(path.name)]
    if len(files) < at_least:
        raise ConfigError(
            f"{folder} has too few pictures",
            expected=f"{at_least} or more ({', '.join(FORMATS)})",
            found=str(len(files)) if folder.is_dir() else "no such folder",
        )
    return files


def _is_other(name: str) -> bool:
    return name in (PROMPTS, QUESTIONS) or name.startswith(".") or name.lower() in LEFT_BEHIND


def pictures(files: list[Path], config: PreprocessConfig) -> Iterator[NDArray[np.float32]]:
    """As `pixel_values` [1, 3, H, W], one at a time.

    Raises:
        ImageError: a file that is no picture.
    """
    return (prepare(path, config).pixels for path in files)
