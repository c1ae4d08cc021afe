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
from himix_edge.bundle.files import BundleFiles
from himix_edge.bundle.quality import cost_table, quality_of
from himix_edge.contract import (
    DECODER_GRAPH,
    MANIFEST,
    PREFILL_GRAPH,
    VISION_GRAPH,
    Manifest,
)
from himix_edge.errors import BundleError, ConfigError, ImageError, OutputError
from himix_edge.export import quantized_bundle
from himix_edge.export.quantized_bundle import quantize_bundle
from himix_edge.export.recipes import WeightChoice, recipe_for
from himix_edge.export.sessions import DecoderSession, packed_session
from himix_edge.export.verify import Closeness
from himix_edge.files import sha256_of
from himix_edge.runtimes.base import VisionKV

INT4 = WeightChoice("int8", "int4", prefill="int8")
TEXTS = ("tokenizer.json", "chat_template.jinja", "preprocessor.json")


@pytest.fixture(scope="module")
def quantized(ort_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both parts and a copy for prompts, with a judge that says something else of each bundle."""
    output = tmp_path_factory.mktemp("quantized") / "bundle"
    quantize_bundle(
        ort_bundle,
        output,
        INT4,
        judge=lambda folder: {"all": 0.9 if folder == ort_bundle else 0.8},
    )
    return output


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


def test_it_is_a_whole_bundle_that_answers(ort_bundle: Path, quantized: Path) -> None:
    manifest = Manifest.read(quantized)
    BundleFiles(quantized, manifest).check()
    assert set(manifest.files) == {p.name for p in quantized.iterdir()} - {MANIFEST}
    assert manifest.dialect == "ort"
    assert manifest.config == Manifest.read(ort_bundle).config
    for name in TEXTS:
        assert sha256_of(quantized / name) == sha256_of(ort_bundle / name)
    assert {"MatMulNBits", "GatherBlockQuantized"} <= operators(quantized / DECODER_GRAPH)
    assert "MatMulIntegerToFloat" not in operators(quantized / DECODER_GRAPH)
    assert "MatMulIntegerToFloat" in operators(quantized / VISION_GRAPH)
    assert "MatMulIntegerToFloat" in operators(quantized / PREFILL_GRAPH)
    model = himix_edge.load(quantized)
    picture = Image.new("RGB", (30, 30), "red")
    first = model.generate(model.encode(picture), "describe", max_tokens=5).read()
    assert first == model.generate(model.encode(picture), "describe", max_tokens=5).read()


def test_prompts_go_through_their_own_copy(quantized: Path) -> None:
    """However few of their tokens come at a time, and generated tokens through the other."""
    config = Manifest.read(quantized).config
    engine = himix_edge.load(quantized).engine
    image = [np.zeros((1, 2, 4, 16), np.float32)] * (2 * config.decoder.num_hidden_layers)
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    kv = VisionKV(tuple(map(value, image)), config.vision.num_image_tokens)
    own, other = (
        DecoderSession(quantized / graph, config, packed_session)
        for graph in (PREFILL_GRAPH, DECODER_GRAPH)
    )
    for count in (1, 7, 40):
        ids = np.arange(40, 40 + count)[None]
        cache = engine.open(kv)
        logits = engine.prefill(ids, cache)
        expected, past = own.step(ids, image)
        np.testing.assert_array_equal(logits, expected)
        assert np.abs(logits - other.step(ids, image)[0]).max() > 1e-5
        logits = engine.step(np.array([[7]]), cache)
        np.testing.assert_array_equal(logits, other.step(np.array([[7]]), past)[0])
        assert (cache.reusable, cache.text_length) == (count, count + 1)


def test_the_manifest_says_what_it_is(quantized: Path) -> None:
    quantization = Manifest.read(quantized).quantization
    assert quantization is not None
    assert dataclasses.replace(quantization, cost={}) == himix_edge.contract.Quantization(
        "int8", "int4", 32, "gptq", {}, prefill="int8"
    )
    assert str(quantization) == "vision int8, decoder int4 (gptq, blocks of 32, prompts int8)"
    assert quantization.cost["accuracy"] == {"quantized": {"all": 0.8}, "before": {"all": 0.9}}
    card = (quantized / "README.md").read_text()
    assert card.count("## Quantization") == 1
    table = cost_table(quantization)
    assert table in card
    assert "the image's keys and values: cosine 0.99" in table
    quality = quality_of(quantization)
    assert quality is not None
    assert [(way.text, way.cache, way.graph) for way in quality.ways] == [
        ("prompts of 32 tokens", "nothing", PREFILL_GRAPH),
        ("prompts of 32 tokens", "an image", PREFILL_GRAPH),
    ]


def test_the_cost_of_the_vision_graph_is_measured_on_its_own_pictures(
    ort_bundle: Path, quantized: Path
) -> None:
    """The figures in the manifest, computed anew from the two graphs."""
    inputs = quantized_bundle._inputs(BundleFiles.open(ort_bundle), None)
    assert len(inputs.cost) == 3
    assert not any(np.array_equal(a, b) for a in inputs.cost for b in inputs.calibration)
    sessions = [
        onnxruntime.InferenceSession(folder / VISION_GRAPH, providers=["CPUExecutionProvider"])
        for folder in (ort_bundle, quantized)
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


def test_a_part_that_is_not_chosen_stays_as_it_is(ort_bundle: Path, tmp_path: Path) -> None:
    eight = WeightChoice(decoder="int8")
    manifest = quantize_bundle(ort_bundle, tmp_path / "decoder", eight)
    assert sha256_of(tmp_path / "decoder" / VISION_GRAPH) == sha256_of(ort_bundle / VISION_GRAPH)
    assert manifest.quantization is not None
    assert set(manifest.quantization.cost) == {"images", "prompts", "quality"}
    assert str(manifest.quantization).startswith("vision as exported, decoder int8")
    quality = quality_of(manifest.quantization)
    assert quality is not None
    assert all(way.agreement > 0.85 for way in quality.ways)

    manifest = quantize_bundle(ort_bundle, tmp_path / "vision", WeightChoice("int8"))
    name = f"{DECODER_GRAPH}.data"
    assert sha256_of(tmp_path / "vision" / name) == sha256_of(ort_bundle / name)
    assert str(manifest.quantization) == "vision int8, decoder as exported"
    quality = quality_of(manifest.quantization)
    assert quality is not None
    assert {way.cache for way in quality.ways} == {"an image"}  # nothing else has changed


def test_calibration_with_one_s_own_pictures_and_prompts(ort_bundle: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        noise = rng.integers(0, 255, (40, 50, 3)).astype(np.uint8)
        Image.fromarray(noise).save(pictures / f"{i}.png")
    (pictures / "prompts.txt").write_text("What is it?\n\nWhere is it?\n")
    how = WeightChoice(decoder="int4", method="gptq")
    manifest = quantize_bundle(ort_bundle, tmp_path / "out", how, calibration=pictures)
    assert manifest.quantization is not None
    assert manifest.quantization.method == "gptq"
    assert manifest.quantization.cost["images"] == 2  # of five, the second and the fourth
    assert manifest.quantization.cost["prompts"] == 2
    rtn = WeightChoice(decoder="int4", method="rtn")
    quantize_bundle(ort_bundle, tmp_path / "rtn", rtn, calibration=pictures)
    weights = f"{DECODER_GRAPH}.data"
    assert sha256_of(tmp_path / "out" / weights) != sha256_of(tmp_path / "rtn" / weights)


def test_calibration_pictures_that_cannot_be_used(ort_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"too few pictures.*found no such folder"):
        quantize_bundle(ort_bundle, tmp_path / "out", INT4, calibration=tmp_path / "none")
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"too few pictures.*found 1"):
        quantize_bundle(ort_bundle, tmp_path / "out", INT4, calibration=folder)
    (folder / "b.png").write_bytes(b"nor this")
    (folder / "prompts.txt").write_bytes("Où?\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"prompts\.txt, line 1 is no text"):
        quantize_bundle(ort_bundle, tmp_path / "out", INT4, calibration=folder)
    (folder / "prompts.txt").unlink()
    with pytest.raises(ImageError, match=r"a\.png"):
        quantize_bundle(ort_bundle, tmp_path / "out", INT4, calibration=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None), "nothing is to be quantized.*--decoder int4"),
        (("int4", None), "vision encoder can't be 'int4'.*int8"),
        ((None, "int3"), "decoder can't be 'int3'.*did you mean 'int"),
        ((None, "fp8"), "decoder can't be 'fp8'.*int8"),
        ((None, "int4", 48), "block_size is invalid.*32, 64 or 128.*48"),
        ((None, "int4", None, "rtn", "int3"), "head can't be 'int3'.*did you mean 'int"),
        (("int8", None, None, "rtn", "int4"), "the head is the decoder's"),
        (("int8", None, None, "rtn", None, "int8"), "second copy.*found int8 of a decoder as exp"),
        ((None, "int8", None, "rtn", None, "int8"), "second copy.*found int8 of int8.*--prefill"),
        ((None, "int4", None, "rtn", None, "int4"), "second copy.*found int4 of int4"),
        ((None, "int4", 32, "gtpq"), "no quantization method 'gtpq'.*'gptq'"),
        (("int8", None, None, "gptq"), "gptq is for the decoder"),
        (("int8", None, 32), "block_size is for the decoder"),
    ],
)
def test_choices_that_mean_nothing(ort_bundle: Path, arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_for(ort_bundle, Manifest.read(ort_bundle), WeightChoice(*arguments))


def test_what_is_no_ort_bundle_in_float32_is_refused(
    tiny_bundle: Path, ort_bundle: Path, quantized: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=r"can't be quantized.*decoder int4"):
        quantize_bundle(quantized, tmp_path / "twice", INT4)
    with pytest.raises(BundleError, match=r"expected an ort bundle in float32.*--target cpu"):
        quantize_bundle(tiny_bundle, tmp_path / "out", INT4)
    with pytest.raises(OutputError, match="choose another --output"):
        quantize_bundle(ort_bundle, ort_bundle, INT4)
    broken = tmp_path / "broken"
    shutil.copytree(ort_bundle, broken)
    weights = broken / f"{DECODER_GRAPH}.data"
    weights.write_bytes(bytes(reversed(weights.read_bytes())))
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data is corrupt"):
        quantize_bundle(broken, tmp_path / "out", INT4)
    assert not (tmp_path / "out").exists()


def test_the_bundle_stays_as_it_is(ort_bundle: Path, quantized: Path, tmp_path: Path) -> None:
    """Nothing is written beside its files, not even for a moment."""
    before = {path.name: path.stat().st_mtime_ns for path in ort_bundle.iterdir()}
    changed = ort_bundle.stat().st_mtime_ns
    quantize_bundle(ort_bundle, tmp_path / "out", WeightChoice("int8"))
    assert {path.name: path.stat().st_mtime_ns for path in ort_bundle.iterdir()} == before
    assert ort_bundle.stat().st_mtime_ns == changed
    for name in (VISION_GRAPH, f"{VISION_GRAPH}.data"):
        assert sha256_of(tmp_path / "out" / name) == sha256_of(quantized / name)


def test_an_interrupt_leaves_no_debris(
    ort_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantized_bundle, "measured_ways", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_bundle(ort_bundle, tmp_path / "out", WeightChoice(decoder="int4"))
    assert list(tmp_path.iterdir()) == []
