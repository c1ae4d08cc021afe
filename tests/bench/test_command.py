"""`himix-edge bench`, as a user meets it, and on a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from himix_edge.bench import measure
from himix_edge.bench.cold import ColdStart, cold_start, peak_bytes
from himix_edge.bench.limits import Limits
from himix_edge.contract import Manifest
from himix_edge.errors import EngineError

DEVICE = """
import sys
for name in ("torch", "transformers", "onnx", "onnxscript", "matplotlib"):
    sys.modules[name] = None
from himix_edge.bench import limits, measure
from himix_edge.__main__ import main
limits.BUFFER_BYTES, measure.COLD_STARTS = 1 << 20, 1
main()
"""


def test_a_device_measures_both(tiny_bundle: Path) -> None:
    arguments = ["bench", str(tiny_bundle), "--vs", "vanilla", "--text", "9", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, "-c", DEVICE, *arguments, "--threads", "1", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    manifest = Manifest.read(tiny_bundle)
    assert found["bundle"]["sha256"] == {n: r.sha256 for n, r in manifest.files.items()}
    assert found["setting"] == {
        "image": None,
        "image_tokens": 4,
        "text_tokens": 9,
        "long_text_tokens": 256 - 4 - 16,
        "decoded_tokens": 16,
        "threads": 1,
        "device": "cpu",
        "vs": "vanilla",
    }
    assert found["rounds"]["measured"] == 2
    assert 0 < found["projection_share"] < 1
    assert all(limit["min"] > 0 for limit in found["limits"].values())
    for name in ("himix", "vanilla"):
        candidate = found["candidates"][name]
        for sample in found["samples"]["rounds"]:
            timing = sample["timings"][name]
            parts = timing["preprocess"] + timing["encode"] + timing["prefill"]
            assert timing["first_token"] == pytest.approx(parts, rel=1e-9, abs=0)
        [start] = found["samples"]["cold_starts"][name]
        assert min(start.values()) > 0
        assert candidate["peak_bytes"] == start["peak_bytes"] > 30e6


def test_what_a_fresh_process_says(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"a fresh process .*ImageError: .*gone.png"):
        cold_start(tiny_bundle, tmp_path / "gone.png", 9, "himix", None)


def test_peak_memory_grows() -> None:
    before = peak_bytes()
    held = b"x" * 80_000_000
    after = peak_bytes()
    assert before is not None
    assert after is not None
    assert before < 40e12
    assert after >= len(held)


def test_the_rounds_and_what_is_printed(
    himix: Any, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "cold_start", lambda *_: ColdStart(1, 2, 3, None))
    monkeypatch.setattr(measure, "LimitMeter", NoMeter)
    monkeypatch.setattr("himix_edge.bench.limits.SETTLED", 0)
    plot = tmp_path / "a.svg"
    done = himix("bench", tiny_bundle, "--rounds", 1, "--threads", 1, "--plot", plot)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "tiny: portable, float32"
    assert lines[1] == "4 image and 64 text tokens, 1 rounds, threads: 1"
    for label in ("vision encoder", "projections to keys", "prefill", "time to first token"):
        assert sum(line.startswith(label) for line in lines) >= 1
    assert "Vanilla" not in done.out
    assert "\x1b" not in done.out
    assert plot.read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        (["--rounds", 0], ["rounds is out of range", "1 or more"]),
        (["--threads", 0], ["threads is out of range", "from 1 to"]),
        (["--threads", 99_999_999_999], ["threads is out of range", "from 1 to"]),
        (["--vs", "vanila"], ["'vanila'", "did you mean 'vanilla'?"]),
        (["--device", "cuda"], ["'cuda'", "--device cpu"]),
        (["--plot", "a.gif"], ["a.gif", ".png or .svg"]),
    ],
)
def test_options_are_checked_first(
    himix: Any, tmp_path: Path, options: Sequence[object], saying: Sequence[str]
) -> None:
    done = himix("bench", tmp_path / "no-bundle", *options)
    refused(done, saying)
    assert "no-bundle" not in done.err


def test_no_bundle(himix: Any, tmp_path: Path) -> None:
    refused(himix("bench", tmp_path), ["is not a bundle", "himix-edge export"])


def test_pictures_and_texts_that_cannot_be(
    himix: Any, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "LimitMeter", NoMeter)
    (tmp_path / "a.png").write_text("no picture")
    refused(himix("bench", tiny_bundle, "--image", tmp_path / "a.png"), ["a.png can't be read"])
    refused(himix("bench", tiny_bundle, "--image", tmp_path / "b.png"), ["b.png can't be read"])
    refused(himix("bench", tiny_bundle, "--text", 240), ["at most 239", "smaller --text"])
    refused(himix("bench", tiny_bundle, "--text", 0), ["text is out of range"])
    done = himix("bench", tiny_bundle, "--text", 236, "--vs", "vanilla")
    refused(done, ["at most 235", "leave out --vs"])


def test_no_other_design(himix: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    manifest = Manifest.read(tiny_bundle)
    vanilla = dataclasses.replace(
        manifest, config=dataclasses.replace(manifest.config, design="vanilla")
    )
    monkeypatch.setattr(Manifest, "read", classmethod(lambda *_: vanilla))
    refused(himix("bench", tiny_bundle), ["found vanilla", "--vs vanilla"])


class NoMeter:
    """The machine's limits without their sessions."""

    def __init__(self, threads: int | None) -> None:
        pass

    def measure(self) -> Limits:
        return Limits(1e9, 1e9, 1e9)

    def close(self) -> None:
        pass


def refused(done: Any, saying: Sequence[str]) -> None:
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("Error: ")
    assert done.err.count("\n") == 1
    for words in saying:
        assert words in done.err
