from __future__ import annotations

from typing import Any

import pytest

from himix_edge.convert.questions import prompt_encoder
from himix_edge.convert.teacher import TeacherSource
from himix_edge.errors import CheckpointError, ExportError
from tests.tiny import CHAT_TEMPLATE, tiny_config, tiny_tokenizer


def source(**changes: str) -> TeacherSource:
    texts: dict[str, Any] = {
        "tokenizer_json": tiny_tokenizer().to_str(),
        "chat_template": CHAT_TEMPLATE,
        **changes,
    }
    return TeacherSource("tiny", "llava", "", "", tiny_config("vanilla"), {}, (), **texts)


def test_a_prompt_is_encoded_within_the_chat_template() -> None:
    encoder = prompt_encoder(source())
    expected = tiny_tokenizer().encode("<|user|>How many?<|assistant|>").ids
    assert encoder.encode_turn(encoder.chat.first, "How many?") == expected


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"tokenizer_json": "{}"}, CheckpointError), ({"chat_template": "{{ 1"}, ExportError)],
)
def test_a_source_without_a_usable_tokenizer_is_refused(
    changes: dict[str, str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        prompt_encoder(source(**changes))
