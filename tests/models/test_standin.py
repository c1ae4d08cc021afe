"""A model of random weights: tokenizer and texts; tests/test_cli.py exports one and asks it."""

from __future__ import annotations

import pytest
import torch

from himix_edge.errors import ConfigError
from himix_edge.export.reference import tokenizer_of
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.models.standin import NOTICE, random_checkpoint
from himix_edge.runtimes.chat import user_message
from himix_edge.runtimes.tokenizer import Tokenizer
from tests.tiny import tiny_config

TEXTS = [
    "How many objects are there?",
    "  two spaces,\ttabs\nand\r\nlines ",
    "Zürich, Ελλάδα, 日本, 🙂",
    "<300> <|end|> 'tis {{ not }} special",
    "\x00\x7f\ufeff",
]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return random_checkpoint("pair", tiny_config(vocab_size=400))


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return tokenizer_of(checkpoint)


def test_it_says_that_it_knows_nothing(checkpoint: Checkpoint) -> None:
    assert checkpoint.name == "pair-random"
    assert checkpoint.notice == NOTICE
    assert NOTICE in checkpoint.model_card
    checkpoint.check()  # there is nothing to find


def test_it_is_the_same_model_every_time(checkpoint: Checkpoint) -> None:
    again = random_checkpoint("another", checkpoint.config).model().state_dict()
    for name, tensor in checkpoint.model().state_dict().items():
        assert torch.equal(tensor, again[name])


def test_the_template_is_the_words_alone(checkpoint: Checkpoint) -> None:
    assert tokenizer_of(checkpoint).chat.render([user_message("a")]) == "a\n"


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_its_bytes_and_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_turn(tokenizer.chat.first, text)
    assert len(ids) == len(text.encode()) + 1
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text + "\n"


def test_every_id_has_a_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 400
    assert [tokenizer.decode([i]) for i in (256, 257, 399)] == ["<256>", "<257>", "<399>"]
    texts = [tokenizer.decode([i]) for i in range(256)]
    assert all(texts)
    ascii_texts = {text for text in texts if text.isascii()}
    assert ascii_texts == {chr(i) for i in range(128)}


def test_a_vocabulary_without_room_for_bytes() -> None:
    with pytest.raises(ConfigError, match="256 or more: one id a byte, found 255"):
        random_checkpoint("pair", tiny_config(vocab_size=255))


def test_the_smallest_vocabulary() -> None:
    checkpoint = random_checkpoint("pair", tiny_config(vocab_size=256))
    assert tokenizer_of(checkpoint).vocab_size == 256
