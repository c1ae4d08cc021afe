"""Quantized decoders against the same graphs over dequantized weights, and the inputs that fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from himix_edge.contract import DECODER_GRAPH, LOGITS, present_names
from himix_edge.errors import ConfigError, ExportError
from himix_edge.export import calibration, quantize
from himix_edge.export.blocks import Bits, rtn
from himix_edge.export.calibration import Feeds, inflows
from himix_edge.export.cost import CalibrationFeeds, Exchange
from himix_edge.export.onnx import write_graph
from himix_edge.export.products import weight_products
from himix_edge.export.quantize import (
    BITS,
    METHODS,
    DecoderQuantization,
    Method,
    WeightType,
    quantized_decoder,
)
from himix_edge.export.rewrites import ort_decoder
from himix_edge.export.rotation import rotate
from tests import tolerances
from tests.export.conftest import Traced, run
from tests.export.decoder_cost import decoder_cost
from tests.export.int8_formula import follow_the_formula
from tests.export.massive import with_massive_activations
from tests.tiny import tiny_config

CONFIG = tiny_config()
ENDS: list[tuple[bool, WeightType]] = [(True, "int8"), (False, "int4")]  # whether tied, their type


@pytest.fixture(scope="module")
def untied(qwen2: Traced, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder graph whose head has a matrix of its own."""
    graph = onnx_ir.load(qwen2.decoder)
    ort_decoder(graph, qwen2.model.config)
    path = tmp_path_factory.mktemp("untied") / DECODER_GRAPH
    write_graph(graph, path)
    return path


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
        bits: Bits = BITS[how.weights if name in weights else how.head]
        values = rtn(matrix, bits, how.block_size).dequantized()
        values = np.ascontiguousarray(values.T if turned else values)
        weight.const_value = onnx_ir.tensor(values, name=name)
    onnx_ir.save(graph, target, external_data=f"{target.name}.data")


@pytest.mark.parametrize(("tied", "head"), ENDS)
def test_the_decoder_is_that_of_the_dequantized_weights(
    ort_bundle: Path,
    untied: Path,
    tmp_path: Path,
    feeds: Sequence[Feeds],
    tied: bool,
    head: WeightType,
) -> None:
    source = ort_bundle / DECODER_GRAPH if tied else untied
    how = DecoderQuantization("int4", 32, "rtn", head)
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
        assert away > 2 * tolerances.INT8_ACTIVATIONS  # the reference itself is quantized


@pytest.mark.parametrize(("tied", "head"), ENDS)
def test_what_is_in_the_graph(
    ort_bundle: Path, untied: Path, tmp_path: Path, tied: bool, head: WeightType
) -> None:
    source = ort_bundle / DECODER_GRAPH if tied else untied
    target = tmp_path / "quantized.onnx"
    quantized_decoder(source, target, DecoderQuantization("int4", 32, "rtn", head))
    graph = onnx_ir.load(target)
    products = [node for node in graph.graph if node.op_type == "MatMulNBits"]
    bits = [node.attributes["bits"].as_int() for node in products]
    assert bits == [4] * 4 * 2 + [BITS[head]]  # qkv, o, gate and up, down of two layers, the head
    assert {node.attributes["accuracy_level"].as_int() for node in products} == {4}
    [lookup] = [node for node in graph.graph if node.op_type == "GatherBlockQuantized"]
    assert lookup.attributes["bits"].as_int() == BITS[head]
    assert lookup.inputs[2] is not None
    assert (lookup.inputs[2].name == products[-1].inputs[2].name) == tied  # type: ignore[union-attr]
    assert not weight_products(graph)
    floats = [
        value.name
        for value in graph.graph.initializers.values()
        if value.dtype is onnx_ir.DataType.FLOAT
        and len(value.shape or ()) > 1
        and not any(part in str(value.name) for part in ("scales", "rotary"))
    ]
    assert not floats
    codes = 0
    for name, value in graph.graph.initializers.items():
        if name.endswith(".codes") and value.const_value is not None:
            codes += value.const_value.nbytes
    layers, vocabulary = 2 * 32 * (64 + 2 * 32 + 64 + 2 * 64 + 64), 300 * 32 * (1 if tied else 2)
    assert codes == (4 * layers + BITS[head] * vocabulary) // 8


