"""The rounds: every contestant of a quantization class takes its turn in each, in shuffled order.

Between the rounds the machine's own limits are measured (himix-edge's own meter); a round beside
which one of them is below 0.7 of its best was contended and doesn't count.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.peers.contestants import (
    HERE,
    HIMIX,
    IMAGE_TOKENS,
    TEXT_TOKENS,
    Contestant,
    decoders,
    encoders,
    himix,
    pair,
)
from benchmarks.peers.crew import THREADS, PeerError, Worker, cold_start, crew
from benchmarks.peers.make import noted
from benchmarks.peers.report import fastest_encoder
from himix_edge.bench.limits import LimitMeter
from himix_edge.bench.report import cpu_name
from himix_edge.bench.spread import judge
from himix_edge.files import whole_file

PLOTTED = (0, 196, 400, 576, 729)  # image tokens of the plot
AFTER = (196, 729)  # image tokens after which decoding is timed
DECODED = 16
WARM = {"prompt": TEXT_TOKENS, "tokens": 3}
PICTURES = {"tinyclip": 3, "siglip": 1}  # in one turn, of which the median counts
COLD_STARTS = 3  # after one that brings all files into the page cache
Sample = dict[str, float]
Say = Callable[[str], None]


def measure(
    bundles: dict[str, Path],
    models: Path,
    environments: Path,
    output: Path,
    rounds: int,
    groups: list[str],
    only: list[str],
    cold: bool,
    say: Say,
) -> None:
    """Measures, and writes `output`/results.json after each class's rounds and cold starts."""
    output.mkdir(parents=True, exist_ok=True)
    picture = output / "picture.jpg"
    draw_picture(picture)
    everyone = [*himix(bundles, picture.resolve()), *decoders(models), *encoders(models)]
    if only:
        everyone = [c for c in everyone if any(part in c.name for part in only)]
    file = output / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    results |= {"cpu": cpu_name(), "threads": THREADS, "text_tokens": TEXT_TOKENS}
    results |= {"image_tokens": IMAGE_TOKENS, "decoded": DECODED}
    failed: dict[str, str] = results.setdefault("failed", {})
    failed |= noted(environments) | noted(models)
    for known in ("versions", "classes", "cold"):
        results.setdefault(known, {})
    for group in groups:
        contestants = [c for c in everyone if group in c.classes]
        for contestant in contestants:
            failed.pop(contestant.name, None)
        with crew(contestants, environments, output / "logs", failed) as workers:
            results["classes"][group] = run_rounds(
                workers, rounds, failed, results["versions"], say
            )
        write(file, results)
        if cold:
            results["cold"][group] = cold_starts(
                results["classes"][group], contestants, environments, output / "logs", failed, say
            )
        write(file, results)
    say(f"wrote {file}")


def write(file: Path, results: dict[str, Any]) -> None:
    """What there is so far."""
    with whole_file(file) as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n")


def run_rounds(
    workers: list[Worker],
    rounds: int,
    failed: dict[str, str],
    versions: dict[str, dict[str, str]],
    say: Say,
) -> dict[str, Any]:
    """All rounds of a class."""
    meter = LimitMeter(THREADS)
    samples: dict[str, list[Sample | None]] = {w.contestant.name: [] for w in workers}
    try:
        for worker in workers:  # plans, packs and allocates what it does on first use
            with worker.awake():
                known = attempt(worker, lambda w: w.ask("versions"), failed) or {}
                attempt(worker, lambda w: turn(w, warm=True), failed)
                if "encode" in worker.contestant.roles and worker.contestant.peer != HIMIX:
                    attempt(worker, lambda w: w.ask("embed", file=str(embeddings(w))), failed)
            name = worker.contestant.environment
            versions[name or HIMIX] = {p: known[p] for p in packages(name) if p in known}
        limits = [meter.measure()]
        for number in range(rounds):
            began = time.perf_counter()
            for worker in random.sample(workers, len(workers)):
                with worker.awake():
                    sample = attempt(worker, turn, failed)
                samples[worker.contestant.name].append(sample)
            limits.append(meter.measure())
            say(f"round {number + 1} of {rounds}: {time.perf_counter() - began:.0f} s")
    finally:
        meter.close()
    cosines = cosines_of([w for w in workers if w.contestant.name not in failed])
    return {
        "limits": [dataclasses.asdict(one) for one in limits],
        "rounds": dataclasses.asdict(judge(limits)),
        "contestants": {
            w.contestant.name: {
                "peer": w.contestant.peer,
                "encoder": w.contestant.encoder,
                "roles": sorted(w.contestant.roles),
                "load": w.ready,
                "cosine": cosines.get(w.contestant.name),
                "samples": samples[w.contestant.name],
            }
            for w in workers
            if w.contestant.name not in failed
        },
    }


