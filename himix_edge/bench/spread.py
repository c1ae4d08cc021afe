"""Min, median and max of what was measured, and which rounds something else disturbed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from himix_edge.bench.limits import Limits

CONTENDED = 0.7  # a limit below this part of the run's best: the machine was not ours alone
TOO_MANY = 0.5  # contended rounds, as a part of all


@dataclass(frozen=True)
class Spread:
    """Of one figure over the rounds that count."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        held = list(values)
        return cls(min(held), statistics.median(held), max(held))


@dataclass(frozen=True)
class Verdict:
    """Which rounds count.

    Attributes:
        used: their numbers, from 0 on.
        contended: those left out; or, where none would be left, those that would have been.
        warning: what a reader of the figures must know, "" if nothing.
    """

    used: list[int]
    contended: list[int]
    warning: str


def best(limits: Sequence[Limits]) -> Limits:
    """The best of each."""
    return Limits(**{f.name: max(getattr(one, f.name) for one in limits) for f in fields(Limits)})


def judge(limits: Sequence[Limits]) -> Verdict:
    """Judges each round by the limits before and after it.

    Args:
        limits: of n rounds n + 1 measurements.
    """
    top = best(limits)
    slow = [
        any(getattr(one, f.name) < CONTENDED * getattr(top, f.name) for f in fields(Limits))
        for one in limits
    ]
    rounds = range(len(limits) - 1)
    contended = [i for i in rounds if slow[i] or slow[i + 1]]
    used = [i for i in rounds if i not in contended]
    warning = ""
    if not used:
        warning = "the machine was busy in every round, and all of them count: do not trust this"
    elif len(contended) > TOO_MANY * len(rounds):
        warning = f"the machine was busy in {len(contended)} of {len(rounds)} rounds: measure again"
    return Verdict(used or list(rounds), contended, warning)
