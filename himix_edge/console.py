"""How a command line meets its terminal, pipe or file: any text can be said, any end is one line.

stdout and stderr keep their encoding; what it lacks is replaced. JSON is ASCII.
"""

from __future__ import annotations

import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable
from typing import Any

from himix_edge.errors import HimixError, OutputError

_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"


def run_command(command: Callable[[], int], *, debug: bool = False) -> int:
    """Runs a command line: what it returns, or 1 after an error in one line, or 130 after Ctrl-C.

    Args:
        debug: errors are raised, for their traceback; a reader that has gone is none.
    """
    try:
        prepare_streams()
        try:
            return command()
        finally:
            sys.stdout.flush()  # a full disk shows here, or nowhere
    except BrokenPipeError:  # whoever read our output has gone
        _drop_stdout()
        return 1
    except KeyboardInterrupt:
        return 130
    except (HimixError, OSError, UnicodeError) as error:
        _drop_stdout()
        if debug:
            raise
        print(f"Error: {_in_one_line(error)}", file=sys.stderr)
        return 1


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


def _in_one_line(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):  # of a path that is no text, by a library
        return f"a name that is no text: {error.object[:300]!r}. Fix: rename it"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, HimixError) else f"{type(error).__name__}: {text}"


def _drop_stdout() -> None:
    """Points stdout to nowhere if it can't be written, so that nothing fails when Python exits."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _above_standard(path: str) -> int:
    """A descriptor for writing, with 0, 1 and 2 taken: libraries write to these by number."""
    while (descriptor := os.open(path, os.O_RDWR)) <= 2:
        pass
    return descriptor
