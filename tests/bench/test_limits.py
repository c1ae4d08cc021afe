"""The machine's limits: that the graphs multiply what they say, that rates are what was timed."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest

from himix_edge.bench import limits
from himix_edge.bench.product_graphs import (
    DEPTH,
    FP32_GRAPH,
    HALF,
    INT8_GRAPH,
    MODULUS,
    STEP,
    WIDTH,
    product_graph,
)

GRAPHS = {"fp32": FP32_GRAPH, "int8": INT8_GRAPH}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graphs_are_what_the_script_makes(name: str) -> None:
    assert onnx.load(GRAPHS[name]) == product_graph(int8=name == "int8")
    assert GRAPHS[name].stat().st_size < 2048


@pytest.mark.parametrize("name", GRAPHS)
def test_the_products_are_exact_and_of_packed_weights(name: str, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    session = onnxruntime.InferenceSession(
        GRAPHS[name], options, providers=["CPUExecutionProvider"]
    )
    folded = onnx.load(tmp_path / "folded.onnx")
    [product] = folded.graph.node  # nothing else is left to do in a run
    assert product.input[1] in {weight.name for weight in folded.graph.initializer}

    x = np.random.default_rng(1).integers(0, 128, (3, DEPTH))
    index = np.arange(DEPTH * WIDTH).reshape(DEPTH, WIDTH)
    weight = index * STEP % MODULUS - HALF  # in int64
    kind = np.uint8 if name == "int8" else np.float32
    [found] = session.run(None, {"x": x.astype(kind)})
    assert found.dtype == (np.int32 if name == "int8" else np.float32)
    assert np.abs(weight).max() == HALF
    np.testing.assert_array_equal(found.astype(np.int64), x @ weight)  # below 2^24: exact in fp32


class Idle:
    """A session that does nothing."""

    def run(self, outputs: None, inputs: object) -> None:
        pass


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_session", lambda *_: Idle())
    monkeypatch.setattr(limits, "BUFFER_BYTES", 4000)
    monkeypatch.setattr(limits, "SETTLED", 0)


@pytest.mark.usefixtures("idle")
def test_rates_are_work_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = limits.LimitMeter(threads=1)
    durations = itertools.chain(
        (0.5, 0.25, 3.0, 0.75),  # of reading
        (9.0, 8.0, 2.0, 7.0),  # of the product in fp32
        (0.01, 0.004, 0.01, 0.005, 0.005, 0.017),  # and in int8: 4 are not 0.05 s yet
    )
    clock = itertools.accumulate(itertools.chain.from_iterable((1.0, d) for d in durations))
    monkeypatch.setattr("himix_edge.bench.limits.time.perf_counter", lambda: next(clock))
    found = meter.measure()
    meter.close()
    operations = 2 * 256 * 1024 * 4096
    expected = (4000 / 0.25, operations / 2.0, operations / 0.004)
    assert dataclasses.astuple(found) == pytest.approx(expected, rel=1e-9, abs=0)
    with pytest.raises(StopIteration):
        next(clock)


@pytest.mark.usefixtures("idle")
def test_every_thread_reads_its_own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(limits, "_largest", lambda part: read.append(part.size))
    meter = limits.LimitMeter(threads=3)
    meter._read()
    meter.close()
    assert sorted(read) == [333, 333, 334]