def packages(environment: str) -> list[str]:
    """Those that its requirements name; of HiMix's, what runs a bundle."""
    if not environment:
        return ["numpy", "onnxruntime"]
    lines = (HERE / "requirements" / f"{environment}.txt").read_text().splitlines()
    return [line.partition("==")[0] for line in lines]


def embeddings(worker: Worker) -> Path:
    """Where an encoder's embeddings of its picture are kept."""
    return worker.log.with_suffix(".npy")


def cosines_of(workers: list[Worker]) -> dict[str, float]:
    """Of each form's embeddings to those of the same encoder's first form, which is fp32."""
    found: dict[str, float] = {}
    exact: dict[str, NDArray[np.float64]] = {}
    for worker in workers:
        if embeddings(worker).exists():
            rows = np.load(embeddings(worker)).astype(np.float64)[0]  # [N, h]
            rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
            first = exact.setdefault(worker.contestant.encoder, rows)
            found[worker.contestant.name] = float((rows * first).sum(-1).mean())
    return found


def attempt(
    worker: Worker, act: Callable[[Worker], dict[str, Any]], failed: dict[str, str]
) -> dict[str, Any] | None:
    """What it gives, or None of one that has failed, now or before."""
    if worker.contestant.name in failed:
        return None
    try:
        return act(worker)
    except PeerError as error:
        failed[worker.contestant.name] = str(error)
        return None


def turn(worker: Worker, warm: bool = False) -> Sample:
    """One contestant's part of a round, in seconds: "prefill 196" is N = 196 image tokens' part."""
    contestant, sample = worker.contestant, {}
    if "encode" in contestant.roles:
        runs = PICTURES[contestant.encoder]
        if runs > 1:
            worker.ask("encode", runs=1)
        for phase, seconds in worker.ask("encode", runs=runs).items():
            sample[phase] = statistics.median(seconds)
    if contestant.peer == HIMIX:
        worker.ask("answer", **WARM)
        stamps = worker.ask("answer", prompt=TEXT_TOKENS, tokens=1 + DECODED)["stamps"]
        tokens = IMAGE_TOKENS[contestant.encoder]
        sample |= prefill_and_decode(stamps, tokens)
        stamps = worker.ask("answer", prompt=TEXT_TOKENS, tokens=1, image=False)["stamps"]
        sample |= prefill_and_decode(stamps, 0)
    elif "answer" in contestant.roles:
        worker.ask("answer", **WARM)
        for tokens in AFTER[-1:] if warm else PLOTTED:
            wanted = 1 + (DECODED if tokens in AFTER else 0)
            stamps = worker.ask("answer", prompt=tokens + TEXT_TOKENS, tokens=wanted)["stamps"]
            sample |= prefill_and_decode(stamps, tokens)
    return sample


def prefill_and_decode(stamps: list[float], image_tokens: int) -> Sample:
    """Seconds to the first token, and of one of the later ones on average."""
    sample = {f"prefill {image_tokens}": stamps[0]}
    if len(stamps) > 1:
        sample[f"decode {image_tokens}"] = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
    return sample


def cold_starts(
    measured: dict[str, Any],
    contestants: list[Contestant],
    environments: Path,
    logs: Path,
    failed: dict[str, str],
    say: Say,
) -> dict[str, dict[str, Any]]:
    """Each pair in processes of its own, its encoder in the form that the rounds found fastest."""
    by_name = {c.name: c for c in contestants}
    found: dict[str, dict[str, Any]] = {}
    for encoder, image_tokens in IMAGE_TOKENS.items():
        for contestant in contestants:
            if contestant.name not in measured["contestants"]:
                continue
            if contestant.peer == HIMIX:
                together, prompt = contestant, TEXT_TOKENS
                if contestant.encoder != encoder:
                    continue
            elif "answer" in contestant.roles:
                best = fastest_encoder(measured, encoder, contestant.peer)
                together = pair(contestant, by_name[best] if best else None)
                prompt = image_tokens + TEXT_TOKENS
            else:
                continue
            say(f"cold starts: {together.name}")
            try:
                starts = [
                    cold_start(together, environments, logs, prompt, 1 + DECODED)
                    for _ in range(1 + COLD_STARTS)
                ][1:]
            except PeerError as error:
                failed[f"cold start of {together.name}"] = str(error)
                continue
            found[f"{encoder}: {contestant.name}"] = {"process": together.name, "starts": starts}
    return found


def draw_picture(file: Path) -> None:
    """A photo's size and kind of file, so that reading and resizing it takes what it takes."""
    small = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(file, quality=90)
