"""Bundles in float16 quantized for TensorRT, and what their dialects refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
from PIL import Image

import himix_edge
from himix_edge.bundle.files import BundleFiles
from himix_edge.bundle.quality import quality_of
from himix_edge.contract import (
    DECODER_GRAPH,
    MANIFEST,
    VISION_GRAPH,
    FileRecord,
    Manifest,
    Quantization,
)
from himix_edge.errors import BundleError, ConfigError
from himix_edge.export.dialects import NATIVE_OPSET, PORTABLE_OPERATORS
from himix_edge.export.onnx import write_graph
from himix_edge.export.quantized_bundle import quantize_bundle
from himix_edge.export.recipes import WeightChoice, recipe_for
from himix_edge.export.rewrites import native_decoder, native_vision
from himix_edge.files import sha256_of

SLOTS = 4 + 100


@pytest.fixture(scope="module")
def native(half_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle in float16 with its graphs rewritten."""
    folder = tmp_path_factory.mktemp("native") / "bundle"
    folder.mkdir()
    manifest = Manifest.read(half_bundle)
    for name in manifest.files:
        if not name.startswith((VISION_GRAPH, DECODER_GRAPH)):
            (folder / name).write_bytes((half_bundle / name).read_bytes())
    for name, rewrite in ((VISION_GRAPH, native_vision), (DECODER_GRAPH, native_decoder)):
        graph = onnx_ir.load(half_bundle / name)
        rewrite(graph, manifest.config, SLOTS)
        write_graph(graph, folder / name)
    manifest = dataclasses.replace(
        manifest,
        dialect="native",
        cache_slots=SLOTS,
        files={path.name: FileRecord.of(path) for path in folder.iterdir()},
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


def constants(path: Path) -> dict[str, str]:
    """What every DequantizeLinear of a graph reads."""
    graph = onnx.load(path, load_external_data=False).graph
    types = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer}
    return {n.input[0]: types[n.input[0]] for n in graph.node if n.op_type == "DequantizeLinear"}


def test_the_whole_way_through_the_command(native: Path, tmp_path: Path, himix: Any) -> None:
    out = tmp_path / "out"
    done = himix("quantize", native, "-o", out, "--vision", "int8", "--decoder", "int4")
    assert done.code == 0, done.err
    manifest = Manifest.read(out)
    BundleFiles(out, manifest).check()
    assert (manifest.dialect, manifest.dtype, manifest.cache_slots) == ("native", "float16", SLOTS)
    quantization = manifest.quantization
    assert quantization is not None
    assert dataclasses.replace(quantization, cost={}) == Quantization("int8", "int4", 64, "rtn", {})
    assert set(constants(out / VISION_GRAPH).values()) == {"INT8"}
    assert set(constants(out / DECODER_GRAPH).values()) == {"INT8", "INT4"}
    model = onnx.load(out / DECODER_GRAPH, load_external_data=False)
    assert model.opset_import[0].version == NATIVE_OPSET
    assert {"Attention", "TensorScatter"} <= {node.op_type for node in model.graph.node}
    assert "in float16" in (out / "README.md").read_text()
    before = sum(record.size for record in Manifest.read(native).files.values())
    assert sum(record.size for record in manifest.files.values()) < before
    quality = quality_of(quantization)
    assert quality is not None
    assert [way.graph for way in quality.ways] == [DECODER_GRAPH] * 2
    assert all(way.agreement > 0.6 and 0 < way.divergence < 0.1 for way in quality.ways)
    assert all(0.99 < c["cosine"] < 1 - 1e-7 for c in quantization.cost["vision"].values())
    answers = [
        himix_edge.load(folder).generate(
            himix_edge.load(folder).encode(Image.new("RGB", (30, 30), "red")),
            "describe",
            max_tokens=4,
        )
        for folder in (out, out)
    ]
    assert answers[0].read() == answers[1].read()


@pytest.mark.parametrize(
    ("choice", "constant", "block_size"),
    [
        (WeightChoice("fp8", "fp8"), "FLOAT8E4M3FN", None),
        (WeightChoice("int8", "int8", method="gptq"), "INT8", None),
    ],
)
def test_a_scale_to_each_output(
    native: Path, tmp_path: Path, choice: WeightChoice, constant: str, block_size: int | None
) -> None:
    manifest = quantize_bundle(native, tmp_path / "out", choice)
    assert manifest.quantization is not None
    assert manifest.quantization.block_size is block_size
    assert manifest.quantization.method == (choice.method or "rtn")
    for name in (VISION_GRAPH, DECODER_GRAPH):
        assert set(constants(tmp_path / "out" / name).values()) == {constant}


def test_a_portable_bundle_stays_one(half_bundle: Path, tmp_path: Path) -> None:
    """TensorRT 10.3 imports opset 20 at most; DequantizeLinear has float16 since 19."""
    manifest = quantize_bundle(half_bundle, tmp_path / "out", WeightChoice(decoder="int8"))
    assert (manifest.dialect, manifest.dtype, manifest.cache_slots) == ("portable", "float16", None)
    assert sha256_of(tmp_path / "out" / VISION_GRAPH) == sha256_of(half_bundle / VISION_GRAPH)
    model = onnx.load(tmp_path / "out" / DECODER_GRAPH, load_external_data=False)
    assert model.opset_import[0].version == 19
    assert {node.op_type for node in model.graph.node} <= PORTABLE_OPERATORS
    assert set(constants(tmp_path / "out" / DECODER_GRAPH).values()) == {"INT8"}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (WeightChoice(decoder="int4"), r"decoder of a portable bundle can't be int4.*opset 21"),
        (WeightChoice("fp8"), r"vision encoder of a portable bundle can't be fp8.*capability 8\.9"),
        (WeightChoice("int3"), r"vision encoder can't be 'int3'.*did you mean 'int"),
        (WeightChoice(decoder="int8", block_size=64), "block_size means nothing here"),
        (WeightChoice(decoder="int8", head="int4"), "head is for ONNX Runtime on a CPU.*cpu"),
        (WeightChoice(decoder="int4", prefill="int8"), "prefill is for ONNX Runtime on a CPU"),
        (WeightChoice(decoder="int4", bits=6), "bits is for ONNX Runtime on a CPU"),
    ],
)
def test_what_a_portable_bundle_refuses(
    half_bundle: Path, choice: WeightChoice, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_for(half_bundle, Manifest.read(half_bundle), choice)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (WeightChoice(decoder="int4", block_size=32), r"block_size is invalid: expected 64 or 128"),
        (WeightChoice(decoder="fp8", method="gptq"), "gptq has no fp8"),
    ],
)
def test_what_a_native_bundle_refuses(native: Path, choice: WeightChoice, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_for(native, Manifest.read(native), choice)


@pytest.mark.parametrize(
    "changes",
    [
        {"dialect": "native", "dtype": "float32"},
        {"dtype": "bfloat16"},
        {"quantization": Quantization(None, "int8", None, "rtn", {})},
    ],
)
def test_bundles_that_can_t_be_quantized(half_bundle: Path, changes: dict[str, Any]) -> None:
    manifest = dataclasses.replace(Manifest.read(half_bundle), **changes)
    with pytest.raises(BundleError, match=r"can't be quantized: expected an ort bundle"):
        recipe_for(half_bundle, manifest, WeightChoice(decoder="int8"))
