"""The tables that follow from results.json. Every figure is a median over the rounds that count."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.contestants import HIMIX, IMAGE_TOKENS, MTMD

Results = dict[str, Any]


@dataclass(frozen=True)
class FirstToken:
    """From a picture's file to the first token, in seconds; each part a median of its own.

    Attributes:
        total: the median of the rounds' sums.
        form: which encoder.
    """

    name: str
    peer: str
    form: str
    preprocess: float
    vision: float
    prefill: float
    total: float


def values(group: Results, name: str, figure: str) -> list[float]:
    """One figure of a contestant, round by round, of the rounds that count."""
    samples = group["contestants"][name]["samples"]
    return [samples[number][figure] for number in group["rounds"]["used"]]


def median(group: Results, name: str, figure: str) -> float:
    """Of `values`."""
    return statistics.median(values(group, name, figure))


def named(group: Results, role: str, encoder: str | None = None) -> list[str]:
    """The contestants with a role, and of that encoder where one is given."""
    return [
        name
        for name, contestant in group["contestants"].items()
        if role in contestant["roles"] and encoder in (None, contestant["encoder"])
    ]


def fastest_encoder(group: Results, encoder: str, peer: str | None = None) -> str | None:
    """The form that takes least time: a peer's, or any peer's; None where there's none."""
    whose = {name: group["contestants"][name]["peer"] for name in named(group, "encode", encoder)}
    forms = [name for name, its in whose.items() if (its == peer if peer else its != HIMIX)]
    return min(forms, key=lambda name: median(group, name, "encode"), default=None)


def first_tokens(group: Results, encoder: str) -> list[FirstToken]:
    """HiMix's bundle with that encoder, then each peer's pair, fastest first.

    The peers get their pixels as HiMix does: its time for them is in theirs too.
    """
    contestants, tokens = group["contestants"], IMAGE_TOKENS[encoder]
    ours = [n for n in named(group, "answer", encoder) if contestants[n]["peer"] == HIMIX]
    rows = []
    preprocess = [0.0] * len(group["rounds"]["used"])
    for name in ours:
        preprocess = values(group, name, "preprocess")
        vision = values(group, name, "vision")
        prefill = values(group, name, f"prefill {tokens}")
        rows.append(_first_token(name, HIMIX, "its own", preprocess, vision, prefill))
    peers = []
    for name in named(group, "answer", ""):
        peer = contestants[name]["peer"]
        form = fastest_encoder(group, encoder, peer) or fastest_encoder(group, encoder)
        if form:
            vision = values(group, form, "encode")
            prefill = values(group, name, f"prefill {tokens}")
            label = form.removeprefix(f"{encoder}: ")
            peers.append(_first_token(name, peer, label, preprocess, vision, prefill))
    return rows + sorted(peers, key=lambda row: row.total)


def _first_token(
    name: str, peer: str, form: str, preprocess: list[float], *parts: list[float]
) -> FirstToken:
    vision, prefill = parts
    sums = [sum(round_) for round_ in zip(preprocess, vision, prefill, strict=True)]
    return FirstToken(name, peer, form, *map(statistics.median, (preprocess, *parts, sums)))


