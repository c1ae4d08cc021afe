from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from himix_edge.config import PreprocessConfig
from himix_edge.convert.images import Calibration
from himix_edge.errors import ConfigError
from himix_edge.runtimes.preprocess import load_image, pixel_values

CONFIG = PreprocessConfig(28)


def write_pictures(folder: Path, count: int, size: int = 28) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        levels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{i:03d}.png")
    return folder


def names(calibration: Calibration, held_out: bool, start: int = 0) -> list[str]:
    return [path.stem for path, _ in calibration.pictures(held_out, start)]


def test_every_eighth_is_held_out(tmp_path: Path) -> None:
    calibration = Calibration(write_pictures(tmp_path, 17), CONFIG)
    assert names(calibration, held_out=True) == ["007", "015"]
    fitted = names(calibration, held_out=False)
    assert len(fitted) == 15
    assert not {"007", "015"} & set(fitted)
    assert names(calibration, held_out=False, start=13) == ["014", "016"]
    assert calibration.skipped == {}


def test_of_fewer_than_eight_the_last_is_held_out(tmp_path: Path) -> None:
    calibration = Calibration(write_pictures(tmp_path, 3), CONFIG)
    assert names(calibration, held_out=True) == ["002"]
    assert names(calibration, held_out=False) == ["000", "001"]


def test_pictures_come_as_the_model_sees_them(tmp_path: Path) -> None:
    calibration = Calibration(write_pictures(tmp_path, 2), CONFIG)
    [(path, pixels)] = calibration.pictures(held_out=True)
    assert pixels.shape == (1, 3, 28, 28)
    assert np.array_equal(pixels, pixel_values(load_image(path), CONFIG))


def test_texts_are_no_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    (tmp_path / "prompts.txt").write_text("What is it?\n")
    (tmp_path / "questions.jsonl").write_text("{}\n")
    calibration = Calibration(tmp_path, CONFIG)
    assert [path.name for path in calibration.files] == ["000.png", "001.png"]


def test_what_cannot_be_read_is_passed_over_and_named(tmp_path: Path) -> None:
    write_pictures(tmp_path, 9)
    (tmp_path / "000.png").write_bytes((tmp_path / "000.png").read_bytes()[:200])
    (tmp_path / "003.png").write_text("no picture")
    calibration = Calibration(tmp_path, CONFIG)
    assert names(calibration, held_out=False) == ["001", "002", "004", "005", "006", "008"]
    assert names(calibration, held_out=True) == ["007"]  # the others keep their parts
    assert list(calibration.skipped) == ["000.png", "003.png"]
    assert "get a whole copy" in calibration.skipped["000.png"]
    assert "something else" in calibration.skipped["003.png"]

    later = Calibration(tmp_path, CONFIG)
    later.recall(calibration.skipped)
    assert names(later, held_out=False, start=5) == ["005", "006", "008"]
    assert later.skipped == calibration.skipped


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    for name in ("a.png", "b.txt"):
        (tmp_path / name).write_text("no picture")
    with pytest.raises(ConfigError, match=r"no picture in .* can be read.*found 2 other files"):
        Calibration(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match="no such folder"):
        Calibration(tmp_path / "nowhere", CONFIG)


def test_one_picture_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected 2 or more .*found 1"):
        Calibration(write_pictures(tmp_path, 1), CONFIG)
