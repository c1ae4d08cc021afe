"""Numbers of threads that work, and those that are one error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from himix_edge.bench.measure import Options
from himix_edge.errors import ConfigError
from himix_edge.runtimes import load
from himix_edge.runtimes.threads import MOST, checked_threads

BAD = {
    "none": 0,
    "negative": -1,
    "one too many": MOST + 1,
    "a process dies of": 100_000,
    "hundreds of digits": 10**400,
    "thousands of digits": 10**5000,
    "bool": True,
    "float": 1.0,
    "str": "2",
    "numpy bool": np.True_,
    "numpy float": np.float32(2),
}


def test_what_works() -> None:
    assert checked_threads(None) is None
    for threads in (1, MOST, np.int64(1), np.uint8(MOST)):
        checked = checked_threads(threads)
        assert (checked, type(checked)) == (int(threads), int)


@pytest.mark.parametrize("threads", BAD.values(), ids=BAD.keys())
def test_what_does_not(threads: object) -> None:
    with pytest.raises(ConfigError, match=f"a whole number from 1 to {MOST}, found") as error:
        checked_threads(threads)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("threads", [0, 100_000])
def test_every_way_in(tiny_bundle: Path, threads: int) -> None:
    with pytest.raises(ConfigError, match="threads is out of range"):
        load(tiny_bundle, device="cpu", threads=threads)
    with pytest.raises(ConfigError, match="threads is out of range"):
        Options(threads=threads)


def test_more_threads_than_cores_answer(tiny_bundle: Path) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    texts = set()
    for threads in (1, MOST):
        model = load(tiny_bundle, device="cpu", threads=threads)
        texts.add(model.generate(model.encode(picture), "describe", max_tokens=4).read())
    assert len(texts) == 1
