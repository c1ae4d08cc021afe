"""A measurement whose every figure is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from himix_edge.bench.candidates import Plan, Timing
from himix_edge.bench.cold import ColdStart
from himix_edge.bench.limits import Limits
from himix_edge.bench.measure import Measurement, Options, Round
from himix_edge.config import DecoderConfig, HiMixConfig, PreprocessConfig, VisionConfig
from himix_edge.contract import SCHEMA_VERSION, Chat, FileRecord, Manifest

CONFIG = HiMixConfig(
    VisionConfig(28, 14, 32, 64, 2, 4),
    DecoderConfig(300, 32, 64, 2, 4, 2, 8, 256, eos_token_ids=(0,)),
    PreprocessConfig(28),
)
QUIET, BUSY = Limits(40e9, 400e9, 1600e9), Limits(40e9, 200e9, 1600e9)


def himix_timing(factor: float) -> Timing:
    return Timing(*(factor * ms for ms in (2.0, 10.0, 8.0, 20.0, 3.0, 2.5, 4.0)))


def vanilla_timing(factor: float) -> Timing:
    return Timing(*(factor * ms for ms in (2.0, 10.0, 38.0, 50.0, 3.0, 2.5, 5.0)))


@pytest.fixture
def measured() -> Measurement:
    """Four rounds, the last of them (ten times as slow) on a busy machine."""
    rounds = [
        Round({"himix": himix_timing(f), "vanilla": vanilla_timing(f)}, 6.4 * f)
        for f in (1, 3, 2, 10)
    ]
    files = {
        "vision.onnx": FileRecord("a", 1_000),
        "vision.onnx.data": FileRecord("b", 100_000),
        "decoder.onnx": FileRecord("c", 2_000),
        "decoder.onnx.data": FileRecord("d", 200_000),
        "tokenizer.json": FileRecord("e", 5_000_000),
    }
    manifest = Manifest(
        SCHEMA_VERSION,
        "tiny",
        "",
        "portable",
        "float32",
        CONFIG,
        Chat(),
        files,
        {},
        {},
    )
    return Measurement(
        Path("tiny"),
        manifest,
        Options(vs="vanilla", threads=2, text=64, rounds=4),
        Plan([1] * 600, 64, 200, vanilla=True),
        rounds,
        [QUIET, QUIET, QUIET, QUIET, BUSY],
        projection_share=0.2,
        cold={
            "himix": [ColdStart(100, 40, 60, 900), ColdStart(110, 60, 70, 1000)],
            "vanilla": [ColdStart(100, 40, 90, None), ColdStart(100, 40, 90, None)],
        },
    )
