"""What a run came to, step by step: a file of JSON lines beside the states."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from himix_edge.training.loop import Progress

LOG = "log.jsonl"
WINDOW = 25  # steps that one line is the mean of


@dataclass(frozen=True)
class LogLine:
    """The mean of a window of steps.

    Attributes:
        seconds: spent on the phase so far, interrupted runs included.
        right: by kind, the share of questions (in "encoder": of objects' traits) that were right.
    """

    phase: str
    step: int
    seconds: float
    loss: float
    right: dict[str, float]

    def __str__(self) -> str:
        shares = "  ".join(f"{kind} {share:.0%}" for kind, share in sorted(self.right.items()))
        return f"loss {self.loss:.3f}  {shares}"


class TrainingLog:
    """Writes the lines; `last` is each phase's newest, of earlier runs into the folder too."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / LOG
        self.last = {line.phase: line for line in read_log(folder)}
        self._window: list[Progress] = []
        self._since = time.monotonic()

    def update(self, progress: Progress) -> LogLine | None:
        """Takes one step in; the phase's newest line, if it has one."""
        self._window.append(progress)
        if progress.step % WINDOW == 0 or progress.step == progress.phase.steps:
            self._write()
        return self.last.get(progress.phase.task)

    def _write(self) -> None:
        outcomes = [progress.outcome for progress in self._window]
        phase, step = self._window[-1].phase.task, self._window[-1].step
        kinds = {kind for outcome in outcomes for kind in outcome.right}
        shares = {kind: [o.right[kind] for o in outcomes if kind in o.right] for kind in kinds}
        before = self.last[phase].seconds if phase in self.last else 0.0
        now = time.monotonic()
        line = LogLine(
            phase,
            step,
            seconds=round(before + now - self._since, 1),
            loss=round(sum(float(outcome.loss) for outcome in outcomes) / len(outcomes), 5),
            right={kind: round(sum(s) / len(s), 4) for kind, s in sorted(shares.items())},
        )
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")
        self.last[phase] = line
        self._window, self._since = [], now


def read_log(folder: Path) -> list[LogLine]:
    """All lines of a run, oldest first; none if there is no log yet."""
    path = folder / LOG
    if not path.is_file():
        return []
    return [LogLine(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
