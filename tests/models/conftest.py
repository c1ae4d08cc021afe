"""A folder of each kind, for whoever damages one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.stock import write_decoder, write_encoder


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    write_encoder(tmp_path / "clip", "CLIPVisionModel")
    return tmp_path / "clip"


@pytest.fixture
def qwen2(tmp_path: Path) -> Path:
    write_decoder(tmp_path / "qwen2", "qwen2")
    return tmp_path / "qwen2"


@pytest.fixture
def llama3(tmp_path: Path) -> Path:
    write_decoder(tmp_path / "llama3", "llama3")
    return tmp_path / "llama3"
