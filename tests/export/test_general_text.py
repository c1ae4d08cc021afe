"""General text to calibrate with: what it is, and the inputs that are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from himix_edge.bundle.files import BundleFiles
from himix_edge.contract import POSITION_IDS, WRITE_INDICES, past_names
from himix_edge.export.calibration import Feeds
from himix_edge.export.cost import Exchange
from himix_edge.export.general_text import (
    MAX_TOKENS,
    TEXTS,
    JoinedFeeds,
    TextFeeds,
    general_sequences,
)
from himix_edge.runtimes.tokenizer import Tokenizer
from tests.tiny import tiny_config

CONFIG = tiny_config()
SEQUENCES = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


def test_the_texts_are_of_several_registers_and_none_is_left_out(ort_bundle: Path) -> None:
    tokenizer = Tokenizer.from_bundle(BundleFiles.open(ort_bundle))
    texts = sorted(TEXTS.glob("*.txt"))
    assert len(texts) >= 5
    sequences = general_sequences(tokenizer, 200)
    assert max(map(len, sequences)) == 200
    assert MAX_TOKENS * 0.9 < sum(map(len, sequences)) <= MAX_TOKENS  # of a tokenizer of bytes
    said = [tokenizer.decode(ids) for ids in sequences]
    for text in texts:
        assert text.read_text(encoding="utf-8")[:40] in "".join(said)


def test_every_second_sequence_follows_an_image(exchanges: list[Exchange]) -> None:
    images = [exchange.image for exchange in exchanges[:2]]
    slots = CONFIG.image_slots
    feeds = TextFeeds(CONFIG, SEQUENCES, images, "any")
    assert len(feeds) == 3
    first, second, third = feeds[:]
    for ids, alone in ((SEQUENCES[0], first), (SEQUENCES[2], third)):
        assert alone["input_ids"].tolist() == [ids]
        assert alone[POSITION_IDS].tolist() == [list(range(len(ids)))]
        assert alone[WRITE_INDICES].tolist() == [0]
    assert second[POSITION_IDS].tolist() == [[0, 1]]
    assert second[WRITE_INDICES].tolist() == [slots]
    np.testing.assert_array_equal(second[past_names(1)[0]][:, :, :slots], images[1][0])


def test_a_cache_that_grows_always_has_an_image(exchanges: list[Exchange]) -> None:
    feeds = TextFeeds(CONFIG, SEQUENCES, [exchanges[0].image])
    assert [one[past_names(1)[0]].shape[2] for one in feeds] == [CONFIG.image_slots] * 3


def test_joined_inputs_are_those_of_one_and_of_the_other(feeds: Sequence[Feeds]) -> None:
    joined = JoinedFeeds(feeds[:2], feeds[2:3])
    assert len(joined) == len(list(joined)) == 3
    for one, other in zip(joined, feeds[:3], strict=True):
        np.testing.assert_array_equal(one["input_ids"], other["input_ids"])
    assert len(joined[1:]) == 2
    with pytest.raises(IndexError):
        joined[3]
