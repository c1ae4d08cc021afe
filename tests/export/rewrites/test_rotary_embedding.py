from __future__ import annotations

from himix_edge.export.rewrites.rotary_embedding import RotaryEmbedding
from tests.export.rewrites.conftest import LAYERS, Subject, operators, raised


def test_the_same_numbers(subject: Subject) -> None:
    before = subject.run(subject.decoder(), subject.decoder_feeds())
    graph = raised(subject.decoder())
    RotaryEmbedding.apply(graph, times=2 * LAYERS)
    subject.same(before, subject.run(graph, subject.decoder_feeds()))


def test_queries_and_keys_of_all_layers_share_one_cos_and_one_sin(subject: Subject) -> None:
    graph = subject.decoder()
    RotaryEmbedding.apply(graph, times=2 * LAYERS)
    found = operators(graph)
    assert found["RotaryEmbedding"] == 2 * LAYERS
    assert (found["Cos"], found["Sin"], found["Neg"], found["Split"]) == (1, 1, 0, 0)
    rotary = [node for node in graph.graph if node.op_type == "RotaryEmbedding"]
    assert len({(node.inputs[1], node.inputs[2]) for node in rotary}) == 1
