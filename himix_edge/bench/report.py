"""What was measured, beside what it could be at best: plain data, the very object of `--json`.

Milliseconds, bytes, operations, and such a second. Figures of phases are min, median and max over
the rounds that count; all rounds stand under "samples". A floor is the time of a phase if the
machine kept up the best rates that it showed in this run: of products in fp32 or in int8, and in
both cases of its memory, whichever takes longer. `over` a floor is the median as a multiple of it.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from himix_edge import __version__
from himix_edge.bench.bounds import floors
from himix_edge.bench.candidates import DECODED, Candidate, Timing
from himix_edge.bench.limits import Limits, cores
from himix_edge.bench.measure import Measurement
from himix_edge.bench.spread import Spread, best, judge
from himix_edge.bundle.quality import features_of, percent, quality_of, summary
from himix_edge.contract import Quantization
from himix_edge.runtimes.providers import import_onnxruntime

PACKAGES = ("numpy", "pillow", "tokenizers")  # onnxruntime comes in packages of several names
COLD_FIGURES = ("imports", "load", "answer", "total")


def report(measured: Measurement) -> dict[str, Any]:
    """Everything."""
    verdict, options, plan = judge(measured.limits), measured.options, measured.plan
    rounds = [measured.rounds[i] for i in verdict.used]
    top = best(measured.limits)
    candidates = {
        name: _candidate(measured, name, [r.timings[name] for r in rounds], top)
        for name in options.candidates
    }
    text_only = Spread.of(r.text_only for r in rounds)
    return {
        "bundle": _bundle(measured),
        "setting": {
            "image": str(options.image) if options.image else None,
            "image_tokens": measured.manifest.config.vision.num_image_tokens,
            "text_tokens": plan.text,
            "long_text_tokens": plan.long,
            "decoded_tokens": DECODED,
            "threads": options.threads,
            "device": options.device,
            "vs": options.vs,
        },
        "machine": {"cpu": cpu_name(), "cores": cores(), "system": platform.platform()},
        "versions": {
            "himix-edge": __version__,
            "python": platform.python_version(),
            "onnxruntime": import_onnxruntime().__version__,
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "limits": _limits(measured.limits, top),
        "rounds": {
            "measured": len(measured.rounds),
            "used": verdict.used,
            "contended": verdict.contended,
            "warning": verdict.warning,
        },
        "projection_share": measured.projection_share,
        "candidates": candidates,
        "text_only_prefill_ms": _plain(text_only),
        "ratios": _ratios(candidates, text_only),
        "samples": {
            "limits": [dataclasses.asdict(one) for one in measured.limits],
            "rounds": [dataclasses.asdict(one) for one in measured.rounds],
            "cold_starts": {
                name: [dataclasses.asdict(start) for start in starts]
                for name, starts in measured.cold.items()
            },
        },
    }


def phase_samples(
    timings: Iterable[Timing], candidate: Candidate, share: float | None
) -> dict[str, list[float]]:
    """Milliseconds of each phase, round by round.

    The time of the vision graph is divided by the projections' share, where it is known. A vanilla
    model has no projections: theirs is then taken off its time to the first token.
    """
    samples: dict[str, list[float]] = {}
    for timing in timings:
        projection = timing.encode * (share or 0.0)
        phases = {"preprocess": timing.preprocess, "vision": timing.encode - projection}
        if share is not None and candidate == "himix":
            phases["projection"] = projection
        phases["prefill"] = timing.prefill
        phases["first_token"] = timing.first_token
        if candidate == "vanilla":
            phases["first_token"] -= projection
        phases |= {"first_decode": timing.first_decode, "decode_short": timing.short}
        if timing.long is not None:
            phases["decode_long"] = timing.long
        for phase, value in phases.items():
            samples.setdefault(phase, []).append(value)
    return samples


def cpu_name() -> str:
    """As the system calls it; "" where it doesn't."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        facts = ""
    for line in facts.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor()


