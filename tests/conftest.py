"""One checkpoint and one bundle for all tests. They are shared: copy what you change."""

from __future__ import annotations

from pathlib import Path

import pytest

from himix_edge.export.bundle import export_bundle
from himix_edge.models import checkpoints
from tests import tiny


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Checkpoint:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", tiny.tiny_config())


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoint: checkpoints.Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    export_bundle(tiny_checkpoint, folder)
    return folder
