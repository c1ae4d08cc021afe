"""Quantized graphs against the same graphs over dequantized weights, and the inputs that fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime  # type: ignore[import-untyped]
import pytest
from onnx import numpy_helper

from himix_edge.config import HiMixConfig
from himix_edge.contract import DECODER_GRAPH, LOGITS, VISION_GRAPH, Manifest, present_names
from himix_edge.errors import ConfigError, ExportError
from himix_edge.export import calibration
from himix_edge.export.blocks import Bits, rtn
from himix_edge.export.calibration import Feeds, hessians
from himix_edge.export.cost import (
    CalibrationFeeds,
    Exchange,
    decoder_cost,
    exchanges_from_graphs,
    vision_cost,
)
from himix_edge.export.expected import Array, trial_images
from himix_edge.export.onnx import decoder_onnx_from_weights, vision_onnx_from_weights, write_graph
from himix_edge.export.products import weight_products
from himix_edge.export.quantize import (
    DecoderQuantization,
    Method,
    WeightType,
    quantized_decoder,
    quantized_vision,
)
from himix_edge.models.himix import hollow_model
from himix_edge.models.weights import random_weights
from tests import tolerances
from tests.tiny import tiny_config

PROMPTS = [[1, 40, 41, 42, 2], [1, 50, 2], [7, 8, 9, 10, 11, 12]]


@pytest.fixture(scope="module")
def config(tiny_bundle: Path) -> HiMixConfig:
    return Manifest.read(tiny_bundle).config


@pytest.fixture(scope="module")
def exchanges(tiny_bundle: Path, config: HiMixConfig) -> list[Exchange]:
    return exchanges_from_graphs(tiny_bundle, config, trial_images(config.preprocess), PROMPTS, 6)


@pytest.fixture(scope="module")
def feeds(config: HiMixConfig, exchanges: list[Exchange]) -> Sequence[Feeds]:
    return CalibrationFeeds(config, exchanges)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder graph whose head has a matrix of its own."""
    config = tiny_config(tie_word_embeddings=False)
    path = tmp_path_factory.mktemp("untied") / DECODER_GRAPH
    random = random_weights(hollow_model(config).state_dict())
    write_graph(decoder_onnx_from_weights(config, random), path)
    return path


def opened(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


def run(path: Path, *feeds: Feeds) -> list[dict[str, Array]]:
    """The outputs by name, for each of the inputs."""
    session = opened(path)
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, dict(f)), strict=True)) for f in feeds]


def with_dequantized_weights(source: Path, target: Path, how: DecoderQuantization) -> None:
    """The fp32 graph, each weight replaced by what its RTN codes stand for."""
    graph = onnx_ir.load(source)
    *layers, head = weight_products(graph)
    weights = {str(product.weight.name): product.weight for product in layers}
    [table] = [node.inputs[0] for node in graph.graph if node.name == "node_embedding"]
    ends = {str(value.name): value for value in (head.weight, table) if value is not None}
    for name, weight in (weights | ends).items():
        stored = weight.const_value.numpy()  # type: ignore[union-attr]
        turned = not name.endswith(".T")  # [N, K]: the table, and the head tied to it
        matrix = np.ascontiguousarray(stored.T if turned else stored)
        bits: Bits = 4 if how.weights == "int4" and name in weights else 8
        values = rtn(matrix, bits, how.block_size).dequantized()
        values = np.ascontiguousarray(values.T if turned else values)
        weight.const_value = onnx_ir.tensor(values, name=name)
    onnx_ir.save(graph, target, external_data=f"{target.name}.data")


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_is_that_of_the_dequantized_weights(
    tiny_bundle: Path,
    untied: Path,
    tmp_path: Path,
    feeds: Sequence[Feeds],
    weights: WeightType,
    tied: bool,
) -> None:
    source = tiny_bundle / DECODER_GRAPH if tied else untied
    how = DecoderQuantization(weights, 32, "rtn")
    target, plain = tmp_path / "quantized.onnx", tmp_path / "plain.onnx"
    quantized_decoder(source, target, how)
    with_dequantized_weights(source, plain, how)
    some = feeds[:3]
    for found, expected, fp32 in zip(
        run(target, *some), run(plain, *some), run(source, *some), strict=True
    ):
        assert list(found) == [LOGITS, *present_names(2)]
        for name, value in expected.items():
            error = np.abs(found[name] - value).max() / np.abs(value).max()
            assert error < tolerances.INT8_ACTIVATIONS, name
        away = np.abs(expected[LOGITS] - fp32[LOGITS]).max() / np.abs(fp32[LOGITS]).max()
        assert away > (1e-2 if weights == "int4" else 1e-3)  # the reference itself is quantized


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_in_the_graph(tiny_bundle: Path, untied: Path, tmp_path: Path, tied: bool) -> None:
    source = tiny_bundle / DECODER_GRAPH if tied else untied
    target = tmp_path / "quantized.onnx"
    quantized_decoder(source, target, DecoderQuantization("int4", 32, "rtn"))
    graph = onnx_ir.load(target)
    products = [node for node in graph.graph if node.op_type == "MatMulNBits"]
    bits = [node.attributes["bits"].as_int() for node in products]
    assert bits == [4] * 7 * 2 + [8]  # q, k, v, o, gate, up, down of two layers, and the head
    assert {node.attributes["accuracy_level"].as_int() for node in products} == {4}
    [lookup] = [node for node in graph.graph if node.op_type == "GatherBlockQuantized"]
    assert lookup.inputs[2] is not None
    assert (lookup.inputs[2].name == products[-1].inputs[2].name) == tied  # type: ignore[union-attr]
    assert not weight_products(graph)
    floats = [
        value.name
        for value in graph.graph.initializers.values()
        if value.dtype is onnx_ir.DataType.FLOAT
        and len(value.shape or ()) > 1
        and "scales" not in str(value.name)
    ]
    assert not floats
    assert (tmp_path / "quantized.onnx.data").stat().st_size < (
        0.4 * source.with_name(f"{DECODER_GRAPH}.data").stat().st_size
    )


