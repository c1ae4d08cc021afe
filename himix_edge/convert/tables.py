"""A conversion's figures as rows of text: the same in the page and in the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = tuple[str, ...]

GIB, GFLOP = 2**30, 1e9


def closeness(report: Mapping[str, Any]) -> list[Row]:
    """A column a judgement, with a head: how close to the teacher, in the pictures held out."""
    judged = {name: figures for name, figures in report["judgements"].items() if figures}
    every = list(judged.values())
    rows: list[Row] = [
        ("", *(f"as {name}" for name in judged)),
        ("likeliest next token the same", *(f"{one['agreement']:.1%}" for one in every)),
        ("KL of the next token, nats", *(f"{one['kl']:.4f}" for one in every)),
        ("KL of an answer's first token", *(f"{one['first_kl']:.4f}" for one in every)),
        ("answers the same, word for word", *(f"{o['same']} of {o['answers']}" for o in every)),
    ]
    if every[0]["labelled"]:
        for whose in ("teacher", "student"):
            right = (f"{one[f'{whose}_right']} of {one['labelled']}" for one in every)
            rows.append((f"right answers of the {whose}", *right))
    return rows


def how(report: Mapping[str, Any]) -> list[Row]:
    """Name and value of each thing that was chosen or found."""
    pictures, fit = report["pictures"], report["fit"]
    rows: list[Row] = [
        ("pictures fitted on", f"{pictures['images']:,}"),
        ("pictures held out", f"{pictures['held_out']:,}"),
        ("files passed over", f"{len(pictures['skipped']):,}"),
        ("image tokens fitted on", f"{fit['rows']:,}"),
        ("ridge penalty", f"{fit['penalty']:g} of the inputs' mean variance"),
        ("distilling steps", f"{report['distil_steps']:,}"),
    ]
    options = ((name.replace("_", " "), _shown(value)) for name, value in report["options"].items())
    return [*rows, *options]


def spent(report: Mapping[str, Any]) -> list[Row]:
    """Time by phase, and memory."""
    seconds = report["seconds"]
    rows = [(phase, duration(taken)) for phase, taken in seconds.items()]
    return [
        *rows,
        ("in all", duration(sum(seconds.values()))),
        ("peak memory", f"{report['peak_memory'] / GIB:.2f} GiB"),
    ]


def operations(report: Mapping[str, Any]) -> str:
    """What the decoder's operations went down to, as a sentence."""
    counted = report["operations"]
    before, after = counted["before"] / GFLOP, counted["after"] / GFLOP
    return (
        f"With {counted['text_tokens']} text tokens after the image's {counted['image_slots']:,} "
        f"slots, connector and decoder take {_rounded(after)} GFLOPs in place of "
        f"{_rounded(before)}: {after / before:.1%} of it."
    )


def _rounded(number: float) -> str:
    """Three digits, or a whole number where it has more."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """8.4 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _shown(value: Any) -> str:
    if value is None or value in ([], ()):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(str(one) for one in value) if isinstance(value, list) else str(value)
