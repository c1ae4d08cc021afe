"""How far a build has come, told by threads that are not ours; and how it is called off.

TensorRT reports phases within phases, each of so many steps, from threads of its own. An exception
raised there would end the process, and Python hears of Ctrl-C only in its main thread. So the build
runs in a thread, the main thread waits, and Ctrl-C becomes the next answer to TensorRT: stop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

_SLICE_SECONDS = 0.1
T = TypeVar("T")
Report = Callable[[str, float, str], None]  # a phase, how much of it is done 0..1, what goes on


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0
    inner: dict[str, _Phase] = field(default_factory=dict)

    @property
    def fraction(self) -> float:
        """0..1, with the part of the step that the furthest of the inner phases has done."""
        within = max((phase.fraction for phase in self.inner.values()), default=0.0)
        return min(1.0, (self.done + within) / max(1, self.steps))


class BuildProgress:
    """What `IProgressMonitor` is told, as one fraction for each outermost phase.

    Its methods may be called from any thread and raise nothing.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._shown: dict[str, float] = {}
        self.cancelled = False

    def cancel(self) -> None:
        """The next step that ends is the last."""
        self.cancelled = True

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, within another or not."""
        with self._lock:
            outer = self._phases.get(parent or "") if parent != name else None
            self._phases[name] = phase = _Phase(parent if outer else None, steps)
            if outer:
                outer.inner[name] = phase
            self._tell(name)

    def step(self, name: str, step: int) -> bool:
        """A step has ended, counted from 0; the answer is whether to go on."""
        with self._lock:
            if name in self._phases:
                phase = self._phases[name]
                phase.done, phase.inner = max(phase.done, step + 1), {}
                self._tell(name)
        return not self.cancelled

    def finish(self, name: str) -> None:
        """A phase has ended, perhaps before its last step."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is None:
                return
            if not self.cancelled:
                phase.done = phase.steps
            if self._tell(name) == name:
                del self._shown[name]  # the name may come again, from 0
            del self._phases[name]

    def _tell(self, name: str) -> str:
        """Reports on the outermost phase around this one, whose name it gives."""
        root = name
        while (parent := self._phases[root].parent) in self._phases:
            root = str(parent)
        # An inner phase that begins again must not take the bar back.
        done = max(self._phases[root].fraction, self._shown.get(root, 0.0))
        self._shown[root] = done
        self._report(root, done, "stopping" if self.cancelled else name if name != root else "")
        return root


def run_cancellable(work: Callable[[], T], cancel: Callable[[], None]) -> T:
    """Runs `work` in a thread; on Ctrl-C calls `cancel` and waits for its end, or for a second.

    Raises:
        KeyboardInterrupt: Ctrl-C came, whatever `work` made of it.
        Exception: what `work` raised.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            errors.append(error)
        finally:
            ended.set()

    def wait() -> None:
        # In slices: a signal that comes just before a wait begins is heard only when it ends.
        while not ended.wait(_SLICE_SECONDS):
            pass

    thread = threading.Thread(target=run, name="engine build", daemon=True)
    try:
        thread.start()
        wait()
    except KeyboardInterrupt:
        cancel()
        if thread.is_alive():
            wait()
        raise
    if errors:
        raise errors[0]
    return results[0]
