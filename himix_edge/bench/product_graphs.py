"""The two tiny graphs that a machine's product rates are measured with, made where `onnx` is.

    fp32.onnx   x [M, 1024] float32 -> x W, W [1024, 4096] float32
    int8.onnx   x [M, 1024] uint8   -> x W in int32, W int8

W[k, n] = (7919 (4096 k + n)) mod 251 - 125. It is computed in the graph, from constants alone, so
that ONNX Runtime computes it when it opens the graph and then packs it like any other weight.

    python -m himix_edge.bench.product_graphs     writes both into the package
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

PRODUCTS = Path(__file__).parents[1] / "assets" / "products"
FP32_GRAPH, INT8_GRAPH = PRODUCTS / "fp32.onnx", PRODUCTS / "int8.onnx"
DEPTH, WIDTH = 1024, 4096  # K and N: 4 M weights, more than the second-level caches hold
STEP, MODULUS, HALF = 7919, 251, 125


def product_graph(*, int8: bool) -> Any:
    """One of the two, as an onnx.ModelProto."""
    from onnx import TensorProto, helper

    weight, source, result = TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT
    if int8:
        weight, source, result = TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32
    numbers = {"zero": 0, "one": 1, "count": DEPTH * WIDTH}
    numbers |= {"step": STEP, "modulus": MODULUS, "half": HALF}
    constants = [helper.make_tensor(n, TensorProto.INT64, [], [v]) for n, v in numbers.items()]
    constants.append(helper.make_tensor("shape", TensorProto.INT64, [2], [DEPTH, WIDTH]))
    nodes = [
        helper.make_node("Range", ["zero", "count", "one"], ["index"]),
        helper.make_node("Mul", ["index", "step"], ["stepped"]),
        helper.make_node("Mod", ["stepped", "modulus"], ["reduced"]),
        helper.make_node("Sub", ["reduced", "half"], ["centred"]),
        helper.make_node("Reshape", ["centred", "shape"], ["matrix"]),
        helper.make_node("Cast", ["matrix"], ["weight"], to=weight),
        helper.make_node("MatMulInteger" if int8 else "MatMul", ["x", "weight"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", source, ["M", DEPTH])],
        [helper.make_tensor_value_info("y", result, ["M", WIDTH])],
        constants,
    )
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8, producer_name="himix-edge")


def write_graphs() -> None:
    """Writes both files."""
    from himix_edge.files import whole_file

    for path in (FP32_GRAPH, INT8_GRAPH):
        with whole_file(path) as file:
            file.write_bytes(product_graph(int8=path == INT8_GRAPH).SerializeToString())


if __name__ == "__main__":
    write_graphs()
