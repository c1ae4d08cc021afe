"""The pictures a conversion looks at: most to fit on, every eighth to judge by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from himix_edge.config import PreprocessConfig
from himix_edge.data.pictures import picture_files, pictures
from himix_edge.errors import ConfigError, ImageError
from himix_edge.runtimes.preprocess import FORMATS

HELD_OUT_EVERY = 8


class Calibration:
    """A folder of pictures, in two parts that share none, by name.

    A file that can't be read is passed over, and counts for the part it would have been in.

    Attributes:
        files: all, by name.
    """

    def __init__(self, folder: Path, preprocess: PreprocessConfig) -> None:
        """Reads as many files as it takes to find a picture.

        Raises:
            ConfigError: no such folder, fewer than two files, or none that can be read.
        """
        self.folder = folder
        self.files = tuple(picture_files(folder, at_least=2))
        self._preprocess = preprocess
        self._skipped: dict[str, str] = {}
        if not any(self._read(path) is not None for path in self.files):
            raise ConfigError(
                f"no picture in {folder} can be read",
                expected=f"two or more ({', '.join(FORMATS)})",
                found=f"{len(self.files)} other files, the first of them: "
                f"{self._skipped[self.files[0].name]}",
            )

    @property
    def skipped(self) -> dict[str, str]:
        """The files passed over so far, by name, each with the reason."""
        return dict(sorted(self._skipped.items()))

    def recall(self, skipped: Mapping[str, str]) -> None:
        """Adds what an earlier run passed over, before it came to where this one begins."""
        self._skipped.update(skipped)

    def part(self, held_out: bool) -> tuple[Path, ...]:
        """The files of a part: every eighth is held out, and of fewer than eight the last."""
        if len(self.files) < HELD_OUT_EVERY:
            return self.files[-1:] if held_out else self.files[:-1]
        last = HELD_OUT_EVERY - 1
        return tuple(
            path for i, path in enumerate(self.files) if (i % HELD_OUT_EVERY == last) == held_out
        )

    def pictures(
        self, held_out: bool, start: int = 0
    ) -> Iterator[tuple[Path, NDArray[np.float32]]]:
        """A part's pictures as `pixel_values` [1, 3, H, W], one at a time.

        Args:
            start: how many files of the part to leave out, from the first on.
        """
        for path in self.part(held_out)[start:]:
            if (pixels := self._read(path)) is not None:
                yield path, pixels

    def _read(self, path: Path) -> NDArray[np.float32] | None:
        try:
            [pixels] = pictures([path], self._preprocess)
        except ImageError as error:
            self._skipped[path.name] = str(error)
            return None
        return pixels