def test_int8_products_follow_their_formula(
    untied: Path, tmp_path: Path, feeds: Sequence[Feeds]
) -> None:
    """Only the head and the embedding are in blocks."""
    target, rotated = tmp_path / DECODER_GRAPH, tmp_path / "rotated.onnx"
    quantized_decoder(untied, target, DecoderQuantization("int8", head="int4", block_size=32))
    graph = onnx_ir.load(untied)
    rotate(graph, weight_products(graph)[:-1])
    write_graph(graph, rotated)
    assert follow_the_formula(rotated, target, feeds[0]) == 4 * 2
    graph = onnx_ir.load(target)
    found = [node.op_type for node in graph.graph]
    assert (found.count("MatMulNBits"), found.count("GatherBlockQuantized")) == (1, 1)
    left = {str(product.weight.name) for product in weight_products(graph)}
    assert left == {"rotation.right", "rotation.back.right"}


def test_blocks_of_the_ends_are_as_large_as_divide_their_width(
    ort_bundle: Path, tmp_path: Path, feeds: Sequence[Feeds]
) -> None:
    source, target = ort_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH
    quantized_decoder(source, target, DecoderQuantization("int8", 128), feeds)
    graph = onnx_ir.load(target)
    ends = {
        n.op_type: n for n in graph.graph if n.op_type in ("MatMulNBits", "GatherBlockQuantized")
    }
    assert len(ends) == 2
    assert {node.attributes["block_size"].as_int() for node in ends.values()} == {32}
    [found], [expected] = run(target, feeds[0]), run(source, feeds[0])
    error = np.abs(found[LOGITS] - expected[LOGITS]).max() / np.abs(expected[LOGITS]).max()
    assert 0 < error < tolerances.INT8_ACTIVATIONS


def test_an_embedding_that_no_blocks_divide_stays_as_it_is(tmp_path: Path) -> None:
    rng, width = np.random.default_rng(0), 48
    table, layer = (rng.standard_normal((n, width)).astype(np.float32) for n in (20, width))
    weights = {"table": table, "layer.T": layer, "head.T": np.ascontiguousarray(table.T)}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["looked_up"]),
        helper.make_node("MatMul", ["looked_up", "layer.T"], ["states"]),
        helper.make_node("MatMul", ["states", "head.T"], [LOGITS]),
    ]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"])],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [1, "tokens", 20])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    onnx.save(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 23)]), source
    )
    quantized_decoder(source, target, DecoderQuantization("int4", 32))
    kept = onnx_ir.load(target).graph
    assert [node.op_type for node in kept] == ["Gather", "MatMulNBits", "MatMulNBits"]
    np.testing.assert_array_equal(kept.initializers["table"].const_value.numpy(), table)  # type: ignore[union-attr]
    ids = np.array([[3, 17]])
    [found] = run(target, {"input_ids": ids})
    expected = table[ids] @ rtn(layer, 4, 32).dequantized() @ rtn(table.T, 8, 32).dequantized()
    error = np.abs(found[LOGITS] - expected).max() / np.abs(expected).max()
    assert error < tolerances.INT8_ACTIVATIONS


@pytest.mark.parametrize("block_size", [32, 128])
def test_gptq_keeps_closer_to_fp32(
    ort_bundle: Path,
    tmp_path: Path,
    exchanges: list[Exchange],
    feeds: Sequence[Feeds],
    block_size: int,
) -> None:
    source, target = ort_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH
    error: dict[Method, float] = {}
    methods: tuple[Method, ...] = ("rtn", "gptq")
    for method in methods:
        how = DecoderQuantization("int4", block_size, method)
        quantized_decoder(source, target, how, feeds)
        cost = decoder_cost(source, target, CONFIG, exchanges)
        error[method] = float(np.mean([1 - c.cosine for c in cost.tensors.values()]))
    assert error["gptq"] < 0.8 * error["rtn"]


def test_progress_counts_every_matrix(
    ort_bundle: Path, tmp_path: Path, feeds: Sequence[Feeds]
) -> None:
    methods: tuple[Method, ...] = ("rtn", "gptq")
    for method in methods:
        told: list[float] = []
        how = DecoderQuantization("int4", 32, method)
        quantized_decoder(
            ort_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH, how, feeds, told.append
        )
        assert told == pytest.approx([i / 9 for i in range(1, 10)])


