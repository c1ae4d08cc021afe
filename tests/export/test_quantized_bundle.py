"""A bundle quantized: what it is, what it says it costs, and what it refuses."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
from PIL import Image

import himix_edge
from himix_edge.contract import DECODER_GRAPH, MANIFEST, VISION_GRAPH, Manifest
from himix_edge.errors import BundleError, ConfigError, ImageError, OutputError
from himix_edge.export import quantized_bundle
from himix_edge.export.quantized_bundle import cost_table, quantize_bundle
from himix_edge.export.recipes import WeightChoice, recipe_for
from himix_edge.export.verify import Closeness
from himix_edge.files import sha256_of

INT4 = WeightChoice("int8", "int4")
TEXTS = ("tokenizer.json", "chat_template.jinja", "preprocessor.json")


@pytest.fixture(scope="module")
def quantized(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both parts, with a judge that says something else of each bundle."""
    output = tmp_path_factory.mktemp("quantized") / "bundle"
    quantize_bundle(
        tiny_bundle,
        output,
        INT4,
        judge=lambda folder: {"all": 0.9 if folder == tiny_bundle else 0.8},
    )
    return output


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


def test_it_is_a_whole_bundle_that_answers(tiny_bundle: Path, quantized: Path) -> None:
    manifest = Manifest.read(quantized)
    manifest.check_files(quantized)
    assert set(manifest.files) == {p.name for p in quantized.iterdir()} - {MANIFEST}
    assert manifest.dialect == "ort"
    assert manifest.config == Manifest.read(tiny_bundle).config
    for name in TEXTS:
        assert sha256_of(quantized / name) == sha256_of(tiny_bundle / name)
    assert {"MatMulNBits", "GatherBlockQuantized"} <= operators(quantized / DECODER_GRAPH)
    assert "MatMulInteger" in operators(quantized / VISION_GRAPH)
    model = himix_edge.load(quantized)
    picture = Image.new("RGB", (30, 30), "red")
    first = model.generate(model.encode(picture), "describe", max_tokens=5).read()
    assert first == model.generate(model.encode(picture), "describe", max_tokens=5).read()


def test_the_manifest_says_what_it_is(quantized: Path) -> None:
    quantization = Manifest.read(quantized).quantization
    assert quantization is not None
    assert dataclasses.replace(quantization, cost={}) == himix_edge.contract.Quantization(
        "int8", "int4", 32, "rtn", {}
    )
    assert str(quantization) == "vision int8, decoder int4 (rtn, blocks of 32)"
    assert quantization.cost["accuracy"] == {"quantized": {"all": 0.8}, "before": {"all": 0.9}}
    card = (quantized / "README.md").read_text()
    assert card.count("## Quantization") == 1
    assert cost_table(quantization) in card


def test_the_cost_of_the_vision_graph_is_measured_on_its_own_pictures(
    tiny_bundle: Path, quantized: Path
) -> None:
    """The figures in the manifest, computed anew from the two graphs."""
    manifest = Manifest.read(tiny_bundle)
    inputs = quantized_bundle._inputs(tiny_bundle, manifest, None)
    assert len(inputs.cost) == 3
    assert not any(np.array_equal(a, b) for a in inputs.cost for b in inputs.calibration)
    sessions = [
        onnxruntime.InferenceSession(folder / VISION_GRAPH, providers=["CPUExecutionProvider"])
        for folder in (tiny_bundle, quantized)
    ]
    worst: dict[str, Closeness] = {}
    for pixels in inputs.cost:
        expected, found = (session.run(None, {"pixel_values": pixels}) for session in sessions)
        for output, a, b in zip(sessions[0].get_outputs(), found, expected, strict=True):
            closeness = Closeness.of(a, b)
            worst[output.name] = closeness.worst(worst.get(output.name, closeness))
    quantization = Manifest.read(quantized).quantization
    assert quantization is not None
    cost = quantization.cost["vision"]
    assert set(cost) == set(worst)
    for name, closeness in worst.items():
        assert cost[name]["cosine"] == pytest.approx(closeness.cosine, abs=1e-9)
        assert 0.99 < closeness.cosine < 1 - 1e-7


