"""The plots of a conversion, as SVG that stands in a page and takes on its text colour."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from himix_edge.plotting import require_plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[[Any, Mapping[str, Any]], None]  # on these axes, of this report

INCHES = (4.6, 2.9)
KEYS, VALUES = "#e07b00", "#2f8fce"  # told apart by the colour-blind, on light and on dark
INK = "#010203"  # becomes the colour of the page's text
SALT = "himix-edge"

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": SALT,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}


def plots(report: Mapping[str, Any]) -> dict[str, str]:
    """By name, one <svg> element each; the same report gives the same text.

    Args:
        report: `Conversion.to_dict`.

    Raises:
        DependencyError: matplotlib isn't installed.
    """
    require_plots()
    return {name: _svg(name, draw, report) for name, draw in DRAWN.items()}


def variance_by_layer(axes: Axes, report: Mapping[str, Any]) -> None:
    fit = report["fit"]
    for part, colour in (("keys", KEYS), ("values", VALUES)):
        held_out, trained = fit[part], fit[f"trained_{part}"]
        layers = range(len(held_out))
        axes.plot(layers, _percent(held_out), color=colour, marker=".", label=part)
        axes.plot(layers, _percent(trained), color=colour, linestyle=":", label="_")
    axes.plot([], [], color=INK, linestyle=":", label="seen by the fit")
    axes.set(xlabel="layer", ylabel="unexplained variance, %")
    axes.set_ylim(bottom=0)
    _whole_numbers(axes)
    axes.legend()


def calibration_curve(axes: Axes, report: Mapping[str, Any]) -> None:
    curve = report["fit"]["curve"]
    sizes = [point["images"] for point in curve]
    for part, colour in (("keys", KEYS), ("values", VALUES)):
        shares = _percent([mean(point[part]) for point in curve])
        axes.plot(sizes, shares, color=colour, marker="o", label=part)
    axes.set(xlabel="pictures fitted on", ylabel="unexplained variance, %")
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend()


def blame_by_layer(axes: Axes, report: Mapping[str, Any]) -> None:
    blame = report["blame"]
    for shift, part, colour in ((-0.2, "keys", KEYS), (0.2, "values", VALUES)):
        layers = [layer + shift for layer in range(len(blame[part]))]
        axes.bar(layers, blame[part], width=0.4, color=colour, label=part)
    axes.set(xlabel="layer", ylabel="KL, nats a token")
    axes.set_ylim(bottom=0)
    _whole_numbers(axes)
    axes.legend()


def agreement(axes: Axes, report: Mapping[str, Any]) -> None:
    judged = {name: figures for name, figures in report["judgements"].items() if figures}
    tokens = [100 * figures["agreement"] for figures in judged.values()]
    answers = [100 * figures["same"] / figures["answers"] for figures in judged.values()]
    for shift, shares, colour, label in (
        (-0.2, tokens, KEYS, "next tokens"),
        (0.2, answers, VALUES, "whole answers"),
    ):
        at = [place + shift for place in range(len(judged))]
        bars = axes.barh(at, shares, height=0.36, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_yticks(range(len(judged)), list(judged))
    axes.set(xlabel="the same as the teacher's, %", xlim=(0, 112), ylim=(len(judged) - 0.4, -0.6))
    axes.set_xticks(range(0, 101, 20))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=2)


DRAWN: dict[str, Draw] = {
    "variance": variance_by_layer,
    "curve": calibration_curve,
    "blame": blame_by_layer,
    "agreement": agreement,
}


def mean(figures: list[float]) -> float:
    return sum(figures) / len(figures)


def _percent(shares: list[float]) -> list[float]:
    return [100 * share for share in shares]


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _svg(name: str, draw: Draw, report: Mapping[str, Any]) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=INCHES, layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="both", color="#888888", alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.patch.set_alpha(0)
        figure.patch.set_alpha(0)
        draw(axes, report)
        file = io.StringIO()
        nobody = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nobody)
    return _inlined(name, file.getvalue())


def _inlined(name: str, svg: str) -> str:
    """Without what only a file needs, and with ids that no other plot of the page has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace(INK, "currentColor").strip()
