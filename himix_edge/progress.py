"""Progress bars on stderr; where stderr is no terminal, nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PhaseCallback = Callable[[str, float], None]  # the phase's name, and how much of the whole is done


@contextlib.contextmanager
def phases(title: str) -> Iterator[PhaseCallback]:
    """A bar for work of a few phases, which appears with the first.

    Call what this gives with each phase's name and how much of the whole is done before it.
    """
    with _progress(_text("description"), BarColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task(title, total=1.0, said="", visible=False)
        yield lambda phase, done: bar.update(task, completed=done, said=phase, visible=True)


class Steps:
    """A bar for each of several runs of many steps."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def update(self, name: str, done: int, total: int, said: str) -> None:
        """Moves the bar of that name, which appears when first named."""
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total, completed=done - 1, said="")
        self._bar.update(self._tasks[name], completed=done, said=said)


@contextlib.contextmanager
def steps() -> Iterator[Steps]:
    """Bars with the time that is left, made as they are named."""
    columns = (
        _text("description"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _progress(*columns) as bar:
        yield Steps(bar)


def _text(field: str) -> TextColumn:
    """What a task says, as it is: a path in brackets is no markup."""
    return TextColumn(f"{{task.{field}}}", markup=False)


def _progress(*columns: object) -> Progress:
    console = Console(stderr=True)
    return Progress(
        *columns,  # type: ignore[arg-type]
        _text("fields[said]"),
        console=console,
        disable=not console.is_terminal,
    )