def test_a_part_that_is_not_chosen_stays_as_it_is(tiny_bundle: Path, tmp_path: Path) -> None:
    eight = WeightChoice(decoder="int8")
    manifest = quantize_bundle(tiny_bundle, tmp_path / "decoder", eight)
    assert sha256_of(tmp_path / "decoder" / VISION_GRAPH) == sha256_of(tiny_bundle / VISION_GRAPH)
    assert manifest.quantization is not None
    assert set(manifest.quantization.cost) == {"images", "prompts", "decoder"}
    assert str(manifest.quantization).startswith("vision as exported, decoder int8")
    tokens = manifest.quantization.cost["decoder"]
    assert tokens["same_tokens"] >= 0.9 * tokens["tokens"] > 0

    manifest = quantize_bundle(tiny_bundle, tmp_path / "vision", WeightChoice("int8"))
    name = f"{DECODER_GRAPH}.data"
    assert sha256_of(tmp_path / "vision" / name) == sha256_of(tiny_bundle / name)
    assert str(manifest.quantization) == "vision int8, decoder as exported"


def test_calibration_with_one_s_own_pictures_and_prompts(tiny_bundle: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        noise = rng.integers(0, 255, (40, 50, 3)).astype(np.uint8)
        Image.fromarray(noise).save(pictures / f"{i}.png")
    (pictures / "prompts.txt").write_text("What is it?\n\nWhere is it?\n")
    how = WeightChoice(decoder="int4", method="gptq")
    manifest = quantize_bundle(tiny_bundle, tmp_path / "out", how, calibration=pictures)
    assert manifest.quantization is not None
    assert manifest.quantization.method == "gptq"
    assert manifest.quantization.cost["images"] == 2  # of five, the second and the fourth
    assert manifest.quantization.cost["prompts"] == 2
    rtn = WeightChoice(decoder="int4")
    quantize_bundle(tiny_bundle, tmp_path / "rtn", rtn, calibration=pictures)
    weights = f"{DECODER_GRAPH}.data"
    assert sha256_of(tmp_path / "out" / weights) != sha256_of(tmp_path / "rtn" / weights)


def test_calibration_pictures_that_cannot_be_used(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"too few pictures.*found no such folder"):
        quantize_bundle(tiny_bundle, tmp_path / "out", INT4, calibration=tmp_path / "none")
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"too few pictures.*found 1"):
        quantize_bundle(tiny_bundle, tmp_path / "out", INT4, calibration=folder)
    (folder / "b.png").write_bytes(b"nor this")
    with pytest.raises(ImageError, match=r"a\.png"):
        quantize_bundle(tiny_bundle, tmp_path / "out", INT4, calibration=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None), "nothing is to be quantized.*--decoder int4"),
        (("int4", None), "vision encoder can't be 'int4'.*int8"),
        ((None, "int3"), "decoder can't be 'int3'.*did you mean 'int"),
        ((None, "fp8"), "decoder can't be 'fp8'.*int8"),
        ((None, "int4", 48), "block_size is off.*32, 64 or 128.*48"),
        ((None, "int4", 32, "gtpq"), "no quantization method 'gtpq'.*'gptq'"),
        (("int8", None, None, "gptq"), "gptq is for the decoder"),
        (("int8", None, 32), "block_size is for the decoder"),
    ],
)
def test_choices_that_mean_nothing(tiny_bundle: Path, arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_for(tiny_bundle, Manifest.read(tiny_bundle), WeightChoice(*arguments))


def test_what_is_no_float32_bundle_is_refused(
    tiny_bundle: Path, quantized: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=r"can't be quantized.*decoder int4"):
        quantize_bundle(quantized, tmp_path / "twice", INT4)
    with pytest.raises(OutputError, match="choose another --output"):
        quantize_bundle(tiny_bundle, tiny_bundle, INT4)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bundle, broken)
    weights = broken / f"{DECODER_GRAPH}.data"
    weights.write_bytes(bytes(reversed(weights.read_bytes())))
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data is corrupt"):
        quantize_bundle(broken, tmp_path / "out", INT4)
    assert not (tmp_path / "out").exists()


def test_the_bundle_stays_as_it_is(tiny_bundle: Path, quantized: Path, tmp_path: Path) -> None:
    """Nothing is written beside its files, not even for a moment."""
    before = {path.name: path.stat().st_mtime_ns for path in tiny_bundle.iterdir()}
    changed = tiny_bundle.stat().st_mtime_ns
    quantize_bundle(tiny_bundle, tmp_path / "out", WeightChoice("int8"))
    assert {path.name: path.stat().st_mtime_ns for path in tiny_bundle.iterdir()} == before
    assert tiny_bundle.stat().st_mtime_ns == changed
    for name in (VISION_GRAPH, f"{VISION_GRAPH}.data"):
        assert sha256_of(tmp_path / "out" / name) == sha256_of(quantized / name)


def test_an_interrupt_leaves_no_debris(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantized_bundle, "decoder_cost", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_bundle(tiny_bundle, tmp_path / "out", WeightChoice(decoder="int4"))
    assert list(tmp_path.iterdir()) == []
