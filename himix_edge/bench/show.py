"""The report as text: tables that need no package to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LABELS = {
    "preprocess": "preprocess (file to pixels)",
    "vision": "vision encoder",
    "projection": "projections to keys and values",
    "prefill": "prefill",
    "first_token": "time to first token",
    "first_decode": "second token",
    "decode_short": "a later token, short context",
    "decode_long": "a later token, long context",
}
NAMES = {"himix": "HiMix", "vanilla": "Vanilla"}
COLD = {
    "imports": "Python and its modules",
    "load": "load, every file's sha256 checked",
    "answer": "picture to first token",
    "total": "start to first token",
}


def text(report: dict[str, Any]) -> str:
    """All of it: what was measured, the tables, what follows from them."""
    tables = [_phases(report, name) for name in report["candidates"]]
    return "\n\n".join([heading(report), *tables, _cold_starts(report), "\n".join(remarks(report))])


def heading(report: dict[str, Any]) -> str:
    """What was measured, where."""
    bundle, setting, machine = report["bundle"], report["setting"], report["machine"]
    how, quality = bundle["quantization"], bundle["quality"]
    stored = f", vision {how['vision'] or bundle['dtype']}" if how else ""
    stored += f", decoder {how['decoder'] or bundle['dtype']}" if how else ""
    threads = setting["threads"] or f"{machine['cores']} (all cores)"
    rates = {name: limit["best"] / 1e9 for name, limit in report["limits"].items()}
    return "\n".join(
        [
            f"{bundle['name']}: {bundle['dialect']}, {bundle['dtype']}{stored}",
            *([quality["summary"]] if quality else []),
            f"{setting['image_tokens']} image and {setting['text_tokens']} text tokens, "
            f"{report['rounds']['measured']} rounds, threads: {threads}",
            f"{machine['cpu']}, at best in this run: {rates['bandwidth']:.1f} GB/s read, "
            f"{rates['fp32']:.0f} GFLOP/s in fp32, {rates['int8']:.0f} GOP/s in int8",
        ]
    )


def remarks(report: dict[str, Any]) -> list[str]:
    """What follows from the tables, and what a reader must know of them."""
    ratios, rounds, setting = report["ratios"], report["rounds"], report["setting"]
    lines = [
        f"prefill of {setting['text_tokens']} tokens with no image: "
        f"{report['text_only_prefill_ms']['median']:,.1f} ms; after the image "
        f"{ratios['prefill_to_text_only']:.2f} x as long"
    ]
    for name, candidate in report["candidates"].items():
        after = {"short": setting["text_tokens"], "long": setting["long_text_tokens"]}
        rates = [
            f"{rate['median']:,.1f} after {after[context]} text tokens"
            for context, rate in candidate["tokens_per_second"].items()
        ]
        peak = candidate["peak_bytes"]
        held = f"; peak memory {peak / 1e6:,.0f} MB" if peak is not None else ""
        lines.append(f"{NAMES[name]}: tokens a second {', '.join(rates)}{held}")
    if setting["vs"]:
        lines.append(
            "vanilla takes "
            f"{ratios['vanilla_to_himix_first_token']:.2f} x HiMix's time to the first token, "
            f"{ratios['vanilla_to_himix_prefill']:.2f} x its prefill"
        )
    if report["projection_share"] is None:
        lines.append("the projections' time can't be told from the encoder's: it is in vision")
    if rounds["contended"]:
        numbers = ", ".join(str(i + 1) for i in rounds["contended"])
        said = "left out" if rounds["used"] != rounds["contended"] else "counted all the same"
        lines.append(f"rounds in which something else kept the machine busy, {said}: {numbers}")
    if rounds["warning"]:
        lines.append(f"Warning: {rounds['warning']}")
    return lines


def _phases(report: dict[str, Any], name: str) -> str:
    rows, quality = [], report["bundle"]["quality"]
    head = [*_HEAD, "quality"] if quality else [*_HEAD]
    for phase, figures in report["candidates"][name]["phases_ms"].items():
        row = [LABELS[phase], *(f"{figures[f]:,.2f}" for f in ("median", "min", "max"))]
        if floor := figures.get("floor"):
            for kind in ("fp32", "int8"):
                row += [f"{floor[kind]:,.2f}", f"{figures['over'][kind]:,.2f}"]
            bounds = floor["fp32_bound"], floor["int8_bound"]
            row.append(bounds[0] if bounds[0] == bounds[1] else " / ".join(bounds))
        row += [""] * (len(_HEAD) - len(row))
        rows.append([*row, quality["phases"].get(phase, "")] if quality else row)
    title = f"{NAMES[name]}, ms"
    if name == "vanilla":
        title += ": the same encoder, then image and text tokens through the same decoder"
    return _table(title, head, rows, end=LABELS["first_token"])


_HEAD = ("", "median", "min", "max", "fp32 floor", "x", "int8 floor", "x", "bound by")


def _cold_starts(report: dict[str, Any]) -> str:
    candidates = report["candidates"]
    rows = [
        [label, *(f"{c['cold_start_ms'][figure]['median']:,.0f}" for c in candidates.values())]
        for figure, label in COLD.items()
    ]
    head = ["", *(NAMES[name] for name in candidates)]
    return _table("A fresh process, ms (medians)", head, rows)


def _table(title: str, head: Sequence[str], rows: list[list[str]], end: str = "") -> str:
    """All columns but the first stand to the right; a line follows the row named `end`."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
        if row is head or row[0] == end:
            lines.append("-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join([title, "", *lines])