def markdown(results: Results) -> str:
    """All tables."""
    parts = ["# HiMix beside its peers\n\n" + _setting(results)]
    for group in results["classes"]:
        parts += _class(results, group)
    parts.append("## Encoders\n\n" + _encoders(results))
    parts.append("## Peak memory and cold start\n\n" + _cold(results))
    parts.append("## Not run\n\n" + _not_run(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(results: Results) -> str:
    versions = [
        f"- {environment}: " + ", ".join(f"{name} {version}" for name, version in found.items())
        for environment, found in sorted(results["versions"].items())
    ]
    return "\n".join(
        [
            f"{results['cpu']}, {results['threads']} threads, random weights at true size, "
            f"{results['text_tokens']} text tokens, medians.",
            "",
            *versions,
        ]
    )


def _class(results: Results, name: str) -> list[str]:
    group = results["classes"][name]
    rounds = group["rounds"]
    counted = f"{len(rounds['used'])} rounds count"
    if rounds["contended"]:
        counted += f", {len(rounds['contended'])} were contended"
    if rounds["warning"]:
        counted += f". {rounds['warning']}"
    rates = {
        limit: max(one[limit] for one in group["limits"]) / 1e9 for limit in group["limits"][0]
    }
    machine = (
        f"{rates['bandwidth']:.1f} GB/s, {rates['fp32']:.0f} GFLOP/s fp32, "
        f"{rates['int8']:.0f} GOP/s int8"
    )
    parts = [f"## {name}\n\n{counted}. The machine at its best: {machine}."]
    for encoder in IMAGE_TOKENS:
        rows = first_tokens(group, encoder)
        if rows:
            parts.append(_first_token_table(encoder, rows))
    parts.append(_decoders(results, group))
    return parts


def _first_token_table(encoder: str, rows: list[FirstToken]) -> str:
    tokens = IMAGE_TOKENS[encoder]
    head = ("", "encoder", "preprocess ms", "vision ms", "prefill ms", "first token ms", "x HiMix")
    ours = next((row.total for row in rows if row.peer == HIMIX), None)
    body = [
        [
            row.name,
            row.form,
            *(f"{1e3 * part:.1f}" for part in (row.preprocess, row.vision, row.prefill, row.total)),
            f"{row.total / ours:.2f}" if ours else "",
        ]
        for row in rows
    ]
    text = f"### {encoder}, N = {tokens}: picture to first token\n\n" + table(head, body)
    peers = [row for row in rows if row.peer != HIMIX]
    if ours and peers:
        parts = min(p.vision for p in peers) + min(p.prefill for p in peers) + peers[0].preprocess
        text += (
            f"\n\nThe best peer takes {peers[0].total / ours:.2f} x HiMix's time; the fastest "
            f"encoder with the fastest decoder of any peers would take {parts / ours:.2f} x."
        )
    return text


def _decoders(results: Results, group: Results) -> str:
    """Prefill by N, and tokens a second."""
    names = named(group, "answer")
    figures = {figure for name in names for figure in group["contestants"][name]["samples"][0]}
    lengths = sorted(int(f.split()[1]) for f in figures if f.startswith("prefill"))
    contexts = sorted(int(f.split()[1]) for f in figures if f.startswith("decode"))
    text = results["text_tokens"]
    head = [""] + [f"prefill ms, N = {n}" for n in lengths]
    head += [f"tokens/s after {n} + {text}" for n in contexts]
    body = []
    for name in names:
        known = group["contestants"][name]["samples"][0]
        row = [name]
        for n in lengths:
            figure = f"prefill {n}"
            row.append(f"{1e3 * median(group, name, figure):.0f}" if figure in known else "")
        for n in contexts:
            figure = f"decode {n}"
            row.append(f"{1 / median(group, name, figure):.1f}" if figure in known else "")
        body.append(row)
    return f"### Decoders, {text} text tokens after N of an image\n\n" + table(head, body)


def _encoders(results: Results) -> str:
    """Every form in every class, ms."""
    groups = results["classes"]
    names = dict.fromkeys(name for group in groups.values() for name in named(group, "encode"))
    body = []
    for name in names:
        row = [name]
        for group in groups.values():
            known = group["contestants"].get(name)
            figure = "vision" if known and known["peer"] == HIMIX else "encode"
            row.append(f"{1e3 * median(group, name, figure):.1f}" if known else "")
        cosines = [group["contestants"].get(name, {}).get("cosine") for group in groups.values()]
        row.append(next((f"{cosine:.4f}" for cosine in cosines if cosine), ""))
        body.append(row)
    head = ["", *(f"ms, in the run of {name}" for name in groups), "cosine to fp32"]
    return table(head, body)


def _cold(results: Results) -> str:
    """From a process's start, files in the page cache."""
    head = ("", "process", "load s", "start to first token s", "peak MB")
    body = []
    for group in results["cold"].values():
        for name, found in group.items():
            row = [
                statistics.median(start[figure] for start in found["starts"])
                for figure in ("load", "total", "peak_mb")
            ]
            cells = [f"{row[0]:.2f}", f"{row[1]:.2f}", f"{row[2]:.0f}"]
            body.append([name, found["process"], *cells])
    return table(head, body) if body else "Not measured."


def _not_run(results: Results) -> str:
    rows = [f"- {name}: {error}" for name, error in results["failed"].items()]
    return "\n".join([f"- {MTMD}.", *rows])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; all columns but the first stand to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
