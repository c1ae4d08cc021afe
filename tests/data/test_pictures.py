from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from himix_edge.config import PreprocessConfig
from himix_edge.data.pictures import picture_files, pictures
from himix_edge.errors import ConfigError, ImageError
from himix_edge.runtimes.preprocess import load_image, pixel_values


def test_all_files_but_texts_and_what_systems_leave_there(tmp_path: Path) -> None:
    for name in ("b.png", "a", "prompts.txt", "questions.jsonl", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).touch()
    (tmp_path / "c").mkdir()
    assert [path.name for path in picture_files(tmp_path, at_least=2)] == ["a", "b.png"]
    with pytest.raises(ConfigError, match=r"too few pictures: expected 3 or more .*found 2"):
        picture_files(tmp_path, at_least=3)
    with pytest.raises(ConfigError, match="no such folder"):
        picture_files(tmp_path / "a")


def test_they_come_as_the_model_sees_them_and_a_bad_one_by_its_name(tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "teal").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    config = PreprocessConfig(28)
    found = pictures(picture_files(tmp_path), config)
    np.testing.assert_array_equal(next(found), pixel_values(load_image(tmp_path / "a.png"), config))
    with pytest.raises(ImageError, match=r"b\.png can't be read"):
        next(found)
