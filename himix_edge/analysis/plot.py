"""The cost of the designs as curves: what the paper's Figure 1 and Table 5 say in points."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from himix_edge.analysis.costs import cost
from himix_edge.config import Design, HiMixConfig
from himix_edge.files import PNG, whole_file
from himix_edge.plotting import require_plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES: dict[Design, tuple[str, str]] = {  # colour (safe for the colour-blind), line
    "vanilla": ("#222222", "-"),
    "hierarchical": ("#e69f00", "--"),
    "uniform": ("#56b4e9", "-."),
    "himix": ("#d55e00", "-"),
}
LABELS: dict[Design, str] = {
    "vanilla": "vanilla",
    "hierarchical": "hierarchical",
    "uniform": "uniform",
    "himix": "HiMix",
}
LONGEST_TEXT, MOST_IMAGE_TOKENS = 1000, 1500
POINTS = 60
DPI = 150
INCHES = (11.0, 4.6)


def save_plot(path: Path, config: HiMixConfig, title: str, text: int, images: int) -> None:
    """Draws `figure` into a PNG file.

    Raises:
        DependencyError: matplotlib isn't installed.
        OutputError: a place that can't be written.
    """
    drawn = figure(config, title, text, images)
    with whole_file(path, begins=PNG) as file:
        drawn.savefig(file, format="png", dpi=DPI)


def figure(config: HiMixConfig, title: str, text: int, images: int) -> Figure:
    """GFLOPs without the encoder's, against text tokens and against image tokens.

    Args:
        config: the pair; all four designs are drawn.
        text, images: what stays put while the other one grows.

    Raises:
        DependencyError: matplotlib isn't installed.
    """
    require_plots()
    from matplotlib.figure import Figure as MatplotlibFigure

    positions = config.decoder.max_position_embeddings
    longest = min(LONGEST_TEXT, positions - images)
    most = min(max(MOST_IMAGE_TOKENS, images), positions - text)
    drawn = MatplotlibFigure(figsize=INCHES, layout="constrained")
    drawn.suptitle(title)
    by_text, by_image = drawn.subplots(1, 2, sharey=True)
    _draw(by_text, config, [(m, images) for m in _steps(longest)], 0)
    _draw(by_image, config, [(text, n) for n in _steps(most)], 1)
    by_text.set(
        xlabel=f"text tokens, with {images} image tokens", ylabel="GFLOPs of connectors and decoder"
    )
    by_image.set(xlabel=f"image tokens, with {text} text tokens")
    by_text.axvline(text, color="#bbbbbb", linewidth=1, zorder=0)
    by_image.axvline(images, color="#bbbbbb", linewidth=1, zorder=0)
    by_text.legend(frameon=False)
    return drawn


def _draw(axes: Axes, config: HiMixConfig, tokens: list[tuple[int, int]], along: int) -> None:
    """A curve a design over (text tokens, image tokens), of which `along` is the one that grows."""
    for design, (colour, line) in STYLES.items():
        chosen = dataclasses.replace(config, design=design)
        spent = [cost(chosen, text, images) for text, images in tokens]
        axes.plot(
            [pair[along] for pair in tokens],
            [(step.connectors + step.decoder).total / 1e9 for step in spent],
            color=colour,
            linestyle=line,
            label=LABELS[design],
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(which="both", color="#eeeeee")
    axes.set_axisbelow(True)


def _steps(last: int) -> list[int]:
    """About POINTS whole numbers from 1 to `last`."""
    step = max(1, last // POINTS)
    return sorted({1, *range(step, last + 1, step), last})