def test_hessians_are_the_sums_of_what_came_in(
    tiny_bundle: Path,
    ort_bundle: Path,
    exchanges: list[Exchange],
    feeds: Sequence[Feeds],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of every token, though the graph computes the last layer for the last one alone."""
    source = ort_bundle / DECODER_GRAPH
    products = weight_products(onnx_ir.load(source))
    widths = {product.source: product.rows for product in products}
    whole = {name: flow.hessian for name, flow in inflows(source, widths, feeds)}
    assert {name: h.shape for name, h in whole.items()} == {n: (k, k) for n, k in widths.items()}
    # the last hidden state, by hand: logits = x W^T, so x = logits pinv(W^T)
    head = products[-1]
    inverse = np.linalg.pinv(head.matrix().astype(np.float64))
    states = np.concatenate([said[LOGITS][:, 0] for said in run(source, *feeds)]) @ inverse
    found = whole[head.source]
    np.testing.assert_allclose(
        found / np.abs(found).max(), states.T @ states / np.abs(found).max(), rtol=0, atol=1e-4
    )
    # and the others, from the portable graph, which leaves nothing out
    portable = tiny_bundle / DECODER_GRAPH
    theirs = {str(p.weight.name): p for p in weight_products(onnx_ir.load(portable))}
    shared = [(p, theirs[n]) for p in products if (n := str(p.weight.name)) in theirs]
    assert len(shared) == 2 * 2 + 1  # o and down of two layers, and the head
    theirs_in = {other.source: other.rows for _, other in shared}
    sums = dict(inflows(portable, theirs_in, CalibrationFeeds(CONFIG, exchanges)))
    for product, other in shared:
        expected = sums[other.source].hessian
        np.testing.assert_allclose(
            whole[product.source] / np.abs(expected).max(),
            expected / np.abs(expected).max(),
            rtol=0,
            atol=1e-5,
        )
    monkeypatch.setattr(calibration, "MAX_BYTES", 1)  # a run for each
    for name, flow in inflows(source, widths, feeds):
        np.testing.assert_array_equal(flow.hessian, whole[name])


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_what_calibration_is_good_for_where_a_few_channels_are_massive(
    ort_bundle: Path, tmp_path: Path, feeds: Sequence[Feeds], weights: WeightType
) -> None:
    """On inputs that it has not seen; rounding alone, even rotated, loses several times as much."""
    source = tmp_path / "massive.onnx"
    with_massive_activations(ort_bundle / DECODER_GRAPH, source)
    seen, unseen = feeds[:6], feeds[6:]
    fp32 = [said[LOGITS] for said in run(source, *unseen)]
    errors = {}
    for method in METHODS:
        target = tmp_path / f"{method}.onnx"
        quantized_decoder(
            source,
            target,
            DecoderQuantization(weights, 32, method),
            seen if method == "gptq" else (),
        )
        errors[method] = np.mean(
            [
                np.linalg.norm(said[LOGITS] - logits) / np.linalg.norm(logits)
                for said, logits in zip(run(target, *unseen), fp32, strict=True)
            ]
        )
    assert errors["gptq"] < errors["rtn"] / 2


def test_products_that_round_badly_are_in_blocks(
    ort_bundle: Path, tmp_path: Path, feeds: Sequence[Feeds], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there is room for, the worst first."""
    how, target = DecoderQuantization("int8", 32, "gptq"), tmp_path / DECODER_GRAPH
    for share, count in ((0.0, 0), (0.11, 1), (1.0, 8)):
        monkeypatch.setattr(quantize, "WORST_SHARE", share)
        monkeypatch.setattr(quantize, "TOLERABLE_ROUNDING", 0.0)
        quantized_decoder(ort_bundle / DECODER_GRAPH, target, how, feeds)
        found = [node.op_type for node in onnx_ir.load(target).graph]
        assert found.count("MatMulNBits") == count + 1  # and the head
        assert found.count("MatMulIntegerToFloat") == 8 - count
    monkeypatch.setattr(quantize, "TOLERABLE_ROUNDING", 1.0)
    quantized_decoder(ort_bundle / DECODER_GRAPH, target, how, feeds)
    found = [node.op_type for node in onnx_ir.load(target).graph]
    assert found.count("MatMulNBits") == 1


def test_a_budget_of_bits_is_kept_and_used(
    ort_bundle: Path, tmp_path: Path, feeds: Sequence[Feeds]
) -> None:
    """Of the layers, with their scales; the more bits, the nearer to float32."""
    source, target = ort_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH
    fp32 = [said[LOGITS] for said in run(source, *feeds)]
    weights = 2 * 32 * (64 + 2 * 32 + 64 + 2 * 64 + 64)
    errors = []
    for bits in (5.3, 7.0, 9.6):
        quantized_decoder(source, target, DecoderQuantization("int4", 32, "gptq", bits=bits), feeds)
        graph = onnx_ir.load(target)
        products = [node for node in graph.graph if node.op_type == "MatMulNBits"][:-1]
        taken = sum(
            8 * value.const_value.nbytes
            for node in products
            for value in node.inputs[1:]
            if value is not None and value.const_value is not None
        )
        assert bits - 1.6 < taken / weights <= bits
        wide = [node for node in products if node.attributes["bits"].as_int() == 8]
        assert (len(wide) == 0, len(wide) == 8) == (bits == 5.3, bits == 9.6)
        errors.append(
            np.mean(
                [
                    np.linalg.norm(said[LOGITS] - logits) / np.linalg.norm(logits)
                    for said, logits in zip(run(target, *feeds), fp32, strict=True)
                ]
            )
        )
    assert errors[0] > errors[1] > errors[2]


def test_bits_that_can_t_be_kept(ort_bundle: Path, tmp_path: Path, feeds: Sequence[Feeds]) -> None:
    how = DecoderQuantization("int4", 32, "gptq", bits=4.5)
    with pytest.raises(ConfigError, match=r"bits is too small: expected 5\.\d+ or more"):
        quantized_decoder(ort_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH, how, feeds)
    for weights, method in (("int8", "gptq"), ("int4", "rtn")):
        with pytest.raises(ConfigError, match="bits means nothing here"):
            DecoderQuantization(weights, 32, method, bits=6)  # type: ignore[arg-type]


def test_what_stood_there_is_replaced(ort_bundle: Path, tmp_path: Path) -> None:
    def written() -> dict[str, bytes]:
        how = DecoderQuantization()
        quantized_decoder(ort_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH, how)
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    assert written() == written()


def test_what_is_no_quantization() -> None:
    with pytest.raises(ConfigError, match=r"'int5'.*did you mean 'int"):
        DecoderQuantization("int5")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"'int5'.*did you mean 'int"):
        DecoderQuantization(head="int5")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"'gtpq'.*did you mean 'gptq'"):
        DecoderQuantization(method="gtpq")  # type: ignore[arg-type]
    for size in (0, 48, 256, "32", True):
        with pytest.raises(ConfigError, match=r"block_size is invalid: expected 32, 64 or 128"):
            DecoderQuantization(block_size=size)  # type: ignore[arg-type]


