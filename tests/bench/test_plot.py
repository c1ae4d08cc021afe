"""The plot: that its bars are the medians, its ticks the floors, and its file a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from himix_edge.bench import plot
from himix_edge.bench.measure import Measurement
from himix_edge.bench.report import report
from himix_edge.errors import ConfigError, DependencyError, OutputError


@pytest.fixture
def data(measured: Measurement) -> dict[str, Any]:
    return report(measured)


def test_bars_and_ticks(data: dict[str, Any]) -> None:
    [axes] = plot.figure(data).axes
    bars = [(bar.get_y() + 0.3, bar.get_x(), bar.get_width()) for bar in axes.patches]  # type: ignore[attr-defined]
    himix, vanilla = [(0, 4), (4, 16), (20, 4), (24, 16)], [(0, 4), (4, 16), (20, 76)]
    expected = [(0, *bar) for bar in himix] + [(1, *bar) for bar in vanilla]
    assert [tuple(round(v, 9) for v in bar) for bar in bars] == expected
    ticks = [float(line.get_xdata()[0]) for line in axes.lines]  # type: ignore[index,arg-type]
    floors = [
        data["candidates"][c]["phases_ms"]["first_token"]["floor"] for c in ("himix", "vanilla")
    ]
    assert ticks == [floor[kind] for floor in floors for kind in ("fp32", "int8")]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["HiMix", "Vanilla"]
    assert axes.get_title() == "tiny: 4 image and 64 text tokens"
    legend = axes.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 6


def test_png_and_svg(data: dict[str, Any], tmp_path: Path) -> None:
    plot.save_plot(tmp_path / "a.png", data)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == tuple(int(inches * plot.DPI) for inches in plot.INCHES)
    plot.save_plot(tmp_path / "a.svg", data)
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]


@pytest.mark.parametrize(
    ("name", "fix"), [("a.pgn", "did you mean '.png'"), ("a", r"use one of: \.png, \.svg")]
)
def test_another_ending(name: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        plot.check_format(Path(name))


def test_without_matplotlib_or_a_place(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        plot.save_plot(tmp_path / "file" / "a.png", data)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match=r"pip install 'himix-edge\[plot\]'"):
        plot.save_plot(tmp_path / "a.png", data)
