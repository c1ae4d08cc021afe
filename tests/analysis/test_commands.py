"""`himix-edge flops` and `himix-edge models`, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from himix_edge.analysis import costs, paper, sizes
from himix_edge.analysis.report import DESIGNS, pair_config
from himix_edge.presets import DECODERS, ENCODERS


def rows_of(text: str, label: str) -> list[list[str]]:
    """The figures of each row of that label."""
    return [line.removeprefix(f"  {label} ").split() for line in text.splitlines() if label in line]


def test_flops_of_a_pair(himix: Any) -> None:
    done = himix("flops", "--encoder", "tinyclip-39m", "--decoder", "llama-3.2-1b", "--text", 20)
    assert (done.code, done.err) == (0, "")
    assert "tinyclip-39m + llama-3.2-1b: 196 image and 20 text tokens" in done.out
    assert "\x1b" not in done.out  # no colours into a pipe
    configs = [pair_config("tinyclip-39m", "llama-3.2-1b", design) for design in DESIGNS]
    spent = [costs.cost(config, 20) for config in configs]
    for label, values in (
        ("encoder", [cost.encoder for cost in spent]),
        ("connectors", [cost.connectors for cost in spent]),
        ("image to keys and values", [cost.projections for cost in spent]),
        ("attention", [cost.attention for cost in spent]),
        ("FFN", [cost.ffn for cost in spent]),
        ("decoder", [cost.decoder for cost in spent]),
        ("total, last token's logits only", [cost.total_as_run for cost in spent]),
    ):
        shown = [f"{value.total / 1e9:,.2f}" for value in values]
        assert shown in rows_of(done.out, label)
    counts = [f"{sizes.parameters(config).total / 1e6:,.1f}" for config in configs]
    assert rows_of(done.out, "parameters (M)") == [counts]
    assert rows_of(done.out, "  of the image") == [["6.4"] * 4]  # 2 * 16 * 8 * 64 * 196 * 2 bytes


def test_flops_of_a_pair_as_json(himix: Any) -> None:
    done = himix("flops", "--decoder", "llama-3.2-3b", "--image-tokens", 728, "--json")
    found = json.loads(done.out)
    assert found["encoder"] == "siglip-so400m-384"
    assert (found["text_tokens"], found["image_tokens"]) == (64, 728)
    assert list(found["designs"]) == list(DESIGNS)
    for design in DESIGNS:
        config = pair_config("siglip-so400m-384", "llama-3.2-3b", design)
        cost, shown = costs.cost(config, 64, 728), found["designs"][design]
        assert shown["flops"]["decoder"] == cost.decoder.total
        assert shown["of_them_matmul"]["decoder"] == cost.decoder.matmul
        assert shown["flops"]["total"] == cost.total.total
        assert shown["flops"]["head"] == cost.head.total
        assert shown["flops"]["total_last_logits"] == cost.total_as_run.total
        assert shown["parameters"]["injection"] == sizes.injection_parameters(config)
        assert shown["bytes_fp16"] == {
            "weights": 2 * sizes.parameters(config).total,
            "kv_cache": 2 * 28 * 8 * 128 * 792 * 2,
            "kv_cache_image": 2 * 28 * 8 * 128 * 728 * 2,
        }
    assert round(found["designs"]["vanilla"]["flops"]["decoder"] / 1e10) == 531  # Table 3: 5310
    assert round(found["designs"]["himix"]["flops"]["decoder"] / 1e9) == 525


def test_the_papers_tables(himix: Any) -> None:
    done = himix("flops", "--paper")
    assert (done.code, done.err) == (0, "")
    for number in ("1", "2", "3, 4", "5", "6", "8", "9", "10"):
        assert f"Table {number}\n" in done.out
    cells = paper.cells()
    differing = [cell for cell in cells if not cell.agrees]
    assert done.out.count("differs (") == len(differing)
    assert f"{len(cells) - len(differing)} of {len(cells)} figures" in done.out
    assert "Max VRAM" in done.out
    assert ["92", "89.5", "-2.5", "differs", "(1)"] in [
        line.split()[-5:] for line in done.out.splitlines()
    ]
    assert "(1) 33 text tokens in place of 32 would give it (91.7)" in done.out


def test_the_papers_tables_as_json(himix: Any) -> None:
    cells = json.loads(himix("flops", "--paper", "--json").out)["cells"]
    assert len(cells) == len(paper.cells())
    [cell] = [c for c in cells if c["table"] == "5" and c["paper"] == 92]
    assert cell["row"] == "TinyLlama-1.1B +HiMix"
    assert not cell["within_rounding"]
    assert cell["difference"] == cell["ours"] - 92
    assert all(c["reason"] for c in cells if not c["within_rounding"])


def test_a_plot(himix: Any, tmp_path: Path) -> None:
    path = tmp_path / "costs.png"
    done = himix("flops", "--decoder", "qwen2-0.5b", "--plot", path)
    assert done.code == 0
    with Image.open(path) as picture:
        assert picture.size == (1650, 690)


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        (["--decoder", "llama-3.2-1"], "did you mean 'llama-3.2-1b'?"),
        (["--encoder", "siglip-so400m"], "did you mean 'siglip-so400m-384'?"),
        (["--encoder", "x"], "use one of: siglip-so400m-384, tinyclip-39m"),
        (["--text", "0"], "text_tokens is out of range"),
        (["--text", "-5"], "found -5"),
        (["--decoder", "tinyllama-1.1b", "--text", "1500"], "expected 1 to 1319"),
        (["--image-tokens", "0"], "image_tokens is out of range"),
        (["--plot", "/dev/null/x.png"], "cannot write"),
    ],
)
def test_flops_refuses(himix: Any, arguments: list[str], saying: str) -> None:
    done = himix("flops", *arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("Error: ")
    assert done.err.count("\n") == 1
    assert saying in done.err


def test_the_papers_setting_cannot_be_changed(himix: Any, tmp_path: Path) -> None:
    for option, value in (
        ("--text", 32),
        ("--decoder", "qwen2-0.5b"),
        ("--encoder", "tinyclip-39m"),
        ("--image-tokens", 729),
        ("--plot", tmp_path / "x.png"),
    ):
        done = himix("flops", "--paper", option, value)
        assert (done.code, done.out) == (2, "")
        assert f"{option} means nothing beside --paper" in done.err


def test_models_lists_every_preset(himix: Any) -> None:
    done = himix("models")
    assert (done.code, done.err) == (0, "")
    found = json.loads(himix("models", "--json").out)
    assert list(found["encoders"]) == list(ENCODERS)
    assert list(found["decoders"]) == list(DECODERS)
    hub_ids = [e.hub_id for e in ENCODERS.values()] + [d.hub_id for d in DECODERS.values()]
    assert all(hub_id in done.out for hub_id in hub_ids)
    siglip, qwen = found["encoders"]["siglip-so400m-384"], found["decoders"]["qwen2-0.5b"]
    assert (siglip["image_tokens"], siglip["width"], siglip["image_size"]) == (729, 1152, 384)
    assert siglip["flops"] == costs.encoder(ENCODERS["siglip-so400m-384"].vision).total.total
    assert qwen["parameters"] == 494_032_768  # Qwen2-0.5B's model card: 0.49B
    assert round(qwen["vanilla_flops"] / 1e9) == 837  # Table 3
    assert round(qwen["himix_flops"] / 1e9) == 78
    assert rows_of(done.out, "qwen2-0.5b") == [
        ["494.0", "7.1", "24", "x", "896", "836.7", "77.9", "Qwen/Qwen2-0.5B-Instruct"]
    ]
