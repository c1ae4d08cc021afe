"""The plot: that its curves are the formulas, and that what is written is a picture."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from himix_edge.analysis import costs, plot
from himix_edge.analysis.report import DESIGNS, pair_config
from himix_edge.errors import DependencyError, OutputError

CONFIG = pair_config("siglip-so400m-384", "llama-3.2-1b")


def test_the_curves_are_the_formulas() -> None:
    by_text, by_image = plot.figure(CONFIG, "a pair", 64, 728).axes
    assert len(by_text.lines) == len(by_image.lines) == len(DESIGNS) + 1  # and where the other is
    for design in DESIGNS:
        config = pair_config("siglip-so400m-384", "llama-3.2-1b", design)
        [line] = [line for line in by_text.lines if line.get_label() == plot.LABELS[design]]
        lengths, spent = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        assert (lengths[0], lengths[-1]) == (1, 1000)
        for text, giga in zip(lengths, spent, strict=True):
            cost = costs.cost(config, int(text), 728)
            assert giga == (cost.connectors + cost.decoder).total / 1e9
        [line] = [line for line in by_image.lines if line.get_label() == plot.LABELS[design]]
        numbers, spent = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        assert (numbers[0], numbers[-1]) == (1, plot.MOST_IMAGE_TOKENS)
        for images, giga in zip(numbers, spent, strict=True):
            cost = costs.cost(config, 64, int(images))
            assert giga == (cost.connectors + cost.decoder).total / 1e9


def test_it_says_what_is_drawn() -> None:
    drawn = plot.figure(CONFIG, "a pair", 64, 728)
    by_text, by_image = drawn.axes
    assert drawn.get_suptitle() == "a pair"
    assert by_text.get_xlabel() == "text tokens, with 728 image tokens"
    assert by_image.get_xlabel() == "image tokens, with 64 text tokens"
    assert "GFLOPs" in by_text.get_ylabel()
    legend = by_text.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == set(plot.LABELS.values())


def test_it_stays_within_the_positions_of_the_decoder() -> None:
    config = pair_config("siglip-so400m-384", "tinyllama-1.1b")  # 2048 positions
    by_text, by_image = plot.figure(config, "", 700, 1200).axes
    assert np.max(by_text.lines[0].get_xdata()) == 848
    assert np.max(by_image.lines[0].get_xdata()) == 1348


def test_a_png_of_the_size_it_should_have(tmp_path: Path) -> None:
    path = tmp_path / "costs.png"
    plot.save_plot(path, CONFIG, "a pair", 64, 728)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (int(plot.INCHES[0] * plot.DPI), int(plot.INCHES[1] * plot.DPI))
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    colours = {tuple(int(value) for value in pixel) for pixel in np.unique(pixels, axis=0)}
    for colour, _ in plot.STYLES.values():
        assert tuple(bytes.fromhex(colour[1:])) in colours
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        plot.save_plot(tmp_path / "file" / "costs.png", CONFIG, "", 64, 728)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match=r"pip install 'himix-edge\[plot\]'"):
        plot.save_plot(tmp_path / "costs.png", CONFIG, "", 64, 728)
    assert list(tmp_path.iterdir()) == []
