from __future__ import annotations

import pytest

from himix_edge.errors import PromptError
from himix_edge.runtimes.kvcache import Cache
from tests.runtimes.fakes import tiny_config
from tests.tiny import converted_config


def test_positions_count_text_alone() -> None:
    cache = Cache((), length=728, image_slots=728, text_offset=0, capacity=728 + 64)
    assert (cache.text_length, cache.room) == (0, 64)
    assert cache.next_positions(2, 3).tolist() == [[0, 1, 2], [0, 1, 2]]
    cache.advance(("grown",), 3)
    assert (cache.tensors, cache.length, cache.text_length, cache.room) == (("grown",), 731, 3, 61)
    assert cache.next_positions(1, 1).tolist() == [[3]]


def test_positions_go_on_from_the_offset() -> None:
    cache = Cache((), length=10, image_slots=8, text_offset=8, capacity=20)
    assert cache.next_positions(1, 2).tolist() == [[10, 11]]


def test_the_capacity_is_what_positions_and_slots_allow() -> None:
    config = tiny_config(max_position_embeddings=64)
    assert Cache.after_image(config, (), 9).capacity == 9 + 64
    assert Cache.after_image(config, (), 9, most_slots=50).capacity == 50
    assert Cache.after_image(config, (), 9, most_slots=100).capacity == 9 + 64
    assert Cache.after_image(tiny_config("vanilla"), (), 9).capacity == 9 + 64 - 9


def test_a_converted_models_image_stands_ahead_of_position_0_and_takes_positions() -> None:
    config = converted_config(max_position_embeddings=64)
    after_image = Cache.after_image(config, (), config.image_slots)
    assert config.image_slots == after_image.length == 3 + 8
    assert after_image.capacity == 64
    assert after_image.next_positions(1, 2).tolist() == [[0, 1]]
    assert after_image.room == config.max_text_tokens == 64 - 11


def test_without_an_image_every_position_is_for_text() -> None:
    for config in (converted_config(max_position_embeddings=64), tiny_config("vanilla")):
        text_only = Cache.after_image(config, (), 0)
        assert text_only.capacity == text_only.room == config.decoder.max_position_embeddings
        assert text_only.next_positions(1, 2).tolist() == [[0, 1]]


def test_a_full_cache() -> None:
    cache = Cache((), length=10, image_slots=8, text_offset=0, capacity=12)
    assert cache.next_positions(1, 2).tolist() == [[2, 3]]
    with pytest.raises(
        PromptError, match="context is full: expected at most 2 more tokens, found 3"
    ):
        cache.next_positions(1, 3)


def test_what_may_be_used_again_ends_where_another_graph_began() -> None:
    cache = Cache((), length=9, image_slots=9, text_offset=0, capacity=40)
    cache.advance((), 5)
    cache.advance((), 2)
    assert cache.reusable == 7
    cache.advance((), 1, reusable=False)
    cache.advance((), 3)  # another prompt's tokens, after one that isn't as a prompt would have it
    assert (cache.reusable, cache.text_length) == (7, 11)
    cache.rewind(7)
    assert (cache.reusable, cache.text_length, cache.length) == (7, 7, 16)
    cache.advance((), 3)
    assert cache.reusable == 10
    cache.rewind(4)
    assert (cache.reusable, cache.length) == (4, 13)
    assert cache.next_positions(1, 2).tolist() == [[4, 5]]
