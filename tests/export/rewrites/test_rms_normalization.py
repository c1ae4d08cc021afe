from __future__ import annotations

import numpy as np
import pytest

from himix_edge.errors import ExportError
from himix_edge.export.rewrites.rms_normalization import RMSNormalization
from tests.export.rewrites.conftest import CONFIG, LAYERS, Subject, operators, raised


def test_the_same_numbers(subject: Subject) -> None:
    before = subject.run(subject.decoder(), subject.decoder_feeds())
    graph = raised(subject.decoder())
    RMSNormalization.apply(graph, times=2 * LAYERS + 1)
    subject.same(before, subject.run(graph, subject.decoder_feeds()))


def test_one_node_for_each_norm(subject: Subject) -> None:
    graph = subject.decoder()
    RMSNormalization.apply(graph, times=2 * LAYERS + 1)
    found = operators(graph)
    assert found["RMSNormalization"] == 2 * LAYERS + 1
    assert not found.keys() & {"Pow", "ReduceMean", "Sqrt", "Reciprocal"}
    for node in graph.graph:
        if node.op_type == "RMSNormalization":
            epsilon = node.attributes["epsilon"].as_float()
            assert epsilon == pytest.approx(CONFIG.decoder.rms_norm_eps, rel=1e-6)
            assert node.attributes["stash_type"].as_int() == 1  # computed in fp32
            weight = node.inputs[1]
            assert weight is not None
            assert weight.const_value is not None
            assert weight.const_value.numpy().dtype == np.dtype(subject.dtype)


def test_a_graph_without_the_pattern_is_refused(subject: Subject) -> None:
    graph = subject.decoder()
    with pytest.raises(ExportError, match=r"no place for RMSNormalization: expected 6 .* found 5"):
        RMSNormalization.apply(graph, times=6)
