"""How a command line meets its terminal, pipe or file: any text can be said, any end is one line.

stdout and stderr keep their encoding; what it lacks is replaced. JSON is ASCII.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from himix_edge.errors import HimixError, OutputError
from himix_edge.remedies import reason_of, remedy_for, shortage

_LONGEST = 500  # characters of what a library says
_ENDINGS = ("SIGTERM", "SIGHUP")  # what a system, a service or a closed terminal sends


class _Ended(BaseException):
    """A signal that ends the program, raised so that what it was writing is cleared away."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"


def run_command(command: Callable[[], int], *, debug: bool = False) -> int:
    """Runs a command line: what it returns, or 1 after an error in one line, or 130 after Ctrl-C.

    A command that SIGTERM or SIGHUP ends clears what it has begun to write, as after Ctrl-C.

    Args:
        debug: errors are raised, for their traceback; a reader that has gone is none.
    """
    try:
        with _ended_by_signals():
            prepare_streams()
            try:
                return command()
            finally:
                sys.stdout.flush()  # a full disk shows here, or nowhere
    except BrokenPipeError:  # whoever read our output has gone
        _drop(sys.stdout)
        return 1
    except KeyboardInterrupt:
        return 130
    except _Ended as end:
        return 128 + end.number
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        _drop(sys.stdout)
        if debug:
            raise
        _say(f"Error: {one_line(error)}")
        return 1


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Lets signals raise `_Ended`, where nobody else handles them, and only in the main thread."""

    def end(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # the clearing is not to be cut short by a second one
        raise _Ended(number)

    taken = []
    if threading.current_thread() is threading.main_thread():
        for name in _ENDINGS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, end)
                taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr is full, or closed: nobody listens
        print(line, file=sys.stderr)
    _drop(sys.stderr)


def prepare_streams() -> None:
    """Lets stdout and stderr say any text, lone surrogates of file names too.

    Raises:
        OutputError: stdout is closed.
    """
    if sys.stderr is None:  # closed; then print(file=sys.stderr) would write to stdout
        sys.stderr = open(_above_standard(os.devnull), "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(_above_standard(os.devnull), "w", encoding="utf-8")  # noqa: SIM115
        raise OutputError("stdout is closed", fix="send it to a file, or to /dev/null")
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def printable(text: str) -> str:
    """A stranger's text without what would command the terminal: controls show as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    # Emoji are joined by a format character, and some scripts need them: only the controls, and
    # what turns the direction of a line, can deceive.
    harmless = unicodedata.category(character) in ("Cf", "Zs") and character not in _TURNING
    return character if harmless else ascii(character)[1:-1]


def print_json(data: Any) -> None:
    """Prints one JSON object, in ASCII, whatever the texts within."""
    print(json.dumps(data, indent=2), flush=True)


def one_line(error: BaseException) -> str:
    """What went wrong and what helps, of any error, in one line of readable characters."""
    short = shortage(error)
    if isinstance(error, HimixError):
        if short is None or (error.fix and short[1] in error.fix):
            return str(error)
        found, fix = short
        return str(HimixError(error.failed, expected=error.expected, found=found, fix=fix))
    if short and not isinstance(error, OSError):
        return str(HimixError(short[0], fix=short[1]))
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename is not None else ""
        return str(HimixError(f"{reason_of(error)}{where}", fix=remedy_for(error)))
    if isinstance(error, UnicodeEncodeError):  # of a path that is no text, by a library
        return f"a name that is no text: {error.object[:300]!r}. Fix: rename it"
    if isinstance(error, RecursionError):
        return str(HimixError("a file is nested too deeply", fix="check the files it was given"))
    text = " ".join(str(error).split())[:_LONGEST] or "no more is known"
    return str(
        HimixError(
            f"{type(error).__name__}: {text}",
            fix="run it again with --debug, and report what it prints",
        )
    )


def _drop(stream: TextIO) -> None:
    """Points a stream to nowhere if it can't be written, so that Python exits in peace."""
    try:
        stream.flush()
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _above_standard(path: str) -> int:
    """A descriptor for writing, with 0, 1 and 2 taken: libraries write to these by number."""
    while (descriptor := os.open(path, os.O_RDWR)) <= 2:
        pass
    return descriptor
