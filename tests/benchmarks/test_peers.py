"""The comparison with peers: what its tables say follows from its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.peers import make, make_weights, plot
from benchmarks.peers.__main__ import bundles_of
from benchmarks.peers.contestants import HERE, Contestant, encoders, pair
from benchmarks.peers.crew import PeerError, crew
from benchmarks.peers.measure import prefill_and_decode
from benchmarks.peers.report import fastest_encoder, first_tokens, markdown, median

FAKE = """
class Decoder:
    def __init__(self, first):
        self.first = first
    def answer(self, ids, tokens):
        if len(ids) > 100:
            raise ValueError("too long")
        return [self.first + 0.5 * i for i in range(tokens)]
class Encoder:
    def encode(self):
        print("noise on stdout")
        return {"preprocess": 0.25}
"""


def contestant(peer: str, encoder: str, **samples: list[float]) -> dict[str, Any]:
    """As results.json has it; `prefill_196` stands for "prefill 196"."""
    rounds = zip(*samples.values(), strict=True)
    names = [name.replace("_", " ") for name in samples]
    roles = ["encode"] if "encode" in samples else []
    roles += ["answer"] if any(name.startswith("prefill") for name in samples) else []
    found = [dict(zip(names, values, strict=True)) for values in rounds]
    return {"peer": peer, "encoder": encoder, "roles": roles, "load": 1.0, "samples": found}


@pytest.fixture
def group() -> dict[str, Any]:
    """Three rounds, of which the middle one was contended."""
    limit = {"bandwidth": 2e10, "fp32": 3e11, "int8": 6e11}
    ours = contestant(
        "HiMix",
        "tinyclip",
        preprocess=[0.01, 9, 0.03],
        vision=[0.1, 9, 0.1],
        encode=[0.11, 9, 0.13],
        prefill_196=[0.05, 9, 0.07],
        decode_196=[0.01, 9, 0.01],
    )
    slow = contestant("GenAI", "", prefill_196=[0.9, 9, 0.7], decode_196=[0.02, 9, 0.02])
    fast = contestant("llama.cpp", "", prefill_196=[0.4, 9, 0.4], decode_196=[0.04, 9, 0.04])
    return {
        "limits": [limit] * 4,
        "rounds": {"used": [0, 2], "contended": [1], "warning": ""},
        "contestants": {
            "HiMix tinyclip-int4": ours,
            "GenAI int4": slow,
            "llama.cpp Q4_0": fast,
            "tinyclip: ORT fp32": contestant("GenAI", "tinyclip", encode=[0.3, 0.01, 0.3]),
            "tinyclip: ORT int8": contestant("GenAI", "tinyclip", encode=[0.2, 9, 0.2]),
            "tinyclip: OpenVINO": contestant("OpenVINO", "tinyclip", encode=[0.1, 9, 0.1]),
        },
    }


@pytest.fixture
def results(group: dict[str, Any]) -> dict[str, Any]:
    start = {"load": 0.5, "total": 1.25, "peak_mb": 700.0}
    return {
        "cpu": "a CPU",
        "threads": 2,
        "text_tokens": 64,
        "versions": {"genai": {"onnxruntime-genai": "0.18.0"}},
        "classes": {"int4": group},
        "cold": {"int4": {"tinyclip: GenAI int4": {"process": "both", "starts": [start] * 3}}},
        "failed": {"OpenVINO int4": "ImportError: no openvino"},
    }


def test_a_contended_round_does_not_count(group: dict[str, Any]) -> None:
    assert median(group, "GenAI int4", "prefill 196") == pytest.approx(0.8, rel=0, abs=1e-12)


def test_a_peer_has_its_own_fastest_encoder_or_else_anyones(group: dict[str, Any]) -> None:
    assert fastest_encoder(group, "tinyclip", "GenAI") == "tinyclip: ORT int8"
    assert fastest_encoder(group, "tinyclip", "llama.cpp") is None
    assert fastest_encoder(group, "tinyclip") == "tinyclip: OpenVINO"  # nor HiMix's own
    assert fastest_encoder(group, "siglip") is None


def test_first_tokens_add_up(group: dict[str, Any]) -> None:
    rows = first_tokens(group, "tinyclip")
    assert [row.name for row in rows] == ["HiMix tinyclip-int4", "llama.cpp Q4_0", "GenAI int4"]
    assert [row.form for row in rows] == ["its own", "OpenVINO", "ORT int8"]
    totals = [row.total for row in rows]  # preprocess 0.02 each, in the middle
    assert totals == pytest.approx([0.18, 0.52, 1.02], rel=0, abs=1e-12)
    assert first_tokens(group, "siglip") == []


def test_the_tables_hold_ratios_rates_and_failures(results: dict[str, Any]) -> None:
    text = markdown(results)
    assert "2 rounds count, 1 were contended" in text
    assert "| llama.cpp Q4_0 | OpenVINO | 20.0 | 100.0 | 400.0 | 520.0 | 2.89 |" in text
    assert "The best peer takes 2.89 x HiMix's time" in text
    assert "| HiMix tinyclip-int4 | 60 | 100.0 |" in text  # prefill ms, tokens a second
    assert "| tinyclip: GenAI int4 | both | 0.50 | 1.25 | 700 |" in text
    assert "- OpenVINO int4: ImportError: no openvino" in text


def test_the_plot_has_a_line_a_decoder_and_a_bar_a_pair(results: dict[str, Any]) -> None:
    left, right = plot.figure(results, "int4").axes
    points = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in left.lines}
    assert points["llama.cpp Q4_0"] == pytest.approx([400], rel=0, abs=1e-9)
    assert points["HiMix int4"] == pytest.approx([60], rel=0, abs=1e-9)
    totals = [text.get_text().strip() for text in right.texts]
    assert totals == ["180", "520", "1020"]


def test_decoding_is_timed_after_the_first_token() -> None:
    assert prefill_and_decode([1.0, 1.5, 2.5], 729) == {"prefill 729": 1.0, "decode 729": 0.75}
    assert prefill_and_decode([1.0], 0) == {"prefill 0": 1.0}


def test_a_pair_lives_in_one_process() -> None:
    decoder = Contestant("d", "GenAI", ("int4",), "genai", {"answer": ("a", "A", {})})
    form = next(c for c in encoders(Path("models")) if c.name == "tinyclip: ONNX Runtime int8")
    assert set(pair(decoder, form).roles) == {"encode", "answer"}
    assert pair(decoder, None).roles == decoder.roles


def test_bundles_have_a_known_name_and_are_there(tmp_path: Path) -> None:
    assert bundles_of([f"siglip-int8={tmp_path}"]) == {"siglip-int8": tmp_path}
    for wrong in (f"siglip-int3={tmp_path}", f"siglip-int8={tmp_path / 'none'}"):
        with pytest.raises(ValueError, match="expected NAME=FOLDER"):
            bundles_of([wrong])


def test_encoders_stop_before_the_layers_that_no_model_uses() -> None:
    assert make.encoder_config("tinyclip")["num_hidden_layers"] == 11
    assert make.encoder_config("siglip")["num_hidden_layers"] == 26
    assert make.decoder_config()["eos_token_id"] == 151645


def test_what_cannot_be_made_is_noted(tmp_path: Path) -> None:
    said: list[str] = []
    failures = make.make(tmp_path / "envs", tmp_path / "models", said.append)
    assert failures == len(make.noted(tmp_path / "models")) == len(make.recipes(tmp_path, tmp_path))
    assert "No such file" in make.noted(tmp_path / "models")["making hf"]
    assert [entry.name for entry in (tmp_path / "models").iterdir()] == [make.FAILURES]


def test_every_requirement_is_pinned() -> None:
    for name in make.ENVIRONMENTS:
        lines = (HERE / "requirements" / f"{name}.txt").read_text().splitlines()
        assert lines
        assert all(line.count("==") == 1 for line in lines)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Contestant:
    """A contestant of no peer, run by this Python."""
    (tmp_path / "on_fake.py").write_text(FAKE)
    monkeypatch.setattr("benchmarks.peers.crew.IMPORTED", str(tmp_path))
    roles: dict[str, Any] = {
        "answer": ("on_fake", "Decoder", {"first": 2.0}),
        "encode": ("on_fake", "Encoder", {}),
    }
    return Contestant("fake", "HiMix", ("int4",), "", roles, "tinyclip")


def test_a_worker_obeys_wakes_and_reports_errors(fake: Contestant, tmp_path: Path) -> None:
    failed: dict[str, str] = {}
    broken = Contestant("broken", "GenAI", ("int4",), "", {"answer": ("on_none", "Decoder", {})})
    absent = Contestant("absent", "GenAI", ("int4",), "none", {})
    with crew([broken, absent, fake], tmp_path, tmp_path / "logs", failed) as workers:
        (worker,) = workers
        with worker.awake():
            assert worker.ask("answer", prompt=3, tokens=2) == {"stamps": [2.0, 2.5]}
            encoded = worker.ask("encode", runs=2)
            assert encoded["preprocess"] == [0.25, 0.25]
            assert len(encoded["encode"]) == 2
            with pytest.raises(PeerError, match="ValueError: too long"):
                worker.ask("answer", prompt=101, tokens=2)
    assert failed["broken"] == "ModuleNotFoundError: No module named 'on_none'"
    assert "No such file" in failed["absent"]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_encoder_is_read_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    config = {
        "image_size": 28,
        "patch_size": 14,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    made, file = make_weights.Encoder(kind, config, 12).eval(), tmp_path / "fp32.safetensors"
    make_weights.save_encoder(file, made, kind, config, 12)
    pixels = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = made(pixels)
        assert expected.shape == (1, 4, 12)
        assert torch.equal(make_weights.read_encoder(file)(pixels), expected)