def test_gptq_without_calibration(ort_bundle: Path, tmp_path: Path) -> None:
    how = DecoderQuantization("int4", 32, "gptq")
    with pytest.raises(ConfigError, match="gptq has nothing to calibrate with"):
        quantized_decoder(ort_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH, how)
    assert not list(tmp_path.iterdir())


def test_calibration_inputs_of_another_graph(
    ort_bundle: Path, tmp_path: Path, feeds: Sequence[Feeds]
) -> None:
    how = DecoderQuantization("int4", 32, "gptq")
    wrong = {name: value for name, value in feeds[0].items() if name != "position_ids"}
    with pytest.raises(ExportError, match=r"can't run decoder\.onnx for calibration.*position_ids"):
        quantized_decoder(ort_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH, how, [wrong])


def test_a_quantized_graph_is_not_quantized_again(ort_bundle: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.onnx", tmp_path / "twice.onnx"
    quantized_decoder(ort_bundle / DECODER_GRAPH, once, DecoderQuantization())
    with pytest.raises(ExportError, match=r"^once\.onnx has nothing to quantize"):
        quantized_decoder(once, twice, DecoderQuantization())
    assert not twice.exists()


def test_the_weight_that_is_not_finite_is_named(ort_bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(ort_bundle / DECODER_GRAPH)
    [tensor] = [t for t in model.graph.initializer if t.name.endswith("1.mlp.down_proj.weight.T")]
    values = numpy_helper.to_array(tensor).copy()
    values[2, 3] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    source = tmp_path / DECODER_GRAPH
    onnx.save(model, source)
    with pytest.raises(
        ExportError, match=rf"cannot quantize.*{tensor.name}.*expected finite numbers"
    ):
        quantized_decoder(source, tmp_path / "out.onnx", DecoderQuantization())
    assert not (tmp_path / "out.onnx").exists()
