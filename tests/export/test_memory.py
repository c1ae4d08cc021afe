"""An export takes far less memory than the model; only its check holds the model, once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# In a process of its own: what other tests have freed would hide what this one takes.
EXPORT = """
import dataclasses, json, sys, tempfile
from pathlib import Path
from himix_edge.export.bundle import export_bundle
from himix_edge.models.standin import random_checkpoint
from tests.tiny import tiny_config

config = tiny_config(
    vocab_size=30_000, hidden_size=1024, intermediate_size=16_000, num_hidden_layers=1,
    num_attention_heads=4, head_dim=64,
)
checkpoint = random_checkpoint("large", config)
sizes = [4 * weight.read().numel() for weight in checkpoint.weights.values()]
with tempfile.TemporaryDirectory() as folder:
    exported = export_bundle(checkpoint, Path(folder) / "bundle")
peaks = {cost.phase: cost.peak_bytes for cost in exported.costs}
making, checking = exported.making.peak_bytes, exported.checking.peak_bytes
json.dump([sum(sizes), max(sizes), peaks, making, checking], sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells a phase's own peak")
def test_peaks_of_an_export() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXPORT], stdout=subprocess.PIPE, check=True, timeout=300
    )
    weights, largest, peaks, making, checking = json.loads(done.stdout)
    assert weights > 300e6
    assert largest < 0.4 * weights
    before = peaks["vision graph"]  # what torch and its exporter take; the encoder is tiny
    assert making - before < 1.7 * largest  # one weight at a time
    # The model in torch, and then the graph in ONNX Runtime; never both.
    assert weights < checking - before < 1.7 * weights
