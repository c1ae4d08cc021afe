from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from himix_edge.export.products import weight_products
from himix_edge.export.rewrites.dequantize_linear import OPSETS, dequantize
from himix_edge.export.sessions import lean_session
from himix_edge.export.symmetric import WeightType, codes_of, dequantized, scales_of
from tests import tolerances

Array = NDArray[Any]
ROWS, COLUMNS = 128, 6
KINDS: list[tuple[WeightType, int | None]] = [
    ("int8", None),
    ("fp8", None),
    ("int4", 64),
    ("int4", 128),  # one block: as a scale to each output, but for the shape
]
FLOATS = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float16)
INPUT = np.random.default_rng(1).standard_normal((3, ROWS)).astype(np.float16)


def product_graph(op_type: str, opset: int = 18, dtype: str = "float16") -> onnx_ir.Model:
    """x W, or x (W^T)^T as the head has it; a lookup reads the same weight."""
    floats = FLOATS.astype(dtype)
    stored = floats if op_type == "MatMul" else np.ascontiguousarray(floats.T)
    options: dict[str, Any] = {"transB": 1} if op_type == "Gemm" else {}
    nodes = [
        helper.make_node(op_type, ["x", "weight"], ["y"], **options),
        helper.make_node("Gather", ["weight", "rows"], ["looked_up"]),
    ]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "product",
        [
            helper.make_tensor_value_info("x", element, ["M", ROWS]),
            helper.make_tensor_value_info("rows", TensorProto.INT64, [1]),
        ],
        [
            helper.make_tensor_value_info("y", element, ["M", COLUMNS]),
            helper.make_tensor_value_info("looked_up", element, [1, stored.shape[1]]),
        ],
        [numpy_helper.from_array(stored, "weight")],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", opset)])
    return onnx_ir.from_proto(model)


def rewritten(
    path: Path, op_type: str, weights: WeightType, block_size: int | None
) -> tuple[Array, Array]:
    """Writes the graph, its weights in a file beside it; gives the codes and scales."""
    graph = product_graph(op_type)
    [product] = weight_products(graph)
    scales = scales_of(product.matrix(), weights, block_size)
    codes = codes_of(product.matrix(), weights, scales)
    dequantize(graph, product, weights, scales, lambda: codes)
    onnx_ir.save(graph, path, external_data=f"{path.name}.data", size_threshold_bytes=0)
    onnx.checker.check_model(path, full_check=True)
    return codes, scales


@pytest.mark.parametrize("op_type", ["MatMul", "Gemm"])
@pytest.mark.parametrize(("weights", "block_size"), KINDS)
def test_the_product_is_that_of_the_dequantized_weights(
    tmp_path: Path, op_type: str, weights: WeightType, block_size: int | None
) -> None:
    path = tmp_path / "graph.onnx"
    codes, scales = rewritten(path, op_type, weights, block_size)
    expected = INPUT.astype(np.float64) @ dequantized(codes, scales)
    feeds = {"x": INPUT, "rows": np.array([2])}
    stored = FLOATS if op_type == "MatMul" else FLOATS.T
    for runtime in (lean_session(path), ReferenceEvaluator(onnx.load(path))):
        outputs: Any = runtime.run(["y", "looked_up"], feeds)
        y, looked_up = outputs
        error = np.abs(y - expected).max() / np.abs(expected).max()
        assert error < tolerances.HALF_PRODUCT
        np.testing.assert_array_equal(looked_up[0], stored[2])  # the floats are still there
    assert np.abs(INPUT.astype(np.float64) @ FLOATS - expected).max() / np.abs(expected).max() > (
        2 * tolerances.HALF_PRODUCT
    )


@pytest.mark.parametrize("op_type", ["MatMul", "Gemm"])
@pytest.mark.parametrize(("weights", "block_size"), KINDS)
def test_what_is_in_the_file(
    tmp_path: Path, op_type: str, weights: WeightType, block_size: int | None
) -> None:
    """Bytes as the ONNX specification orders them: rows first, the first of two nibbles low."""
    path = tmp_path / "graph.onnx"
    codes, scales = rewritten(path, op_type, weights, block_size)
    turned = op_type == "Gemm"
    graph = onnx.load(path).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    laid_out = codes.T if turned else codes
    if weights == "int4":
        nibbles = laid_out.astype(np.int64).reshape(-1) % 16
        expected = (nibbles[0::2] + 16 * nibbles[1::2]).astype(np.uint8).tobytes()
    else:
        expected = np.ascontiguousarray(laid_out).tobytes()
    stored = tensors["weight.codes"]
    assert stored.raw_data == expected
    assert list(stored.dims) == list(laid_out.shape)
    types = {"int8": "INT8", "int4": "INT4", "fp8": "FLOAT8E4M3FN"}
    assert stored.data_type == TensorProto.DataType.Value(types[weights])
    np.testing.assert_array_equal(
        numpy_helper.to_array(stored).astype(np.float32), laid_out.astype(np.float32)
    )
    [node] = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    options = {option.name: helper.get_attribute_value(option) for option in node.attribute}
    blocked = weights == "int4"
    assert options == (
        {"axis": int(turned), "block_size": block_size} if blocked else {"axis": int(not turned)}
    )
    found = numpy_helper.to_array(tensors["weight.scales"])
    assert found.dtype == np.float16
    assert len(node.input) == 2  # no zero points
    np.testing.assert_array_equal(found, (scales.T if turned else scales) if blocked else scales[0])


@pytest.mark.parametrize(("opset", "weights"), [(18, "int4"), (18, "int8"), (24, "fp8")])
def test_the_opset_rises_to_one_that_knows_the_codes(opset: int, weights: WeightType) -> None:
    graph = product_graph("MatMul", opset)
    [product] = weight_products(graph)
    scales = scales_of(FLOATS, weights, 64 if weights == "int4" else None)
    dequantize(graph, product, weights, scales, lambda: codes_of(FLOATS, weights, scales))
    assert graph.opset_imports[""] == max(opset, OPSETS[weights])


def test_a_product_that_must_be_in_float32_stays_there(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    graph = product_graph("MatMul", dtype="float32")
    [product] = weight_products(graph)
    scales = scales_of(product.matrix(), "int4", 64)
    codes = codes_of(product.matrix(), "int4", scales)
    dequantize(graph, product, "int4", scales, lambda: codes)
    onnx_ir.save(graph, path)
    assert scales.dtype == np.float32
    x = INPUT.astype(np.float32)
    [y] = lean_session(path).run(["y"], {"x": x, "rows": np.array([0])})
    np.testing.assert_allclose(y, x @ dequantized(codes, scales), rtol=0, atol=tolerances.REWRITE)


def test_codes_are_made_when_the_graph_is_written(tmp_path: Path) -> None:
    graph = product_graph("MatMul")
    [product] = weight_products(graph)
    scales = scales_of(FLOATS, "int8")
    made = []

    def read() -> Array:
        made.append(codes_of(FLOATS, "int8", scales))
        return made[-1]

    dequantize(graph, product, "int8", scales, read)
    assert not made
    onnx_ir.save(graph, tmp_path / "graph.onnx", external_data="graph.onnx.data")
    assert made
