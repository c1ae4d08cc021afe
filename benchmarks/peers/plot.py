"""Time to the first token against image tokens: decoders alone, and pairs with their encoders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers.contestants import HIMIX, IMAGE_TOKENS
from benchmarks.peers.report import Results, first_tokens, median, named
from himix_edge.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {  # safe for the colour-blind
    HIMIX: "#d55e00",
    "GenAI": "#0072b2",
    "OpenVINO": "#009e73",
    "llama.cpp": "#cc79a7",
    "transformers": "#999999",
}
MARKERS = "os^v"
INCHES, DPI = (11.0, 4.5), 150


def save_plots(folder: Path, results: Results, group: str) -> None:
    """peers.png and peers.svg of one class."""
    drawn = figure(results, group)
    for ending in ("png", "svg"):
        with whole_file(folder / f"peers.{ending}") as file:
            drawn.savefig(file, format=ending, dpi=DPI)


def figure(results: Results, group: str) -> Figure:
    """Decoders on the left, pairs on the right."""
    from matplotlib.figure import Figure as MatplotlibFigure

    drawn = MatplotlibFigure(figsize=INCHES, layout="constrained")
    left, right = drawn.subplots(1, 2)
    _prefills(left, results["classes"][group])
    _pairs(right, results["classes"][group])
    drawn.suptitle(
        f"{group}, {results['text_tokens']} text tokens, {results['threads']} threads, "
        f"{results['cpu']}"
    )
    return drawn


def _prefills(axes: Axes, group: Results) -> None:
    """Lines over N; HiMix's go through the bundles of one kind."""
    lines: dict[str, dict[int, float]] = {}
    for name in named(group, "answer"):
        contestant = group["contestants"][name]
        line = name
        if contestant["peer"] == HIMIX:
            line = name.replace(f"{contestant['encoder']}-", "")
        for figure in contestant["samples"][0]:
            if figure.startswith("prefill"):
                tokens = int(figure.split()[1])
                lines.setdefault(line, {})[tokens] = median(group, name, figure)
    seen: dict[str, int] = {}
    for line, points in lines.items():
        peer = next((peer for peer in COLOURS if line.startswith(peer)), HIMIX)
        marker = MARKERS[seen.setdefault(peer, 0)]
        seen[peer] += 1
        lengths = sorted(points)
        milliseconds = [1e3 * points[n] for n in lengths]
        axes.plot(lengths, milliseconds, marker=marker, color=COLOURS[peer], label=line)
    axes.set_xlabel("image tokens N")
    axes.set_ylabel("ms from embeddings to the first token (medians)")
    axes.set_title("decoder alone")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _pairs(axes: Axes, group: Results) -> None:
    """Bars: preprocess and vision, then prefill."""
    labels, at = [], 0
    for encoder, tokens in IMAGE_TOKENS.items():
        for row in first_tokens(group, encoder):
            colour, seen = COLOURS[row.peer], 1e3 * (row.preprocess + row.vision)
            axes.barh(at, seen, color=colour, alpha=0.5)
            axes.barh(at, 1e3 * row.prefill, left=seen, color=colour)
            axes.annotate(f" {1e3 * row.total:.0f}", (seen + 1e3 * row.prefill, at), va="center")
            name = row.name.replace(f"{encoder}-", "")
            labels.append((at, f"{name}, {encoder}, N = {tokens}"))
            at += 1
        at += 1
    axes.set_yticks([at for at, _ in labels], [label for _, label in labels])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("ms from the picture's file to the first token (medians)")
    axes.set_title("with the fastest encoder: pale")
