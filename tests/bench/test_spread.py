"""Statistics, and which rounds count."""

from __future__ import annotations

import pytest

from himix_edge.bench.limits import Limits
from himix_edge.bench.spread import Spread, best, judge

GOOD = Limits(40e9, 400e9, 1600e9)


def slowed(bandwidth: float = 1, fp32: float = 1, int8: float = 1) -> Limits:
    return Limits(GOOD.bandwidth * bandwidth, GOOD.fp32 * fp32, GOOD.int8 * int8)


def test_min_median_max() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(1, 2, 3)
    assert Spread.of(iter([4.0, 1.0, 2.0, 3.0])) == Spread(1, 2.5, 4)
    assert Spread.of([7.0]) == Spread(7, 7, 7)


def test_the_best_of_each() -> None:
    assert best([Limits(1, 5, 2), Limits(3, 4, 1)]) == Limits(3, 5, 2)


def test_all_rounds_of_a_quiet_machine_count() -> None:
    verdict = judge([GOOD, slowed(0.71, 0.8, 0.9), GOOD, slowed(int8=0.7)])
    assert (verdict.used, verdict.contended, verdict.warning) == ([0, 1, 2], [], "")


@pytest.mark.parametrize("limit", ["bandwidth", "fp32", "int8"])
def test_a_slow_limit_takes_out_the_rounds_beside_it(limit: str) -> None:
    verdict = judge([GOOD, GOOD, slowed(**{limit: 0.69}), GOOD, GOOD, GOOD])
    assert (verdict.used, verdict.contended) == ([0, 3, 4], [1, 2])
    assert verdict.warning == ""


def test_too_many_are_said() -> None:
    verdict = judge([slowed(fp32=0.5), GOOD, slowed(fp32=0.5), slowed(fp32=0.5), GOOD, GOOD])
    assert (verdict.used, verdict.contended) == ([4], [0, 1, 2, 3])
    assert verdict.warning == "the machine was busy in 4 of 5 rounds: measure again"


def test_where_none_would_be_left_all_count_and_that_is_said() -> None:
    verdict = judge([GOOD, slowed(bandwidth=0.1), GOOD])
    assert (verdict.used, verdict.contended) == ([0, 1], [0, 1])
    assert "do not trust" in verdict.warning
