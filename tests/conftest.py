"""One checkpoint and its bundles for all tests. They are shared: copy what you change."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch

from himix_edge import cli
from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH
from himix_edge.export import bundle, onnx
from himix_edge.export.bundle import export_bundle
from himix_edge.models import checkpoints
from himix_edge.models.himix import HiMix, hollow_model
from tests import tiny


@pytest.fixture(scope="session", autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    """A weight that an export forgets to fill is wrong then, not right by chance."""

    def poisoned(*arguments: Any) -> HiMix:
        model = hollow_model(*arguments)
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "hollow_model", poisoned)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines that tests build are trusted by a key of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIMIX_EDGE_CONFIG", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _collect_garbage_seldom() -> None:
    """Tracing makes millions of objects, and each collection would look through all of torch's."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    tiny.tiny_checkpoint(folder, tiny.tiny_config())
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_folder: Path) -> checkpoints.Checkpoint:
    return checkpoints.read_checkpoint(tiny_folder)


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoint: checkpoints.Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    export_bundle(tiny_checkpoint, folder)
    return folder


@pytest.fixture(scope="session")
def half_bundle(
    tiny_checkpoint: checkpoints.Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same model in float16."""
    folder = tmp_path_factory.mktemp("half") / "bundle"
    export_bundle(tiny_checkpoint, folder, dtype="float16")
    return folder


def take_graphs(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Has an export take the portable graphs of a bundle instead of tracing them again."""
    for function, name in (
        ("vision_onnx_from_weights", VISION_GRAPH),
        ("decoder_onnx_from_weights", DECODER_GRAPH),
    ):
        graph = folder / name
        patch.setattr(bundle, function, lambda *_, graph=graph: onnx_ir.load(graph))


@pytest.fixture
def ready_graphs(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_graphs(monkeypatch, tiny_bundle)


@pytest.fixture(scope="session")
def ort_bundle(
    tiny_checkpoint: checkpoints.Checkpoint,
    tiny_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The same model with operators of ONNX Runtime's own."""
    folder = tmp_path_factory.mktemp("ort") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        take_graphs(patch, tiny_bundle)
        export_bundle(tiny_checkpoint, folder, dialect="ort")
    return folder


class Done:
    """What a command came to."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def himix(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line in this process."""

    def run(*arguments: object) -> Done:
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        code = end.value.code
        return Done(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run
