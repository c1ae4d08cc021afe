"""python -m himix_edge.doctor: `himix-edge doctor` where typer is not installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from himix_edge.console import print_json, run_command
from himix_edge.doctor.facts import look
from himix_edge.doctor.judge import judge
from himix_edge.doctor.machine import Machine
from himix_edge.doctor.show import as_data, as_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0 if a bundle can run here, else 1."""
    command = argparse.ArgumentParser(
        prog="python -m himix_edge.doctor", description="Says what this device has and lacks."
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    return examine(as_json=command.parse_args(arguments).json)


def examine(*, as_json: bool) -> int:
    """Looks, judges and prints."""
    facts = look(Machine())
    verdict = judge(facts)
    if as_json:
        print_json(as_data(facts, verdict))
    else:
        print(as_text(facts, verdict))
    return 0 if verdict.can_run else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
