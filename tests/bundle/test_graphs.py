"""Graphs that himix-edge writes are read; programs, foreign operators and bombs are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from himix_edge.bundle.files import BundleFiles
from himix_edge.bundle.graphs import checked_graph, read_graph
from himix_edge.contract import FileRecord
from himix_edge.errors import BundleError

PATH = Path("bundle/decoder.onnx")
FILES = {"decoder.onnx.data": FileRecord("", 64), "tokenizer.json": FileRecord("", 64)}


def tensor(values: object, dtype: type = np.int64, name: str = "shape") -> TensorProto:
    return onnx.numpy_helper.from_array(np.asarray(values, dtype), name)


def external(dims: tuple[int, ...], **entries: object) -> TensorProto:
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims)
    weights.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        entry = weights.external_data.add()
        entry.key, entry.value = key, str(value)
    return weights


def model(
    *nodes: onnx.NodeProto, constants: tuple[TensorProto, ...] = (), domain: str = ""
) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])
    graph = helper.make_graph(list(nodes), "graph", [value], [value], list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, 1)])


def read(graph: onnx.ModelProto) -> set[str]:
    return checked_graph(memoryview(graph.SerializeToString()), PATH, FILES).weights


def node(operator: str, *inputs: str, domain: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, list(inputs), ["x"], domain=domain, **attributes)


def test_a_graph_of_ours_is_read(tiny_bundle: Path) -> None:
    with BundleFiles.open(tiny_bundle) as files:
        for name in ("vision.onnx", "decoder.onnx"):
            data, weights = read_graph(files, name)
            graph = onnx.load_from_string(data)
            assert len(graph.graph.node) > 20
            assert list(weights) == [f"{name}.data"]
            size = files.manifest.files[f"{name}.data"].size
            assert len(weights[f"{name}.data"]) == size


def test_weights_beside_a_graph() -> None:
    assert read(model(constants=(external((4, 4), location="decoder.onnx.data"),))) == {
        "decoder.onnx.data"
    }
    half = external((2, 4), location="decoder.onnx.data", offset=32, length=32)
    assert read(model(constants=(half,))) == {"decoder.onnx.data"}


@pytest.mark.parametrize(
    "location", ["../x.data", "/etc/passwd", "", "gone.data", "tokenizer.json"]
)
def test_weights_elsewhere_are_refused(location: str) -> None:
    with pytest.raises(BundleError, match="expected weights in a file of the bundle, found"):
        read(model(constants=(external((4, 4), location=location),)))


@pytest.mark.parametrize(
    ("dims", "entries"),
    [
        ((4, 5), {}),
        ((4, 4), {"offset": 4}),
        ((4, 4), {"offset": -4}),
        ((4, 4), {"length": 60}),
        ((1 << 40, 1 << 40), {}),
        ((4, 4), {"offset": "x"}),
        ((-4, -4), {}),
    ],
)
def test_weights_that_are_not_there_are_refused(
    dims: tuple[int, ...], entries: dict[str, object]
) -> None:
    weights = external(dims, location="decoder.onnx.data", **entries)
    with pytest.raises(BundleError, match=r"decoder\.onnx is corrupt"):
        read(model(constants=(weights,)))


INNER = helper.make_graph([], "inner", [], [])


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        (model(node("Loop", "a", body=INNER)), "the operator 'Loop'"),
        (model(node("If", "a", then_branch=INNER, else_branch=INNER)), "the operator 'If'"),
        (model(node("Scan", "a", body=INNER, num_scan_inputs=1)), "the operator 'Scan'"),
        (model(node("SequenceMap", "a", body=INNER)), "the operator 'SequenceMap'"),
        (model(node("Relu", "a", hidden=INNER)), "a graph within the operator 'Relu'"),
        (model(node("Relu", "a", hidden=[INNER])), "a graph within the operator 'Relu'"),
        (model(node("Relu", "a", domain="ai.onnx.contrib")), "'ai.onnx.contrib.Relu'"),
        (model(node("Relu", "a"), domain="evil"), "operators of the domain 'evil'"),
        (model(node("EPContext", "a", domain="com.microsoft")), "'com.microsoft.EPContext'"),
        (model(node("BeamSearch", "a", domain="com.microsoft")), "'com.microsoft.BeamSearch'"),
        (
            model(node("ConstantOfShape", "shape"), constants=(tensor([1 << 20, 1 << 20]),)),
            "ConstantOfShape to [1048576, 1048576]",
        ),
        (
            model(node("Expand", "x", "shape"), constants=(tensor([1 << 31]),)),
            "Expand to [2147483648]",
        ),
        (
            model(node("Range", "a", "shape", "b"), constants=(tensor(1 << 40),)),
            "Range to [1099511627776]",
        ),
        (
            model(
                helper.make_node("Constant", [], ["shape"], value=tensor([1 << 40])),
                node("ConstantOfShape", "shape"),
            ),
            "ConstantOfShape to [1099511627776]",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_we_do_not_write_is_refused(graph: onnx.ModelProto, found: str) -> None:
    with pytest.raises(BundleError) as error:
        read(graph)
    assert "is not a graph that himix-edge writes" in str(error.value)
    assert found in str(error.value)


def test_functions_training_and_sparse_constants_are_refused() -> None:
    graph = model(node("Relu", "a"))
    graph.functions.add().name = "f"
    with pytest.raises(BundleError, match="found functions or training steps"):
        read(graph)
    graph = model(node("Relu", "a"))
    graph.training_info.add()
    with pytest.raises(BundleError, match="found functions or training steps"):
        read(graph)
    graph = model(node("Relu", "a"))
    graph.graph.sparse_initializer.add()
    with pytest.raises(BundleError, match="found sparse constants"):
        read(graph)


@pytest.mark.parametrize("raw", [True, False])
def test_a_constant_that_claims_more_than_it_holds(raw: bool) -> None:
    constant = helper.make_tensor("w", TensorProto.FLOAT, [4], np.ones(4, np.float32), raw=False)
    if raw:
        constant = tensor(np.ones(4), np.float32, "w")
    assert read(model(constants=(constant,))) == set()
    constant.dims[0] = 1 << 50
    with pytest.raises(BundleError, match="a constant of 4503599627370496 bytes"):
        read(model(constants=(constant,)))


def test_bytes_that_are_no_model() -> None:
    whole = model(node("Relu", "a"), constants=(tensor([1, 2, 3]),)).SerializeToString()
    for data in (b"\xff" * 20, b"\x3a\x05ab", b"\x0b", b"\x38\x01", whole[:-1]):
        with pytest.raises(BundleError, match="expected an ONNX model, found"):
            checked_graph(memoryview(data), PATH, FILES)


def test_every_cut_and_every_flipped_bit_is_a_model_or_an_error_of_ours() -> None:
    whole = model(
        node("Expand", "x", "shape"), constants=(tensor([1, 2, 3]), external((2, 2), location="y"))
    ).SerializeToString()
    outcomes = {True: 0, False: 0}

    def is_read(data: bytes) -> bool:
        try:
            checked_graph(memoryview(data), PATH, FILES)
        except BundleError:
            return False
        return True

    for at in range(len(whole)):
        for data in (whole[:at], *(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
                                   for bit in range(8))):  # fmt: skip
            outcomes[is_read(data)] += 1
    assert outcomes[False] > outcomes[True] > 0
