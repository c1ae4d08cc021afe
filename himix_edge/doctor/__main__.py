"""python -m himix_edge.doctor: what `himix-edge doctor` prints, before anything is installed."""

from __future__ import annotations

import sys

from himix_edge.console import print_json, run_command
from himix_edge.doctor.facts import look
from himix_edge.doctor.judge import judge
from himix_edge.doctor.machine import Machine
from himix_edge.doctor.show import as_data, as_text


def examine(*, as_json: bool) -> int:
    """Looks, judges and prints; returns the exit code: 0 if a bundle can run here, else 1."""
    facts = look(Machine())
    verdict = judge(facts)
    if as_json:
        print_json(as_data(facts, verdict))
    else:
        print(as_text(facts, verdict))
    return 0 if verdict.can_run else 1


if __name__ == "__main__":
    sys.exit(run_command(lambda: examine(as_json=False)))
