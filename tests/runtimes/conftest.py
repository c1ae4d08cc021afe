"""Tiny real bundles, exported once for all tests of the runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from himix_edge.export.bundle import export_bundle
from himix_edge.models.checkpoints import read_checkpoint, save_checkpoint
from himix_edge.models.himix import HiMix
from tests.models.reference import randomized
from tests.runtimes.fakes import CHAT_TEMPLATE, byte_tokenizer, tiny_config


@dataclass(frozen=True)
class TinyBundle:
    folder: Path
    model: HiMix


def _tiny_bundle(folder: Path, design: str, **options: Any) -> TinyBundle:
    model = HiMix(tiny_config(design))
    randomized(model)
    save_checkpoint(
        folder / "checkpoint",
        model,
        name="tiny",
        notice="It knows nothing.",
        tokenizer_json=byte_tokenizer().to_str(),
        chat_template=CHAT_TEMPLATE,
        model_card="# tiny\n",
    )
    export_bundle(read_checkpoint(folder / "checkpoint"), folder / "bundle", **options)
    return TinyBundle(folder / "bundle", model)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return _tiny_bundle(tmp_path_factory.mktemp("himix"), "himix")


@pytest.fixture(scope="session")
def vanilla_bundle(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return _tiny_bundle(tmp_path_factory.mktemp("vanilla"), "vanilla")


@pytest.fixture(scope="session")
def fixed_bundle(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """The model of `bundle` with a cache of 9 + 60 slots."""
    folder = tmp_path_factory.mktemp("fixed")
    return _tiny_bundle(folder, "himix", dialect="native", max_text=60)
