from __future__ import annotations

import pytest

from himix_edge.export.rewrites.attention import DecoderAttention, EncoderAttention
from tests.export.rewrites.conftest import CONFIG, HEAD_DIM, LAYERS, Subject, operators, raised


def test_the_decoder_s_numbers_are_the_same(subject: Subject) -> None:
    before = subject.run(subject.decoder(), subject.decoder_feeds())
    graph = raised(subject.decoder())
    DecoderAttention.apply(graph, times=LAYERS)
    subject.same(before, subject.run(graph, subject.decoder_feeds()))


def test_the_encoder_s_numbers_are_the_same(subject: Subject) -> None:
    before = subject.run(subject.vision(), subject.vision_feeds())
    graph = raised(subject.vision())
    EncoderAttention.apply(graph, times=CONFIG.vision.num_hidden_layers)
    subject.same(before, subject.run(graph, subject.vision_feeds()))


def test_one_node_takes_the_place_of_products_and_softmax(subject: Subject) -> None:
    decoder, vision = subject.decoder(), subject.vision()
    products = operators(decoder)["MatMul"], operators(vision)["MatMul"]
    DecoderAttention.apply(decoder, times=LAYERS)
    EncoderAttention.apply(vision, times=CONFIG.vision.num_hidden_layers)
    for graph, before in zip((decoder, vision), products, strict=True):
        found = operators(graph)
        assert found["Attention"] == 2
        assert found["Softmax"] == found["Where"] == 0
        assert found["MatMul"] == before - 4


def test_no_attribute_that_tensorrt_refuses(subject: Subject) -> None:
    graph = subject.decoder()
    DecoderAttention.apply(graph, times=LAYERS)
    for node in graph.graph:
        if node.op_type == "Attention":
            assert set(node.attributes) == {"scale"}
            assert node.attributes["scale"].as_float() == pytest.approx(HEAD_DIM**-0.5, rel=1e-3)
            assert node.inputs[0] is not None
            assert node.inputs[0].producer().op_type != "Mul"  # type: ignore[union-attr]
