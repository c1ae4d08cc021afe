"""All of it: cold starts, then rounds in which every candidate has its turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from himix_edge.bench.candidates import (
    CANDIDATES,
    Candidate,
    Plan,
    Timing,
    plan_for,
    run,
    run_text_only,
)
from himix_edge.bench.cold import ColdStart, cold_start
from himix_edge.bench.limits import LimitMeter, Limits, settle
from himix_edge.bench.split import projection_share
from himix_edge.claims import scratch_folder
from himix_edge.contract import Manifest
from himix_edge.errors import BundleError, ConfigError, closest
from himix_edge.plain import shown
from himix_edge.runtimes import Model, load
from himix_edge.runtimes.preprocess import load_image, pixel_values
from himix_edge.runtimes.threads import checked_threads
from himix_edge.shapes.render import render
from himix_edge.shapes.scenes import random_scene

Watch = Callable[[str, int, int, str], None]  # name, done, total, what there is to say
COLD_STARTS = 3
SCENE_SIZE = 640  # pixels each way of the picture that is drawn where none is given


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        image: a picture's file; None draws a scene.
        vs: None, or "vanilla": the same pair as a vanilla model, in the same rounds.
        threads: for the model and the machine's limits; None takes all cores.
        text: M, the tokens of the prompt.
        rounds: how often each candidate has its turn.
        device: "cpu" alone.
    """

    image: Path | None = None
    vs: str | None = None
    threads: int | None = None
    text: int = 64
    rounds: int = 5
    device: str = "cpu"

    def __post_init__(self) -> None:
        checked_threads(self.threads)
        if self.rounds < 1:
            raise ConfigError(
                "rounds is out of range", expected="1 or more", found=shown(self.rounds)
            )
        if self.vs is not None and self.vs != "vanilla":
            raise ConfigError(
                f"nothing to compare with is named {self.vs!r}", fix=closest(self.vs, ("vanilla",))
            )
        if self.device != "cpu":
            raise ConfigError(
                f"bench can't measure {self.device!r}",
                expected="cpu, whose limits it knows to measure",
                found=self.device,
                fix="use --device cpu; for GPUs there is benchmarks/himix_vs_vanilla.py",
            )

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """In the order of their turns."""
        return CANDIDATES if self.vs else ("himix",)


@dataclass(frozen=True)
class Round:
    """One turn each.

    Attributes:
        timings: by candidate.
        text_only: milliseconds of the prefill of M tokens with no image.
    """

    timings: dict[Candidate, Timing]
    text_only: float


@dataclass(frozen=True)
class Measurement:
    """Everything that was measured.

    Attributes:
        limits: before each round and after the last.
        projection_share: the projections' part of the vision graph's time; None where it can't be
            told.
    """

    bundle: Path
    manifest: Manifest
    options: Options
    plan: Plan
    rounds: list[Round]
    limits: list[Limits]
    projection_share: float | None
    cold: dict[Candidate, list[ColdStart]]


def measure(bundle: Path, options: Options, watch: Watch = lambda *_: None) -> Measurement:
    """Measures a bundle on this machine's CPU.

    Args:
        watch: called with each step's name, its number, how many there are, and "".

    Raises:
        BundleError: no bundle, a corrupt one, or one that ONNX Runtime can't run on a CPU.
        ConfigError: an option out of range, or a design other than HiMix's.
        ImageError: a picture that can't be read.
        PromptError: more text than the context holds.
        DependencyError: no onnxruntime.
        EngineError: a fresh process that comes to no first token.
    """
    manifest = Manifest.read(bundle)
    if manifest.config.design != "himix":
        raise BundleError(
            f"bench can't measure {bundle}",
            expected="a model of the design himix",
            found=manifest.config.design,
            fix="use --vs vanilla with a himix bundle to compare the two",
        )
    with _picture(options.image) as picture, _meter(options.threads) as meter:
        pixels = pixel_values(load_image(picture), manifest.config.preprocess)
        # Every file is compared with its sha256 here, and so in the page cache from then on.
        model = load(bundle, device="cpu", threads=options.threads)
        plan = plan_for(model, options.text, vanilla=options.vs is not None)
        del model  # a fresh process shall have the memory
        starts = min(COLD_STARTS, options.rounds)
        cold: dict[Candidate, list[ColdStart]] = {name: [] for name in options.candidates}
        for done in range(starts):
            watch("Cold starts", done + 1, starts, "")
            for name, list_of in cold.items():
                list_of.append(cold_start(bundle, picture, plan.text, name, options.threads))
        share = projection_share(bundle, manifest.config, pixels, options.threads)
        model = load(bundle, device="cpu", threads=options.threads, verify=False)
        _round(model, picture, plan, options)  # the first run of a shape plans it
        rounds, limits = [], [meter.measure()]
        for done in range(options.rounds):
            watch("Rounds", done + 1, options.rounds, "")
            rounds.append(_round(model, picture, plan, options))
            limits.append(meter.measure())
    return Measurement(bundle, manifest, options, plan, rounds, limits, share, cold)


def _round(model: Model, picture: Path, plan: Plan, options: Options) -> Round:
    """A turn each, none of them beside the idle workers of the one before."""
    timings = {}
    for name in options.candidates:
        settle()
        timings[name] = run(model, picture, plan, name)
    settle()
    return Round(timings, run_text_only(model.engine, plan))


@contextlib.contextmanager
def _picture(given: Path | None) -> Iterator[Path]:
    """The picture's file, or a scene drawn for this run."""
    if given is not None:
        yield given
        return
    with scratch_folder() as folder:
        path = folder / "scene.png"
        render(random_scene(np.random.default_rng(0)), SCENE_SIZE).save(path)
        yield path


@contextlib.contextmanager
def _meter(threads: int | None) -> Iterator[LimitMeter]:
    meter = LimitMeter(threads)
    try:
        yield meter
    finally:
        meter.close()
