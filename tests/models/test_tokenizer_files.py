"""Tokenizers and chat templates, wherever a folder has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from himix_edge.errors import CheckpointError
from himix_edge.models.huggingface import decoder_from_folder
from himix_edge.models.tokenizer_files import chat_template_of
from tests import tiny
from tests.models.stock import (
    edit,
)


def test_chat_templates_wherever_they_are(qwen2: Path) -> None:
    jinja, config = qwen2 / "chat_template.jinja", qwen2 / "tokenizer_config.json"
    (qwen2 / "chat_template.json").write_text('{"chat_template": "the processor\'s"}')
    edit(config, chat_template=[
        {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"},
    ])  # fmt: skip
    assert chat_template_of(qwen2) == tiny.CHAT_TEMPLATE
    jinja.unlink()
    assert chat_template_of(qwen2) == "the default"
    edit(config, chat_template="the only")
    assert chat_template_of(qwen2) == "the only"
    edit(config, chat_template=...)
    assert chat_template_of(qwen2) == "the processor's"
    (qwen2 / "chat_template.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no chat template.*write the Jinja template .*jinja"
    ):
        decoder_from_folder(qwen2)
    edit(config, chat_template=[{"name": "tool_use", "template": "tools"}])
    with pytest.raises(CheckpointError, match="no chat template"):
        decoder_from_folder(qwen2)
    config.unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        decoder_from_folder(qwen2)
    jinja.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"cannot read .*chat_template\.jinja"):
        decoder_from_folder(qwen2)


def test_a_tokenizer_of_another_kind(qwen2: Path) -> None:
    """Vicuna's folder has sentencepiece's file alone."""
    (qwen2 / "tokenizer.json").rename(qwen2 / "tokenizer.model")
    with pytest.raises(
        CheckpointError,
        match=r"expected tokenizer\.json, found tokenizer\.model\. .*AutoTokenizer.*save_pretr",
    ):
        decoder_from_folder(qwen2)
