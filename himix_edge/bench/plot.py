"""The time to the first token as stacked bars, with the floors of each as ticks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from himix_edge.bench.show import LABELS, NAMES
from himix_edge.errors import ConfigError, closest
from himix_edge.files import PNG, refuse_unwritable_file, whole_file
from himix_edge.plotting import require_plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = {".png": "png", ".svg": "svg"}
BEGINS = {".png": PNG, ".svg": b"<?xml"}
COLOURS = {  # safe for the colour-blind
    "preprocess": "#999999",
    "vision": "#56b4e9",
    "projection": "#e69f00",
    "prefill": "#d55e00",
}
FLOORS = {"fp32": ("#000000", "floor in fp32"), "int8": ("#009e73", "floor in int8")}
INCHES, DPI = (9.0, 4.0), 150


def check_format(path: Path) -> None:
    """Before anything is measured.

    Raises:
        ConfigError: neither a .png nor an .svg file.
        OutputError: a place that can't be written.
    """
    refuse_unwritable_file(path, begins=BEGINS.get(path.suffix))
    if path.suffix not in FORMATS:
        raise ConfigError(
            f"can't draw into {path}",
            expected=" or ".join(FORMATS),
            found=path.suffix or "no ending",
            fix=closest(path.suffix, FORMATS),
        )


def save_plot(path: Path, report: dict[str, Any]) -> None:
    """Draws `figure` into a .png or .svg file.

    Raises:
        ConfigError: a file of another kind.
        DependencyError: matplotlib isn't installed.
        OutputError: a place that can't be written.
    """
    check_format(path)
    drawn = figure(report)
    with whole_file(path, begins=BEGINS[path.suffix]) as file:
        drawn.savefig(file, format=FORMATS[path.suffix], dpi=DPI)


def figure(report: dict[str, Any]) -> Figure:
    """A bar a candidate, of the medians of its phases.

    Raises:
        DependencyError: matplotlib isn't installed.
    """
    require_plots()
    from matplotlib.figure import Figure as MatplotlibFigure

    drawn = MatplotlibFigure(figsize=INCHES, layout="constrained")
    axes = drawn.subplots()
    candidates = report["candidates"]
    for at, name in enumerate(candidates):
        phases, left = candidates[name]["phases_ms"], 0.0
        for phase, colour in COLOURS.items():
            if phase not in phases:
                continue
            width = phases[phase]["median"]
            label = LABELS[phase] if at == 0 else None
            axes.barh(at, width, left=left, color=colour, height=0.6, label=label)
            left += width
        for kind, (colour, label) in FLOORS.items():
            least = phases["first_token"]["floor"][kind]
            ticks = axes.plot([least, least], [at - 0.38, at + 0.38], color=colour, linewidth=2)
            ticks[0].set_label(label if at == 0 else "_")
    axes.set_yticks(range(len(candidates)), [NAMES[name] for name in candidates])
    axes.invert_yaxis()
    axes.set_xlabel("ms from the picture's file to the first token (medians)")
    setting = report["setting"]
    axes.set_title(
        f"{report['bundle']['name']}: {setting['image_tokens']} image "
        f"and {setting['text_tokens']} text tokens"
    )
    axes.legend(frameon=False, loc="best")
    return drawn
