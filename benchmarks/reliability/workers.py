"""A campaign's worker: a process that says what it begins and how it ended, and may die of it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SILENCE = 60.0  # seconds after which a worker hangs


@dataclass
class Result:
    """What became of one mutation: seconds of CPU, megabytes above what the worker had."""

    seed: int
    name: str
    outcome: str
    s: float = 0.0
    MB: float = 0.0


class Results(list[Result]):
    """Of a whole campaign."""

    def show_worst(self) -> int:
        """Prints the slowest, the largest and the wrong ones; returns 1 if there are wrong ones."""
        for unit in ("s", "MB"):
            for each in sorted(self, key=lambda result: -float(getattr(result, unit)))[:3]:
                print(f"most {unit}: {getattr(each, unit):.2f}  seed {each.seed}: {each.name}")
        wrong = [result for result in self if result.outcome.startswith("wrong")]
        print(f"wrong: {len(wrong)}")
        for result in wrong[:20]:
            print(result)
        return 1 if wrong else 0


def run_workers(module: str, count: int) -> Results:
    """All results of a campaign's worker, started anew behind a mutation that ended it.

    The worker is `python -m MODULE --worker FIRST STEP --count COUNT`. It prints a line of JSON
    with seed and name, and then one with outcome, s and MB.
    """
    results, first = Results(), 0
    while first < count:
        command = [sys.executable, "-m", module, "--worker", str(first), "1", "--count", str(count)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            begun = _read(process, results)
        if not begun:
            if process.returncode:
                raise SystemExit(f"the worker fails: exit status {process.returncode}")
            return results
        results.append(Result(**begun, outcome=f"wrong: exit status {process.returncode}"))
        first = begun["seed"] + 1
    return results


def _read(process: subprocess.Popen[str], results: Results) -> dict[str, Any]:
    """Takes a worker's results; returns what it had begun when it ended."""
    begun: dict[str, Any] = {}
    assert process.stdout  # noqa: S101
    while True:
        alarm = threading.Timer(SILENCE, process.kill)
        alarm.start()
        line = process.stdout.readline()
        alarm.cancel()
        if not line:
            process.wait()
            return begun
        said = json.loads(line)
        if "outcome" in said:
            results.append(Result(**begun, **said))
            begun = {}
        else:
            begun = said


def reset_peak() -> None:
    """So that VmHWM counts from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def kilobytes(name: str) -> int:
    """Of a line of /proc/self/status, such as VmRSS."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])
