"""A bundle in bfloat16, for whoever widens it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest

from himix_edge.export.bundle import export_bundle
from himix_edge.models.checkpoints import Checkpoint
from tests import tiny


class Exported(NamedTuple):
    checkpoint: Checkpoint
    folder: Path


@pytest.fixture(scope="session")
def bfloat(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Heads of 16, whose scale of 1/4 bfloat16 has exactly."""
    config = tiny.tiny_config(head_dim=16)
    vision = dataclasses.replace(config.vision, num_attention_heads=2)
    folder = tmp_path_factory.mktemp("bfloat")
    checkpoint = tiny.tiny_checkpoint(
        folder / "checkpoint", dataclasses.replace(config, vision=vision)
    )
    export_bundle(checkpoint, folder / "bundle", dtype="bfloat16")
    return Exported(checkpoint, folder / "bundle")
