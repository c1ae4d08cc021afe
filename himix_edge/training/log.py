"""What a run came to, step by step: a file of JSON lines beside the states."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from himix_edge.errors import ConfigError, TrainingError
from himix_edge.files import whole_file
from himix_edge.plain import dataclass_from_dict
from himix_edge.remedies import output_errors
from himix_edge.training.loop import Progress
from himix_edge.training.state import damaged

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
        self._path = folder / LOG
        with output_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
        self.last = {line.phase: line for line in _mended(folder)}
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
        with output_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")
        self.last[phase] = line
        self._window, self._since = [], now


def read_log(folder: Path) -> list[LogLine]:
    """All lines of a run that can be read, oldest first; none if there is no log yet."""
    return [line for line in map(_line, _texts(folder / LOG)) if line]


def _texts(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []


def _line(text: bytes) -> LogLine | None:
    try:
        return dataclass_from_dict(LogLine, json.loads(text))
    except (ValueError, RecursionError, ConfigError):
        return None


def _mended(folder: Path) -> list[LogLine]:
    """As `read_log`; lines that can't be read go, so that the next one is not written after half.

    A last line that was cut is dropped. With any other, the whole file is kept under another name.
    A file without one whole line, and no state beside it, may be anyone's, and is refused.
    """
    path = folder / LOG
    with output_errors(path):
        texts = _texts(path)
        good = [text for text in texts if text.endswith(b"\n") and _line(text)]
        if good == texts:
            return read_log(folder)
        if not good and not any(folder.glob("*.safetensors")):
            raise TrainingError(
                f"{path} is not the log of a run that could go on",
                expected="a whole line of one, or a state beside it",
                found=f"{len(texts)} that can't be read, and no state",
                fix="delete it to begin anew, or choose another folder",
            )
        if good == texts[:-1] and not texts[-1].endswith(b"\n"):
            kept = "its last line was cut, and is dropped"
        else:
            aside = path.with_name(damaged(path.name))
            path.replace(aside)
            kept = f"the whole of it is now {aside.name}, and the lines that can be read go on"
        with whole_file(path) as file:
            file.write_bytes(b"".join(good))
    print(f"Warning: {path} is damaged: {kept}.", file=sys.stderr)
    return read_log(folder)