def _bundle(measured: Measurement) -> dict[str, Any]:
    manifest, how = measured.manifest, measured.manifest.quantization
    quantization = None
    if how:
        fields = dataclasses.asdict(how)
        quantization = {name: value for name, value in fields.items() if name != "cost"}
    return {
        "folder": str(measured.bundle),
        "name": manifest.name,
        "dialect": manifest.dialect,
        "dtype": manifest.dtype,
        "quantization": quantization,
        "quality": quality_report(how),
        "sha256": {name: record.sha256 for name, record in manifest.files.items()},
    }


def quality_report(how: Quantization | None) -> dict[str, Any] | None:
    """What a bundle lost by being quantized, which stands beside each of its times; None of others.

    Returns:
        "summary", "record" as in the manifest or None, and "phases": a few words a phase.
    """
    if how is None:
        return None
    quality, features = quality_of(how), features_of(how)
    phases: dict[str, str] = {}
    if features:
        least = min(feature.token_cosine for feature in features.values())
        phases |= dict.fromkeys(("vision", "projection"), f"cosine {least:.4f}")
    for names, tokens in (
        (("prefill", "first_token"), False),
        (("first_decode", "decode_short", "decode_long"), True),
    ):
        worst = quality.worst(prompts=not tokens, tokens=tokens) if quality else None
        said = f"perplexity {percent(worst.growth)}" if worst else "not judged"
        phases |= dict.fromkeys(names, said if how.decoder or worst else "")
    record = dataclasses.asdict(quality) if quality else None
    if record:
        record["ways"] = list(record["ways"])
    return {"summary": summary(quality), "record": record, "phases": phases}


def _limits(limits: Sequence[Limits], top: Limits) -> dict[str, dict[str, float]]:
    return {
        name: {"best": at_best, **_plain(Spread.of(getattr(one, name) for one in limits))}
        for name, at_best in dataclasses.asdict(top).items()
    }


def _candidate(
    measured: Measurement, name: Candidate, timings: list[Timing], top: Limits
) -> dict[str, Any]:
    samples = phase_samples(timings, name, measured.projection_share)
    spreads = {phase: Spread.of(values) for phase, values in samples.items()}
    least, starts = floors(measured, name, top), measured.cold[name]
    phases: dict[str, dict[str, Any]] = {}
    for phase, spread in spreads.items():
        phases[phase] = _plain(spread)
        if floor := least.get(phase):
            over = {"fp32": spread.median / floor.fp32, "int8": spread.median / floor.int8}
            phases[phase] |= {"floor": dataclasses.asdict(floor), "over": over}
    peaks = [start.peak_bytes for start in starts if start.peak_bytes is not None]
    return {
        "phases_ms": phases,
        "tokens_per_second": {
            context: _plain(Spread.of(1e3 / value for value in samples[f"decode_{context}"]))
            for context in ("short", "long")
            if f"decode_{context}" in samples
        },
        "cold_start_ms": {
            figure: _plain(Spread.of(getattr(start, figure) for start in starts))
            for figure in COLD_FIGURES
        },
        "peak_bytes": max(peaks, default=None),
    }


def _ratios(candidates: dict[Candidate, dict[str, Any]], text_only: Spread) -> dict[str, float]:
    """Of medians: the prefill after an image to the same with none; vanilla's times to HiMix's."""
    himix = candidates["himix"]["phases_ms"]
    ratios = {"prefill_to_text_only": himix["prefill"]["median"] / text_only.median}
    if vanilla := candidates.get("vanilla"):
        theirs = vanilla["phases_ms"]
        ratios |= {
            f"vanilla_to_himix_{phase}": theirs[phase]["median"] / himix[phase]["median"]
            for phase in ("first_token", "prefill", "decode_short", "decode_long")
            if phase in theirs
        }
    return ratios


def _plain(spread: Spread) -> dict[str, Any]:
    return dataclasses.asdict(spread)
