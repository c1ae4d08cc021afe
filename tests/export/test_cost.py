"""What graphs in floats answer; and how close image tokens come, against figures by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from himix_edge.contract import DECODER_GRAPH, LOGITS, VISION_GRAPH, present_names
from himix_edge.export.calibration import Feeds
from himix_edge.export.cost import CalibrationFeeds, Exchange, _feature, _worse, vision_cost
from tests.export.conftest import PROMPTS, run
from tests.tiny import tiny_config

CONFIG = tiny_config()


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


def test_the_worst_token_of_an_image(ort_bundle: Path) -> None:
    """One token's keys in one head turned round, and that token is named."""
    config = tiny_config()
    rng = np.random.default_rng(0)
    images = [rng.standard_normal((1, 3, 28, 28)).astype(np.float32) for _ in range(2)]
    same = vision_cost(ort_bundle / VISION_GRAPH, ort_bundle / VISION_GRAPH, config, images)
    assert set(same) == set(present_names(2))
    assert all(feature.token_cosine == pytest.approx(1) for feature in same.values())
    expected = rng.standard_normal((1, 2, 4, 16)).astype(np.float32)
    found = expected.copy()
    found[:, 0, 2] *= -1  # a head of token 2
    norms = (expected[0, :, 2].astype(np.float64) ** 2).sum(-1)
    feature = _feature(found, expected)
    assert feature.token == 2
    assert feature.token_cosine == pytest.approx((norms[1] - norms[0]) / norms.sum())
    total = (expected.astype(np.float64) ** 2).sum()
    assert feature.cosine == pytest.approx((total - 2 * norms[0]) / total)
    worse = _worse(feature, same["present.0.key"])
    assert (worse.token, worse.cosine) == (2, feature.cosine)
