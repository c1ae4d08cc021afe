"""Products in int8: a row's numbers, and that they are the row's alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from himix_edge.export.int8 import replace_products
from himix_edge.export.products import weight_products
from himix_edge.export.sessions import packed_session

Array = NDArray[np.float32]
K, WIDTHS = 70, (48, 33)  # no multiples of what vectors hold
RANDOM = np.random.default_rng(0)
WEIGHTS: list[Array] = [RANDOM.normal(size=(K, n)).astype(np.float32) for n in WIDTHS]
BIAS: Array = RANDOM.normal(size=WIDTHS[0]).astype(np.float32)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """x W0 + b and x W1, of one x [B, M, K]."""
    path = tmp_path_factory.mktemp("int8") / "products.onnx"
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["y0"]),
        helper.make_node("MatMul", ["x", "w1"], ["y1"]),
    ]
    values = {"w0": WEIGHTS[0], "w1": WEIGHTS[1], "b": BIAS}
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "M", size])
        for name, size in (("x", K), ("y0", WIDTHS[0]), ("y1", WIDTHS[1]))
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in values.items()]
    graph = helper.make_graph(nodes, "products", infos[:1], infos[1:], constants)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path
    )
    model = onnx_ir.load(path)
    replace_products(model, weight_products(model))
    onnx_ir.save(model, path)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("MatMulIntegerToFloat") == 2
    assert operators.count("QuantizeLinear") == 1  # which they share
    return packed_session(path)


def rows(count: int, seed: int = 1) -> Array:
    """[count, K], of sizes from 1e-30 to 1e30; some of one sign, some with a few large values."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, K))
    x[::3] = np.abs(x[::3]) * rng.choice([-1, 1], size=(len(x[::3]), 1))
    x[::4, :3] *= 300
    x *= 10.0 ** rng.integers(-3, 4, size=(count, 1))
    x[1 % count] *= 1e30
    x[2 % count] *= 1e-30
    return x.astype(np.float32)


def formula(x: Array) -> tuple[Array, Array]:
    """In float32, every operation in the order in which the graph has it: bit for bit."""
    above = x.max(-1, keepdims=True) * np.float32(1 / 127)
    below = x.min(-1, keepdims=True) * np.float32(-1 / 128)
    steps = np.maximum(np.maximum(above, below), np.float32(2.0**-100))
    codes = np.clip(np.rint(x / steps), -128, 127).astype(np.int32)
    ys = []
    for matrix in WEIGHTS:
        scales = np.maximum(matrix.max(0) / 63, matrix.min(0) / -64).astype(np.float32)
        weights = np.clip(np.rint(matrix / scales), -64, 63).astype(np.int32)
        ys.append((codes @ weights).astype(np.float32) * scales * steps)
    return ys[0] + BIAS, ys[1]


def test_the_formula(session: Any) -> None:
    x = rows(90)
    for y, expected in zip(session.run(None, {"x": x[None]}), formula(x), strict=True):
        np.testing.assert_allclose(y[0], expected, rtol=1e-6, atol=0)


def test_it_is_near_the_float_product(session: Any) -> None:
    x = rows(90)
    exact = x.astype(np.float64) @ WEIGHTS[1]
    _, y = session.run(None, {"x": x[None]})
    error = np.linalg.norm(y[0] - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert error.max() < 0.1  # a few large values leave the others few codes
    assert np.median(error) < 0.02


def test_a_row_is_the_same_in_any_company(session: Any) -> None:
    """In steps of one, of seven and all; as a batch; in another order; beside what is no number."""
    x = rows(42)
    whole = session.run(None, {"x": x[None]})
    for size in (1, 7, 20):
        parts = [session.run(None, {"x": x[None, i : i + size]}) for i in range(0, 42, size)]
        for y, part in zip(whole, zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(np.concatenate(part, axis=1), y)
    for shape in ((42, 1), (2, 21), (6, 7)):
        for y, other in zip(whole, session.run(None, {"x": x.reshape(*shape, K)}), strict=True):
            np.testing.assert_array_equal(other.reshape(y.shape), y)
    order = np.random.default_rng(2).permutation(42)
    for y, other in zip(whole, session.run(None, {"x": x[None, order]}), strict=True):
        np.testing.assert_array_equal(other, y[:, order])
    spoiled = x.copy()
    spoiled[5], spoiled[6] = np.nan, np.inf
    for y, other in zip(whole, session.run(None, {"x": spoiled[None]}), strict=True):
        np.testing.assert_array_equal(np.delete(other, (5, 6), 1), np.delete(y, (5, 6), 1))


def test_rows_of_zeros_and_of_enormous_values(session: Any) -> None:
    x = np.zeros((4, K), np.float32)
    x[1] = 1e36
    x[2] = -np.finfo(np.float32).tiny / 8  # less than any normal number
    x[3, 0], x[3, 1] = 3e36, -3e36
    y0, y1 = session.run(None, {"x": x[None]})
    np.testing.assert_array_equal(y0[0, [0, 2]], np.stack([BIAS, BIAS]))
    np.testing.assert_array_equal(y1[0, [0, 2]], 0)
    np.testing.assert_allclose(y1[0, 1], 1e36 * WEIGHTS[1].sum(0), rtol=0, atol=1e36)
    exact = 3e36 * (WEIGHTS[1][0] - WEIGHTS[1][1])
    np.testing.assert_allclose(y1[0, 3], exact, rtol=0, atol=2e35)
