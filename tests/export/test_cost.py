"""What a changed graph costs, against the same figures computed by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from himix_edge.contract import DECODER_GRAPH, LOGITS, present_names
from himix_edge.errors import ConfigError
from himix_edge.export.calibration import Feeds
from himix_edge.export.cost import CalibrationFeeds, Exchange, decoder_cost
from tests import tolerances
from tests.export.conftest import PROMPTS, run
from tests.tiny import tiny_config

CONFIG = tiny_config()


def test_the_cost_of_no_change_is_none(ort_bundle: Path, exchanges: list[Exchange]) -> None:
    source = ort_bundle / DECODER_GRAPH
    cost = decoder_cost(source, source, CONFIG, exchanges)
    assert cost.tokens == sum(len(exchange.answer) for exchange in exchanges) >= 9
    assert cost.same_tokens == cost.tokens
    assert cost.perplexity == pytest.approx(cost.perplexity_before, rel=tolerances.GRAPH_LOGITS)
    assert set(cost.tensors) == {LOGITS, *present_names(2)}
    for closeness in cost.tensors.values():
        assert closeness.error < tolerances.GRAPH_LOGITS
        assert closeness.cosine == pytest.approx(1)


def test_the_cost_by_hand(ort_bundle: Path, tmp_path: Path, exchanges: list[Exchange]) -> None:
    """The final norm turned over: logits and their cosine change sign, keys and values stay."""
    source, target = ort_bundle / DECODER_GRAPH, tmp_path / DECODER_GRAPH
    graph = onnx.load(source)
    [norm] = [t for t in graph.graph.initializer if t.name.endswith("model.norm.weight")]
    norm.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(norm), norm.name))
    onnx.save(graph, target)
    cost = decoder_cost(source, target, CONFIG, exchanges)
    assert cost.same_tokens == 0
    assert cost.tensors[LOGITS].cosine == pytest.approx(-1, abs=1e-6)
    assert cost.tensors["present.1.value"].cosine == pytest.approx(1)
    whole = [(whole, token) for exchange in exchanges for whole, token in grown(exchange)]
    losses, turned = [], []
    for said, (_, token) in zip(run(source, *(f for f, _ in whole)), whole, strict=True):
        logits = said[LOGITS][0, 0].astype(np.float64)
        losses.append(np.log(np.exp(logits).sum()) - logits[token])
        turned.append(np.log(np.exp(-logits).sum()) + logits[token])
    assert cost.perplexity_before == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert cost.perplexity == pytest.approx(np.exp(np.mean(turned)), rel=1e-4)


def test_an_answer_is_the_likeliest_tokens(ort_bundle: Path, exchanges: list[Exchange]) -> None:
    assert len(exchanges) == 3 * len(PROMPTS)
    whole = [(whole, token) for exchange in exchanges for whole, token in grown(exchange)]
    said = run(ort_bundle / DECODER_GRAPH, *(feeds for feeds, _ in whole))
    assert [int(outputs[LOGITS].argmax()) for outputs in said] == [token for _, token in whole]


def grown(exchange: Exchange) -> list[tuple[Feeds, int]]:
    """All that was read before a token, in one go, and the token: for each of the answer's."""
    pairs = []
    for i, token in enumerate(exchange.answer):
        so_far = dataclasses.replace(exchange, answer=exchange.answer[: i + 1])
        pairs.append((CalibrationFeeds(CONFIG, [so_far], "any")[0], token))
    return pairs


def test_cost_without_exchanges(ort_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to measure with"):
        decoder_cost(ort_bundle / DECODER_GRAPH, ort_bundle / DECODER_GRAPH, CONFIG, [])
