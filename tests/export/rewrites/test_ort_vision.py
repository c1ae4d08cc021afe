from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import onnx_ir
import pytest

from himix_edge.contract import present_names
from himix_edge.errors import ExportError
from himix_edge.export.onnx import vision_onnx_from_weights
from himix_edge.export.rewrites.ort_vision import ort_vision
from himix_edge.models.himix import hollow_model
from himix_edge.models.weights import random_weights
from tests.export.rewrites.conftest import CONFIG, LAYERS, Subject, operators
from tests.tiny import tiny_config

GELUS = tiny_config("hierarchical")
GELUS = dataclasses.replace(
    GELUS, vision=dataclasses.replace(GELUS.vision, hidden_act="gelu_pytorch_tanh")
)


@pytest.fixture(scope="module")
def gelus() -> onnx_ir.Model:
    """By tanh in the encoder, by the error function in the connectors."""
    weights = random_weights(hollow_model(GELUS).state_dict())
    return vision_onnx_from_weights(GELUS, weights)


@pytest.fixture(params=["whole", "flash"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By which operator attention is computed, and its name."""
    tokens = CONFIG.vision.num_image_tokens + (request.param == "whole")
    monkeypatch.setattr(sys.modules[ort_vision.__module__], "FLASH_TOKENS", tokens)
    return "Attention" if request.param == "whole" else "MultiHeadAttention"


@pytest.mark.usefixtures("attention")
def test_the_numbers_are_the_same(subject: Subject) -> None:
    before = subject.run(subject.vision(), subject.vision_feeds())
    graph = subject.vision()
    ort_vision(graph, CONFIG)
    subject.same(before, subject.run(graph, subject.vision_feeds()))


def test_the_outputs_are_those_of_the_contract(subject: Subject) -> None:
    graph, before = subject.vision(), subject.vision().graph
    ort_vision(graph, CONFIG)
    assert [v.name for v in graph.graph.outputs] == present_names(LAYERS)
    for side in ("inputs", "outputs"):
        assert [(v.name, v.dtype, v.shape) for v in getattr(graph.graph, side)] == [
            (v.name, v.dtype, v.shape) for v in getattr(before, side)
        ]


@pytest.mark.parametrize("subject", ["float32"], indirect=True)
def test_what_takes_the_place_of_primitives(subject: Subject, attention: str) -> None:
    graph = subject.vision()
    products = operators(graph)["MatMul"]
    ort_vision(graph, CONFIG)
    found = operators(graph)
    assert found[attention] == CONFIG.vision.num_hidden_layers
    assert found["Attention"] + found["MultiHeadAttention"] == CONFIG.vision.num_hidden_layers
    assert found["MatMul"] == products - 2 * CONFIG.vision.num_hidden_layers
    assert found["Softmax"] == found["Squeeze"] == 0
    assert found["Split"] == 1


@pytest.mark.parametrize("subject", ["float32"], indirect=True)
def test_both_kinds_of_gelu_are_one_node(subject: Subject, gelus: onnx_ir.Model) -> None:
    before = subject.run(gelus, subject.vision_feeds())
    graph = gelus.clone()
    ort_vision(graph, GELUS)
    found = [
        {name: attribute.as_string() for name, attribute in node.attributes.items()}
        for node in graph.graph
        if node.op_type == "Gelu"
    ]
    assert found.count({"approximate": "tanh"}) == GELUS.vision.num_hidden_layers
    assert found.count({}) == LAYERS  # a connector each
    assert not operators(graph).keys() & {"Erf", "Tanh"}
    subject.same(before, subject.run(graph, subject.vision_feeds()))


def test_a_graph_that_is_rewritten_already(tiny_bundle: Path) -> None:
    graph = onnx_ir.load(tiny_bundle / "vision.onnx")
    ort_vision(graph, CONFIG)
    with pytest.raises(ExportError, match=r"no place for WholeAttention.*expected 2.*found 0"):
        ort_vision(graph, CONFIG)
