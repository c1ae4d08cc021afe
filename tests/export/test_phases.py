"""What each phase took, and what was told of it."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

from himix_edge.export.phases import PhaseCost, Phases, total


def test_a_callback_hears_every_phase_and_how_far_it_is() -> None:
    heard: list[tuple[str, float]] = []
    phases = Phases(lambda *call: heard.append(call))
    phases.begin("one", 0.0)
    phases.within(0.2)
    phases.begin("two", 0.5)
    phases.finish()
    assert heard == [("one", 0.0), ("one", 0.2), ("two", 0.5), ("done", 1.0)]


def test_seconds_are_each_phase_s_own() -> None:
    phases = Phases(None)
    phases.begin("short", 0.0)
    phases.begin("long", 0.5)
    time.sleep(0.2)
    short, long = phases.finish()
    assert (short.phase, long.phase) == ("short", "long")
    assert short.seconds < 0.2 <= long.seconds


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells it for a phase alone")
def test_a_peak_is_each_phase_s_own() -> None:
    phases = Phases(None)
    phases.begin("before", 0.0)
    phases.begin("much", 0.3)
    much = np.ones(200_000_000, np.uint8)
    del much
    phases.begin("after", 0.6)
    before, peak, after = (cost.peak_bytes for cost in phases.finish())
    assert before > 20e6
    assert 190e6 < peak - before < 260e6
    assert peak - after > 190e6


def test_a_total_adds_seconds_and_takes_the_highest_peak() -> None:
    costs = [PhaseCost("a", 1.5, 10), PhaseCost("b", 2.0, 30), PhaseCost("c", 0.5, 20)]
    assert total("all", costs) == PhaseCost("all", 4.0, 30)


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells a process's memory")
def test_what_was_freed_is_no_part_of_the_next_phase() -> None:
    phases = Phases(None)
    phases.begin("many small pieces", 0.0)
    pieces = [np.ones(10_000) for _ in range(2_500)]  # 200 MB, of which glibc would keep most
    last = np.ones(10_000)  # at the heap's end, so that it can't just be cut off
    del pieces
    phases.begin("nothing", 0.5)
    first, second = phases.finish()
    assert first.peak_bytes - second.peak_bytes > 150e6
    assert last.sum() == 10_000
