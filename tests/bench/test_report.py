"""The figures of a report and the words of its text, all from known measurements."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from himix_edge.bench.bounds import floors
from himix_edge.bench.measure import Measurement
from himix_edge.bench.report import phase_samples, report
from himix_edge.bench.show import text
from himix_edge.bundle.quality import Feature, Quality, Way
from himix_edge.contract import Quantization
from tests.bench.conftest import BUSY, QUIET, himix_timing, vanilla_timing


@pytest.fixture
def found(measured: Measurement) -> dict[str, Any]:
    return report(measured)


def spread(phase: dict[str, float]) -> tuple[float, ...]:
    return tuple(round(phase[name], 9) for name in ("min", "median", "max"))


def test_a_busy_round_is_left_out_and_said(found: dict[str, Any]) -> None:
    rounds = found["rounds"]
    assert rounds == {"measured": 4, "used": [0, 1, 2], "contended": [3], "warning": ""}
    assert "kept the machine busy, left out: 4" in text(found)
    assert "Warning" not in text(found)


def test_the_phases(found: dict[str, Any]) -> None:
    himix, vanilla = (found["candidates"][name]["phases_ms"] for name in ("himix", "vanilla"))
    assert {phase: spread(figures) for phase, figures in himix.items()} == {
        "preprocess": (2, 4, 6),
        "vision": (8, 16, 24),  # 10 x 0.8
        "projection": (2, 4, 6),
        "prefill": (8, 16, 24),
        "first_token": (20, 40, 60),
        "first_decode": (3, 6, 9),
        "decode_short": (2.5, 5, 7.5),
        "decode_long": (4, 8, 12),
    }
    assert {phase: spread(figures) for phase, figures in vanilla.items()} == {
        "preprocess": (2, 4, 6),
        "vision": (8, 16, 24),
        "prefill": (38, 76, 114),
        "first_token": (48, 96, 144),  # 50 less the projections that it hasn't got
        "first_decode": (3, 6, 9),
        "decode_short": (2.5, 5, 7.5),
        "decode_long": (5, 10, 15),
    }


def test_an_unknown_share(measured: Measurement) -> None:
    himix = phase_samples([himix_timing(1)], "himix", None)
    assert (himix["vision"], himix["first_token"]) == ([10], [20])
    assert "projection" not in himix
    vanilla = phase_samples([vanilla_timing(1)], "vanilla", None)
    assert (vanilla["vision"], vanilla["first_token"]) == ([10], [50])
    found = report(dataclasses.replace(measured, projection_share=None))
    assert found["projection_share"] is None
    assert "can't be told" in text(found)


def test_floors_are_at_the_best_rates(measured: Measurement, found: dict[str, Any]) -> None:
    for name in ("himix", "vanilla"):
        phases = found["candidates"][name]["phases_ms"]
        least = floors(measured, name, QUIET)
        assert {phase for phase in phases if "floor" in phases[phase]} == set(least)
        for phase, floor in least.items():
            figures = phases[phase]
            assert figures["floor"] == dataclasses.asdict(floor)
            for kind in ("fp32", "int8"):
                over = figures["median"] / getattr(floor, kind)
                assert figures["over"][kind] == pytest.approx(over, rel=1e-12, abs=0)


def test_the_limits_and_their_spread(found: dict[str, Any]) -> None:
    fp32 = {"best": QUIET.fp32, "min": BUSY.fp32, "median": QUIET.fp32, "max": QUIET.fp32}
    assert found["limits"]["fp32"] == fp32
    assert "40.0 GB/s read, 400 GFLOP/s in fp32, 1600 GOP/s in int8" in text(found)


def test_rates_ratios_and_cold_starts(found: dict[str, Any]) -> None:
    himix, vanilla = found["candidates"]["himix"], found["candidates"]["vanilla"]
    assert spread(himix["tokens_per_second"]["short"]) == (round(1e3 / 7.5, 9), 200, 400)
    assert spread(himix["tokens_per_second"]["long"]) == (round(1e3 / 12, 9), 125, 250)
    assert spread(found["text_only_prefill_ms"]) == (6.4, 12.8, 19.2)
    assert found["ratios"] == pytest.approx(
        {
            "prefill_to_text_only": 16 / 12.8,
            "vanilla_to_himix_first_token": 96 / 40,
            "vanilla_to_himix_prefill": 76 / 16,
            "vanilla_to_himix_decode_short": 1,
            "vanilla_to_himix_decode_long": 10 / 8,
        },
        rel=1e-12,
        abs=0,
    )
    assert spread(himix["cold_start_ms"]["total"]) == (200, 220, 240)
    assert spread(himix["cold_start_ms"]["answer"]) == (60, 65, 70)
    assert (himix["peak_bytes"], vanilla["peak_bytes"]) == (1000, None)


def test_it_is_json_and_holds_every_sample(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert len(found["samples"]["rounds"]) == 4
    assert found["samples"]["rounds"][3]["timings"]["vanilla"]["prefill"] == 380
    assert found["samples"]["limits"][4] == dataclasses.asdict(BUSY)
    assert found["bundle"]["sha256"]["decoder.onnx.data"] == "d"
    assert set(found["versions"]) >= {"himix-edge", "onnxruntime", "numpy"}


def test_the_text(found: dict[str, Any]) -> None:
    said = text(found).splitlines()
    assert said[0] == "tiny: portable, float32"
    assert said[1] == "4 image and 64 text tokens, 4 rounds, threads: 2"
    [row, other] = [line.split() for line in said if line.startswith("prefill  ")]
    assert row[1:4] == ["16.00", "8.00", "24.00"]
    assert other[1:4] == ["76.00", "38.00", "114.00"]
    assert row[4] == f"{found['candidates']['himix']['phases_ms']['prefill']['floor']['fp32']:.2f}"
    assert "HiMix: tokens a second 200.0 after 64 text tokens, 125.0 after 200 text tokens" in (
        "\n".join(said)
    )
    assert "vanilla takes 2.40 x HiMix's time to the first token, 4.75 x its prefill" in said


def test_quality_stands_beside_every_time(measured: Measurement) -> None:
    def way(text: str, growth: float) -> Way:
        return Way(text, "nothing", "decoder.onnx", 99, 20.0, 20 * (1 + growth), 0.01, 0.95)

    ways = (way("prompts of 32 tokens", 0.012), way("token by token", 0.034))
    quality = Quality("a text", "", 0.1, "kept", "", ways)
    cost = {
        "quality": dataclasses.asdict(quality),
        "vision": {"present.0.key": dataclasses.asdict(Feature(0.01, 0.999, 0.9912, 3))},
    }
    how = Quantization("int8", "int8", None, None, json.loads(json.dumps(cost)))
    manifest = dataclasses.replace(measured.manifest, quantization=how)
    found = report(dataclasses.replace(measured, manifest=manifest))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    said = text(found)
    assert "perplexity +3.4 % at worst (token by token, nothing in the cache)" in said
    rows = [line for line in said.splitlines() if line.startswith(("prefill  ", "a later token"))]
    assert [row.split("perplexity ")[1] for row in rows[:3]] == ["+1.2 %", "+3.4 %", "+3.4 %"]
    [vision, *_] = [line for line in said.splitlines() if line.startswith("vision encoder")]
    assert vision.endswith("cosine 0.9912")
    unjudged = dataclasses.replace(manifest, quantization=dataclasses.replace(how, cost={}))
    said = text(report(dataclasses.replace(measured, manifest=unjudged)))
    assert "quality not measured" in said
    assert said.count("not judged") >= 4


def test_where_no_round_is_quiet_the_text_warns(measured: Measurement) -> None:
    limits = [QUIET, BUSY, QUIET, BUSY, QUIET]
    found = report(dataclasses.replace(measured, limits=limits))
    assert found["rounds"]["used"] == [0, 1, 2, 3]
    assert "counted all the same: 1, 2, 3, 4" in text(found)
    assert "Warning: the machine was busy in every round" in text(found)
