"""The shapes benchmark on a bundle, or on a checkpoint in torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from himix_edge.contract import MANIFEST, Manifest
from himix_edge.errors import BundleError, ConfigError, DependencyError
from himix_edge.runtimes import Model, load
from himix_edge.shapes.benchmark import NOTICE as SHAPES_NOTICE
from himix_edge.shapes.benchmark import Exchange, Score, exchanges, scores

Watch = Callable[[str, int, int, str], None]  # name, done, total, what there is to say
MAX_ANSWER_TOKENS = 64  # twice the longest right answer


@dataclass(frozen=True)
class Evaluation:
    """What a model answered on the held-out scenes.

    Attributes:
        seconds: for all answers, pictures drawn and encoded included.
    """

    target: Path
    exchanges: list[Exchange]
    seconds: float

    @property
    def scores(self) -> list[Score]:
        return scores(self.exchanges)


def evaluate(
    target: Path, scenes: int, threads: int | None, watch: Watch, device: str = "auto"
) -> Evaluation:
    """Asks a bundle or a checkpoint everything about the first held-out scenes, greedily.

    Args:
        device: for a bundle; see `runtimes.load`, also for what it raises.

    Raises:
        BundleError, CheckpointError: `target` is neither, or is corrupt.
        ConfigError: less than one scene.
    """
    if scenes < 1:
        raise ConfigError("scenes is out of range", expected="1 or more", found=str(scenes))
    model = opened(target, threads, device)

    def answer(picture: Image.Image, questions: Sequence[str]) -> list[str]:
        image = model.encode(picture)
        return [
            model.generate(image, question, max_tokens=MAX_ANSWER_TOKENS).read()
            for question in questions
        ]

    asked: list[Exchange] = []
    start = time.perf_counter()
    for done, batch in enumerate(exchanges(answer, scenes), start=1):
        asked += batch
        right = sum(exchange.right for exchange in asked) / len(asked)
        watch(str(target), done, scenes, f"{right:.1%} right")
    return Evaluation(target, asked, time.perf_counter() - start)


def accuracies(bundle: Path, scenes: int | None) -> dict[str, float]:
    """The accuracy by kind of question; nothing if no scenes are to be looked at.

    Args:
        scenes: None is 500 for a model of the shapes world, and none for any other.
    """
    if scenes is None:
        scenes = 500 if Manifest.read(bundle).notice == SHAPES_NOTICE else 0
    if not scenes:
        return {}
    result = evaluate(bundle, scenes, None, lambda *_: None)
    return {score.kind: round(score.accuracy, 4) for score in result.scores}


def opened(target: Path, threads: int | None = None, device: str = "auto") -> Model:
    """A bundle on a device, or a checkpoint in torch, with one and the same loop on top."""
    if (target / MANIFEST).is_file():
        return load(target, device=device, threads=threads)
    if not (target / "config.json").is_file():
        raise BundleError(
            f"{target} is neither a bundle nor a checkpoint",
            expected=f"a folder with {MANIFEST} or config.json",
            found="neither" if target.is_dir() else "no such folder",
            fix="make a bundle with: himix-edge export",
        )
    try:
        from himix_edge.export.reference import reference_model
        from himix_edge.models.checkpoints import read_checkpoint
    except ImportError as error:
        raise DependencyError(
            f"a checkpoint needs {error.name}", fix="pip install 'himix-edge[export]'"
        ) from error
    return reference_model(read_checkpoint(target))


def same_answers(one: Evaluation, other: Evaluation) -> int:
    """How many questions two models answered in the same words."""
    pairs = zip(one.exchanges, other.exchanges, strict=True)
    return sum(a.answer == b.answer for a, b in pairs)


def report(result: Evaluation, other: Evaluation | None) -> dict[str, Any]:
    """Everything as plain data, for JSON."""
    data: dict[str, Any] = {
        "target": str(result.target),
        "seconds": round(result.seconds, 1),
        "kinds": {
            score.kind: {
                "asked": score.asked,
                "right": score.right,
                "accuracy": round(score.accuracy, 4),
                "chance": round(score.chance, 4),
            }
            for score in result.scores
        },
    }
    if other:
        same = {"same_answers": same_answers(result, other), "of": len(result.exchanges)}
        data["against"] = {**report(other, None), **same}
    return data


def table(result: Evaluation, other: Evaluation | None = None) -> str:
    """The accuracy by kind as a Markdown table, with the other's beside it."""
    head = ["question", "asked", "accuracy", "chance"] + (["the other's"] if other else [])
    rows = [head, ["---"] * len(head)]
    for i, score in enumerate(result.scores):
        row = [score.kind, str(score.asked), f"{score.accuracy:.1%}", f"{score.chance:.1%}"]
        rows.append(row + ([f"{other.scores[i].accuracy:.1%}"] if other else []))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if other:
        same, asked = same_answers(result, other), len(result.exchanges)
        lines += ["", f"{same} of {asked} answers are the same, word for word."]
    return "\n".join(lines)