def test_an_embedding_that_the_blocks_do_not_divide_stays_as_it_is(
    tiny_bundle: Path, tmp_path: Path, feeds: Sequence[Feeds]
) -> None:
    target = tmp_path / DECODER_GRAPH
    quantized_decoder(tiny_bundle / DECODER_GRAPH, target, DecoderQuantization("int8", 64, "rtn"))
    graph = onnx_ir.load(target)
    ops = [node.op_type for node in graph.graph]
    assert "GatherBlockQuantized" not in ops
    assert ops.count("MatMulNBits") == 15
    [found], [expected] = run(target, feeds[0]), run(tiny_bundle / DECODER_GRAPH, feeds[0])
    error = np.abs(found[LOGITS] - expected[LOGITS]).max() / np.abs(expected[LOGITS]).max()
    assert 0 < error < tolerances.INT8_ACTIVATIONS


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_gptq_keeps_closer_to_fp32(
    tiny_bundle: Path,
    tmp_path: Path,
    config: HiMixConfig,
    exchanges: list[Exchange],
    feeds: Sequence[Feeds],
    block_size: int,
) -> None:
    source, target = tiny_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH
    error: dict[Method, float] = {}
    methods: tuple[Method, ...] = ("rtn", "gptq")
    for method in methods:
        how = DecoderQuantization("int4", block_size, method)
        quantized_decoder(source, target, how, feeds)
        cost = decoder_cost(source, target, config, exchanges)
        error[method] = float(np.mean([1 - c.cosine for c in cost.tensors.values()]))
    assert error["gptq"] < 0.8 * error["rtn"]


def test_progress_counts_every_matrix(
    tiny_bundle: Path, tmp_path: Path, feeds: Sequence[Feeds]
) -> None:
    methods: tuple[Method, ...] = ("rtn", "gptq")
    for method in methods:
        told: list[float] = []
        how = DecoderQuantization("int4", 32, method)
        quantized_decoder(
            tiny_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH, how, feeds, told.append
        )
        assert told == pytest.approx([i / 15 for i in range(1, 16)])


