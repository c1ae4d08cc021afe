"""What each phase of a long work took: seconds, and the most memory that the process ever held."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[str, float], None]  # the phase that begins, and how much of all is done, 0..1


@dataclass(frozen=True)
class PhaseCost:
    """What a phase took.

    Attributes:
        peak_bytes: resident memory at its highest, the pages of mapped files included; where the
            system can't say it for a phase alone, since the process began.
    """

    phase: str
    seconds: float
    peak_bytes: int


def total(name: str, costs: Sequence[PhaseCost]) -> PhaseCost:
    """Several phases as one."""
    seconds = sum(cost.seconds for cost in costs)
    return PhaseCost(name, seconds, max(cost.peak_bytes for cost in costs))


class Phases:
    """Tells a callback which phase begins, and keeps what those before it took."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress or (lambda _phase, _done: None)
        self._current: tuple[str, float] | None = None
        self.costs: list[PhaseCost] = []

    def begin(self, phase: str, done: float) -> None:
        """A phase begins; `done` of the whole, 0..1, lies behind."""
        self._end()
        self._current = (phase, time.perf_counter())
        _give_back_freed()
        _forget_peak()
        self._progress(phase, done)

    def within(self, done: float) -> None:
        """The present phase has come so far that `done` of the whole lies behind."""
        if self._current:
            self._progress(self._current[0], round(done, 6))  # 0.2 + 0.1 is not beyond 0.3

    def finish(self) -> list[PhaseCost]:
        """All is done; what each phase took."""
        self._end()
        self._progress("done", 1.0)
        return self.costs

    def _end(self) -> None:
        if self._current:
            phase, start = self._current
            self.costs.append(PhaseCost(phase, time.perf_counter() - start, _peak_bytes()))
            self._current = None


def _give_back_freed() -> None:
    """Lets the system have what was freed: glibc keeps most of a model that is gone."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _forget_peak() -> None:
    """Lets the peak begin at what the process holds now; Linux alone can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
