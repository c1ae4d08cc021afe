"""The computed tables of docs/jetson.md: python -m tests.jetson_tables"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from himix_edge.analysis.devices import DEVICES
from himix_edge.analysis.memory import setting_for
from himix_edge.analysis.plan import plan_report
from himix_edge.presets import DECODERS, preset_config

BOARDS = {
    "orin-nano-8gb": "Orin Nano 8GB",
    "orin-nx-16gb": "Orin NX 16GB",
    "agx-orin-32gb": "AGX Orin 32GB",
    "agx-orin-64gb": "AGX Orin 64GB",
    "thor-t4000": "T4000",
    "thor-t5000": "T5000",
}
ENCODERS = ("siglip-so400m-384", "tinyclip-39m")
SHOWN = [name for name in DECODERS if name != "qwen2.5-0.5b"]  # of the same shape as qwen2-0.5b
BYTES = ("weights", "cache", "activations", "run", "build")


def himix(board: str, encoder: str, decoder: str, target: str) -> dict[str, Any]:
    """The plan of a pair on a board, HiMix's half of it."""
    report = plan_report(board, preset_config(encoder, decoder), "", setting_for(board, target))
    found: dict[str, Any] = report["designs"]["himix"]
    return found


def memory_table(target: str) -> Iterator[str]:
    """A row a pair: MB, and on which boards it runs and its engines can be built."""
    boards = [board for board in BOARDS if target in DEVICES[board].targets]
    head = ["pair", *BYTES[:3], "to run", "to build", *(BOARDS[board] for board in boards)]
    yield from _header(head)
    for encoder in ENCODERS:
        for decoder in SHOWN:
            plans = [himix(board, encoder, decoder, target) for board in boards]
            sizes = [f"{plans[0]['bytes'][name] / 1e6:,.0f}" for name in BYTES]
            yield _row([f"{encoder} + {decoder}", *sizes, *map(_fits, plans)])


def time_table() -> Iterator[str]:
    """A row a decoder: first token of vanilla and HiMix, then one more token, in ms."""
    yield from _header(["decoder", *BOARDS.values()])
    for decoder in SHOWN:
        cells = []
        for board in BOARDS:
            report = plan_report(board, preset_config(ENCODERS[0], decoder), "", setting_for(board))
            vanilla, ours = report["designs"]["vanilla"], report["designs"]["himix"]
            first = (1e3 * design["first_token_seconds"] for design in (vanilla, ours))
            token = 1e3 * ours["second_token"]["seconds"]
            cells.append(f"{' / '.join(f'{ms:.0f}' for ms in first)}; {token:.1f}")
        yield _row([decoder, *cells])


def _fits(plan: dict[str, Any]) -> str:
    if not plan["fits"]:
        return "no"
    return "yes" if plan["build_fits"] else "to run"


def _header(cells: list[str]) -> Iterator[str]:
    yield _row(cells)
    yield _row(["---", *["---:"] * (len(cells) - 1)])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def tables() -> dict[str, list[str]]:
    """Lines of Markdown, by the name that marks their place in the document."""
    return {
        "memory jetpack-7.2": list(memory_table("jetpack-7.2")),
        "memory jetpack-6.2": list(memory_table("jetpack-6.2")),
        "time": list(time_table()),
    }


if __name__ == "__main__":
    for name, lines in tables().items():
        print(f"<!-- {name} -->", *lines, sep="\n", end="\n\n")
