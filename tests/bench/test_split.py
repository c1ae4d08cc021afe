"""The projections' share of the vision graph: on profiles made by hand, and on ONNX Runtime's."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from himix_edge.bench import split
from himix_edge.bench.split import projection_share, share_of_profile
from himix_edge.config import HiMixConfig
from himix_edge.contract import Manifest
from tests.bench.conftest import CONFIG

# CONFIG: N = 4; 2 layers x key and value x 2 heads x 8 = 64 wide
Node = tuple[str, list[int], int]  # operator, shape of its output, microseconds
ENCODER: list[Node] = [("MatMul", [1, 5, 64], 300), ("Gelu", [1, 5, 64], 100)]


def profile(*runs: list[Node]) -> list[dict[str, Any]]:
    """What ONNX Runtime writes, in no order."""
    events: list[dict[str, Any]] = [{"cat": "Session", "name": "session_initialization", "ts": 0}]
    now = 1000
    for run in runs:
        start = now
        for operator, shape, duration in run:
            arguments = {"op_name": operator, "output_type_shape": [{"float": shape}]}
            name = f"{operator}_kernel_time"
            event = {"cat": "Node", "name": name, "ts": now, "dur": duration, "args": arguments}
            events.append(event)
            now += duration
        events.append({"cat": "Session", "name": "model_run", "ts": start, "dur": now - start})
        now += 50
    return events[::-1]


@pytest.mark.parametrize(
    ("tail", "share"),
    [
        ([("MatMul", [1, 4, 64], 80), ("Transpose", [4, 1, 2, 4, 8], 20)], 0.2),
        ([("MatMulIntegerToFloat", [1, 4, 64], 100)], 0.2),
        ([("DynamicQuantizeLinear", [1, 4, 32], 10), ("FusedGemm", [4, 64], 90)], 90 / 500),
        ([("MatMul", [1, 4, 16], 25), ("Cast", [1], 5), ("MatMul", [1, 4, 48], 70)], 0.2),
    ],
    ids=["one product", "in int8", "codes first", "several"],
)
def test_from_the_last_products_on(tail: list[Node], share: float) -> None:
    first = [("MatMul", [1, 4, 64], 10_000)]  # plans, and doesn't count
    found = share_of_profile(profile(first, ENCODER + tail, ENCODER + tail), CONFIG)
    assert found == pytest.approx(share, rel=0, abs=1e-12)


def test_a_connector_of_the_projections_is_part_of_them() -> None:
    projection = dataclasses.replace(CONFIG.projection, connector_size=24)
    config = dataclasses.replace(CONFIG, projection=projection)
    tail = [("MatMul", [1, 4, 24], 30), ("Gelu", [1, 4, 24], 5), ("MatMul", [1, 4, 24], 45)]
    run = [*ENCODER, *tail, ("MatMul", [1, 4, 64], 20)]
    found = share_of_profile(profile(run, run), config)
    assert found == pytest.approx(100 / 500, rel=0, abs=1e-12)


def test_the_median_of_the_runs() -> None:
    runs = [[*ENCODER, ("MatMul", [1, 4, 64], taken)] for taken in (9, 100, 400, 200)]
    assert share_of_profile(profile(*runs), CONFIG) == pytest.approx(200 / 600, rel=0, abs=1e-12)


@pytest.mark.parametrize(
    "nodes",
    [
        ENCODER,
        [*ENCODER, ("MatMul", [1, 4, 60], 10)],
        [("MatMul", [1, 4, 60], 10)],
        [("Conv", [1, 4, 64], 10)],
        [],
    ],
)
def test_no_guesses(nodes: list[Node]) -> None:
    assert share_of_profile(profile(nodes, nodes, nodes), CONFIG) is None


def test_a_real_graph(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Manifest.read(tiny_bundle).config
    seen: list[list[dict[str, Any]]] = []

    def watched(events: list[dict[str, Any]], of: HiMixConfig) -> float | None:
        seen.append(events)
        return share_of_profile(events, of)

    monkeypatch.setattr(split, "share_of_profile", watched)
    share = projection_share(tiny_bundle, config, np.zeros((1, 3, 28, 28), np.float32), threads=1)
    assert share is not None
    assert 0 < share < 0.5
    [events] = seen
    products = [
        (event["ts"], math.prod(next(iter(event["args"]["output_type_shape"][0].values()))))
        for event in events
        if event.get("cat") == "Node"
        and event["name"].endswith("_kernel_time")
        and "MatMul" in event["args"]["op_name"]
    ]
    assert len(products) % (1 + split.RUNS) == 0
    decoder = config.decoder
    width = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
    assert max(products)[1] == config.vision.num_image_tokens * width  # of the last that ran