def test_hessians_are_the_sums_of_what_came_in(
    tiny_bundle: Path, feeds: Sequence[Feeds], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_bundle / DECODER_GRAPH
    products = weight_products(onnx_ir.load(source))
    widths = {product.source: product.rows for product in products}
    whole = dict(hessians(source, widths, feeds))
    assert {name: h.shape for name, h in whole.items()} == {n: (k, k) for n, k in widths.items()}
    # the last hidden state, by hand: logits = x W^T, so x = logits pinv(W^T)
    head = products[-1]
    inverse = np.linalg.pinv(head.matrix().astype(np.float64))
    states = np.concatenate([said[LOGITS][:, 0] for said in run(source, *feeds)]) @ inverse
    found = whole[head.source]
    np.testing.assert_allclose(
        found / np.abs(found).max(), states.T @ states / np.abs(found).max(), rtol=0, atol=1e-4
    )
    monkeypatch.setattr(calibration, "MAX_BYTES", 1)  # a run for each
    for name, hessian in hessians(source, widths, feeds):
        np.testing.assert_array_equal(hessian, whole[name])


def test_vision_in_int8(tiny_bundle: Path, tmp_path: Path, config: HiMixConfig) -> None:
    source, target = tiny_bundle / VISION_GRAPH, tmp_path / VISION_GRAPH
    quantized_vision(source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        VISION_GRAPH,
        f"{VISION_GRAPH}.data",
    ]
    images = trial_images(config.preprocess)
    tensors = vision_cost(source, target, config, images)
    assert list(tensors) == present_names(2)
    for closeness in tensors.values():
        assert 0.99 < closeness.cosine < 1
        assert 0 < closeness.error < 0.1
    ops = [node.op_type for node in onnx_ir.load(target).graph]
    assert ops.count("MatMulInteger") == 6 * 2 + 1  # q, k, v, o, fc1, fc2 of two layers; injection
    before, after = opened(source), opened(target)
    for side in ("get_inputs", "get_outputs"):
        assert [(v.name, v.type, v.shape) for v in getattr(before, side)()] == [
            (v.name, v.type, v.shape) for v in getattr(after, side)()
        ]


def test_what_stood_there_is_replaced(tiny_bundle: Path, tmp_path: Path) -> None:
    def written() -> dict[str, bytes]:
        quantized_vision(tiny_bundle / VISION_GRAPH, tmp_path / VISION_GRAPH)
        how = DecoderQuantization()
        quantized_decoder(tiny_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH, how)
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    assert written() == written()


def test_quantizing_vision_leaves_the_source_folder_as_it_was(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    before = sorted(path.name for path in tiny_bundle.iterdir())
    quantized_vision(tiny_bundle / VISION_GRAPH, tmp_path / VISION_GRAPH)
    assert sorted(path.name for path in tiny_bundle.iterdir()) == before


def test_the_cost_of_no_change_is_none(
    tiny_bundle: Path, config: HiMixConfig, exchanges: list[Exchange]
) -> None:
    source = tiny_bundle / DECODER_GRAPH
    cost = decoder_cost(source, source, config, exchanges)
    assert cost.tokens == sum(len(exchange.answer) for exchange in exchanges) >= 9
    assert cost.same_tokens == cost.tokens
    assert cost.perplexity == pytest.approx(cost.perplexity_before, rel=tolerances.GRAPH_LOGITS)
    assert set(cost.tensors) == {LOGITS, *present_names(2)}
    for closeness in cost.tensors.values():
        assert closeness.error < tolerances.GRAPH_LOGITS
        assert closeness.cosine == pytest.approx(1)


def test_the_cost_by_hand(
    tiny_bundle: Path, tmp_path: Path, config: HiMixConfig, exchanges: list[Exchange]
) -> None:
    """The final norm turned over: logits and their cosine change sign, keys and values stay."""
    source, target = tiny_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH
    graph = onnx.load(source)
    [norm] = [t for t in graph.graph.initializer if t.name.endswith("model.norm.weight")]
    norm.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(norm), norm.name))
    onnx.save(graph, target)
    cost = decoder_cost(source, target, config, exchanges)
    assert cost.same_tokens == 0
    assert cost.tensors[LOGITS].cosine == pytest.approx(-1, abs=1e-6)
    assert cost.tensors["present.1.value"].cosine == pytest.approx(1)
    whole = [(whole, token) for exchange in exchanges for whole, token in grown(config, exchange)]
    losses, turned = [], []
    for said, (_, token) in zip(run(source, *(f for f, _ in whole)), whole, strict=True):
        logits = said[LOGITS][0, 0].astype(np.float64)
        losses.append(np.log(np.exp(logits).sum()) - logits[token])
        turned.append(np.log(np.exp(-logits).sum()) + logits[token])
    assert cost.perplexity_before == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert cost.perplexity == pytest.approx(np.exp(np.mean(turned)), rel=1e-4)


