from __future__ import annotations

import numpy as np
import onnx_ir
import pytest

from himix_edge.contract import PIXEL_VALUES, past_names, present_names
from himix_edge.errors import ExportError
from himix_edge.export.rewrites.attention import DecoderAttention
from himix_edge.export.rewrites.tensor_scatter import fix_decoder_cache, fix_vision_cache
from himix_edge.export.sessions import UNWRITTEN
from tests.export.rewrites.conftest import (
    FILLED,
    HEAD_DIM,
    LAYERS,
    TOKENS,
    Subject,
    operators,
    raised,
)

SLOTS = 16
PAST = past_names(LAYERS)


def fixed_decoder(subject: Subject) -> onnx_ir.Model:
    graph = raised(subject.decoder())
    DecoderAttention.apply(graph, times=LAYERS)
    fix_decoder_cache(graph, PAST, SLOTS)
    return graph


def test_the_decoder_s_numbers_are_the_same(subject: Subject) -> None:
    logits, *present = subject.run(subject.decoder(), subject.decoder_feeds())
    found, *cache = subject.run(fixed_decoder(subject), subject.decoder_feeds(SLOTS))
    subject.same([logits], [found])
    subject.same(present, [part[:, :, : FILLED + TOKENS] for part in cache])


def test_the_decoder_writes_its_own_slots_alone(subject: Subject) -> None:
    feeds = subject.decoder_feeds(SLOTS)
    _, *cache = subject.run(fixed_decoder(subject), feeds)
    for name, part in zip(PAST, cache, strict=True):
        assert part.shape == (2, 2, SLOTS, HEAD_DIM)
        np.testing.assert_array_equal(part[:, :, :FILLED], feeds[name][:, :, :FILLED])
        assert not np.any(part[:, :, FILLED : FILLED + TOKENS] == UNWRITTEN)
        assert np.all(part[:, :, FILLED + TOKENS :] == UNWRITTEN)


def test_texts_of_a_batch_may_stand_at_different_slots(subject: Subject) -> None:
    feeds = subject.decoder_feeds(SLOTS)
    together, *_ = subject.run(fixed_decoder(subject), feeds)
    feeds["write_indices"] = np.array([FILLED, FILLED - 2])
    apart, *cache = subject.run(fixed_decoder(subject), feeds)
    np.testing.assert_allclose(apart[0], together[0], rtol=0, atol=subject.tolerance)
    assert np.abs(apart[1] - together[1]).max() > 10 * subject.tolerance
    assert np.all(cache[0][1, :, FILLED + 1 :] == UNWRITTEN)


def test_the_image_goes_into_the_first_slots(subject: Subject) -> None:
    image = subject.run(subject.vision(), subject.vision_feeds())
    graph = raised(subject.vision())
    fix_vision_cache(graph, PAST, SLOTS)
    feeds = subject.vision_feeds()
    feeds |= {
        name: np.full((2, 2, SLOTS, HEAD_DIM), i, subject.dtype) for i, name in enumerate(PAST)
    }
    cache = subject.run(graph, feeds)
    subject.same(image, [part[:, :, :4] for part in cache])
    for i, part in enumerate(cache):
        assert np.all(part[:, :, 4:] == i)


def test_names_and_sizes_are_the_contract_s(subject: Subject) -> None:
    decoder, vision = fixed_decoder(subject), raised(subject.vision())
    fix_vision_cache(vision, PAST, SLOTS)
    cache = ["batch", 2, SLOTS, HEAD_DIM]

    def sizes(values: list[onnx_ir.Value]) -> dict[str | None, list[object]]:
        return {
            value.name: [size if isinstance(size, int) else size.value for size in value.shape]  # type: ignore[union-attr]
            for value in values
        }

    tokens = ["batch", "tokens"]
    assert sizes(list(decoder.graph.inputs)) == {
        "input_ids": tokens,
        "position_ids": tokens,
        "write_indices": ["batch"],
        **dict.fromkeys(PAST, cache),
    }
    assert sizes(list(decoder.graph.outputs)) == {
        "logits": ["batch", 1, 300],
        **dict.fromkeys(present_names(LAYERS), cache),
    }
    assert sizes(list(vision.graph.inputs)) == {
        PIXEL_VALUES: ["batch", 3, 28, 28],
        **dict.fromkeys(PAST, cache),
    }
    assert sizes(list(vision.graph.outputs)) == dict.fromkeys(present_names(LAYERS), cache)
    assert operators(decoder)["TensorScatter"] == operators(vision)["TensorScatter"] == 2 * LAYERS


def test_a_graph_whose_cache_does_not_grow_is_refused(subject: Subject) -> None:
    with pytest.raises(ExportError, match=r"past_key_values.0.key is no cache that grows"):
        fix_decoder_cache(fixed_decoder(subject), PAST, SLOTS)
