"""What a look at a machine may touch: its files and its commands, neither of which is trusted."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MOST_BYTES = 1 << 20  # of a file or an answer; a version takes no more
PATIENCE = 10.0  # seconds for a command; the libraries of a cold board take a few


@dataclass(frozen=True)
class Output:
    """What a command answered.

    Attributes:
        code: its exit code; None where it did not run to its end.
    """

    code: int | None
    out: str
    err: str = ""


Runner = Callable[[Sequence[str]], Output | None]


def run_command(command: Sequence[str]) -> Output | None:
    """Runs a command with no input; None where there is no such command."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False
        )
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        return Output(None, "", f"no answer in {PATIENCE:g} s")
    except (OSError, ValueError) as error:
        return Output(None, "", f"{type(error).__name__}: {error}")
    return Output(done.returncode, _text(done.stdout), _text(done.stderr))


@dataclass
class Machine:
    """A machine's files and commands.

    Attributes:
        root: where its file system begins.
        run: runs a command.
        problems: what was there and could not be read, in the order met.
    """

    root: Path = Path("/")
    run: Runner = run_command
    problems: list[str] = field(default_factory=list)

    def read(self, path: str) -> str | None:
        """A text file's beginning, or None."""
        try:
            with (self.root / path.lstrip("/")).open("rb") as file:
                return _text(file.read(MOST_BYTES))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            self.problems.append(f"{path}: {type(error).__name__}")
            return None

    def ask(self, *command: str, may_fail: bool = False) -> str | None:
        """What a command prints, or None where there is none or it fails.

        Args:
            may_fail: its exit code says nothing, as long as it runs to its end.
        """
        answer = self.run(command)
        if answer is None:
            return None
        if answer.code is None or (answer.code != 0 and not may_fail):
            said = (answer.err or answer.out).strip().splitlines()
            reason = said[-1][:200] if said else f"exit code {answer.code}"
            self.problems.append(f"{command[0]}: {reason}")
            return None
        return answer.out


def _text(data: bytes) -> str:
    """Without whatever a terminal would obey."""
    text = data[:MOST_BYTES].decode("utf-8", "replace")
    return "".join(sign for sign in text if sign.isprintable() or sign in "\n\t")