def test_an_answer_is_the_likeliest_tokens(
    tiny_bundle: Path, config: HiMixConfig, exchanges: list[Exchange]
) -> None:
    assert len(exchanges) == 3 * len(PROMPTS)
    whole = [(whole, token) for exchange in exchanges for whole, token in grown(config, exchange)]
    said = run(tiny_bundle / DECODER_GRAPH, *(feeds for feeds, _ in whole))
    assert [int(outputs[LOGITS].argmax()) for outputs in said] == [token for _, token in whole]


def grown(config: HiMixConfig, exchange: Exchange) -> list[tuple[Feeds, int]]:
    """All that was read before a token, in one go, and the token: for each of the answer's."""
    pairs = []
    for i, token in enumerate(exchange.answer):
        so_far = dataclasses.replace(exchange, answer=exchange.answer[: i + 1])
        pairs.append((CalibrationFeeds(config, [so_far])[0], token))
    return pairs


def test_what_is_no_quantization() -> None:
    with pytest.raises(ConfigError, match=r"'int5'.*did you mean 'int"):
        DecoderQuantization("int5")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"'gtpq'.*did you mean 'gptq'"):
        DecoderQuantization(method="gtpq")  # type: ignore[arg-type]
    for size in (0, 48, 256, "32", True):
        with pytest.raises(ConfigError, match=r"block_size is off: expected 32, 64 or 128"):
            DecoderQuantization(block_size=size)  # type: ignore[arg-type]


def test_gptq_without_calibration(tiny_bundle: Path, tmp_path: Path) -> None:
    how = DecoderQuantization("int4", 32, "gptq")
    with pytest.raises(ConfigError, match="gptq has nothing to calibrate with"):
        quantized_decoder(tiny_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH, how)
    assert not list(tmp_path.iterdir())


def test_calibration_inputs_of_another_graph(
    tiny_bundle: Path, tmp_path: Path, feeds: Sequence[Feeds]
) -> None:
    how = DecoderQuantization("int4", 32, "gptq")
    wrong = {name: value for name, value in feeds[0].items() if name != "position_ids"}
    with pytest.raises(ExportError, match=r"can't run decoder\.onnx for calibration.*position_ids"):
        quantized_decoder(tiny_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH, how, [wrong])


def test_cost_without_exchanges(tiny_bundle: Path, config: HiMixConfig) -> None:
    with pytest.raises(ConfigError, match="nothing to measure with"):
        decoder_cost(tiny_bundle / DECODER_GRAPH, tiny_bundle / DECODER_GRAPH, config, [])


def test_a_quantized_graph_is_not_quantized_again(tiny_bundle: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.onnx", tmp_path / "twice.onnx"
    quantized_decoder(tiny_bundle / DECODER_GRAPH, once, DecoderQuantization())
    with pytest.raises(ExportError, match=r"^once\.onnx has nothing to quantize"):
        quantized_decoder(once, twice, DecoderQuantization())
    quantized_vision(tiny_bundle / VISION_GRAPH, once)
    with pytest.raises(ExportError, match=r"^once\.onnx has nothing to quantize"):
        quantized_vision(once, twice)
    assert not twice.exists()


@pytest.mark.parametrize("graph", [DECODER_GRAPH, VISION_GRAPH])
def test_the_weight_that_is_not_finite_is_named(
    tiny_bundle: Path, tmp_path: Path, graph: str
) -> None:
    model = onnx.load(tiny_bundle / graph)
    name = next(
        t.name
        for t in model.graph.initializer
        if t.name.endswith("1.mlp.fc2.weight.T") or t.name.endswith("1.mlp.up_proj.weight.T")
    )
    [tensor] = [t for t in model.graph.initializer if t.name == name]
    values = numpy_helper.to_array(tensor).copy()
    values[2, 3] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    source = tmp_path / graph
    onnx.save(model, source)

    def quantize() -> None:
        if graph == DECODER_GRAPH:
            quantized_decoder(source, tmp_path / "out.onnx", DecoderQuantization())
        else:
            quantized_vision(source, tmp_path / "out.onnx")

    with pytest.raises(ExportError, match=rf"cannot quantize.*{name}.*expected finite numbers"):
        quantize()
    assert not (tmp_path / "out.onnx").exists()


def test_vision_of_a_connector_for_every_layer(tmp_path: Path) -> None:
    config = tiny_config("hierarchical")
    source, target = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    random = random_weights(hollow_model(config).state_dict())
    write_graph(vision_onnx_from_weights(config, random), source)
    quantized_vision(source, target)
    tensors = vision_cost(source, target, config, trial_images(config.preprocess))
    assert all(0.98 < closeness.cosine < 1 for closeness in tensors.values())
