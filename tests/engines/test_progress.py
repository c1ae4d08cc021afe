"""How far a build has come, and how it is called off."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from himix_edge.engines.progress import BuildProgress, run_cancellable

Told = list[tuple[str, float, str]]


def following() -> tuple[BuildProgress, Told]:
    told: Told = []
    return BuildProgress(lambda *what: told.append(what)), told


def test_phases_within_phases() -> None:
    progress, told = following()
    progress.start("Building", None, 4)
    assert progress.step("Building", 0)
    progress.start("Timing", "Building", 10)
    assert progress.step("Timing", 4)
    progress.finish("Timing")
    assert progress.step("Building", 1)
    progress.finish("Building")
    assert told == [
        ("Building", 0.0, ""),
        ("Building", 0.25, ""),
        ("Building", 0.25, "Timing"),
        ("Building", 0.375, "Timing"),
        ("Building", 0.5, "Timing"),
        ("Building", 0.5, ""),
        ("Building", 1.0, ""),
    ]


def test_the_furthest_of_phases_side_by_side() -> None:
    progress, told = following()
    progress.start("Building", None, 2)
    progress.start("left", "Building", 10)
    progress.start("right", "Building", 10)
    progress.step("left", 6)
    progress.step("right", 0)
    assert told[-1] == ("Building", 0.35, "right")


def test_it_never_goes_back() -> None:
    progress, told = following()
    progress.start("Building", None, 2)
    for _ in range(2):
        progress.start("again", "Building", 10)
        for step in range(5):
            progress.step("again", step)
        progress.finish("again")
    fractions = [fraction for _, fraction, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 0.5


def test_one_phase_after_another_begins_anew() -> None:
    progress, told = following()
    for _ in range(2):
        progress.start("Building", None, 1)
        progress.step("Building", 0)
        progress.finish("Building")
    assert [fraction for _, fraction, _ in told] == [0.0, 1.0, 1.0] * 2


def test_whatever_it_is_told_it_raises_nothing() -> None:
    progress, told = following()
    assert progress.step("unknown", 0)
    progress.finish("unknown")
    assert told == []
    progress.start("none", "unknown", 0)
    progress.step("none", 7)
    progress.start("itself", "itself", 1)
    assert [fraction for _, fraction, _ in told] == [0.0, 1.0, 0.0]


def test_steps_end_the_build_when_cancelled() -> None:
    progress, told = following()
    progress.start("Building", None, 4)
    assert progress.step("Building", 0)
    progress.cancel()
    assert not progress.step("Building", 1)
    progress.finish("Building")
    assert told[-1] == ("Building", 0.5, "stopping")


def test_the_result_of_work() -> None:
    assert run_cancellable(lambda: threading.current_thread().name, pytest.fail) == "engine build"


def test_the_error_of_work() -> None:
    def fail() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run_cancellable(fail, pytest.fail)


def _ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_cancels_and_waits_for_the_end() -> None:
    cancelled = threading.Event()
    ended = []

    def work() -> None:
        _ctrl_c()
        assert cancelled.wait(10)
        time.sleep(0.05)
        ended.append("in its own time")

    with pytest.raises(KeyboardInterrupt):
        run_cancellable(work, cancelled.set)
    assert ended == ["in its own time"]


def test_a_second_ctrl_c_does_not_wait() -> None:
    let_go = threading.Event()

    def work() -> None:
        _ctrl_c()
        let_go.wait(10)

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_cancellable(work, _ctrl_c)
    assert time.monotonic() - begun < 5
    let_go.set()
