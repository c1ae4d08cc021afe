"""Bundles of the native dialect: the same model over a cache of fixed size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH, Dialect, Manifest
from himix_edge.errors import ConfigError, ExportError, ParityError
from himix_edge.export.bundle import DEFAULT_MAX_TEXT, export_bundle
from himix_edge.export.dialects import NATIVE_OPSET, require_native, require_portable
from himix_edge.export.expected import Expected, expected_from_model, trial_images
from himix_edge.export.onnx import write_graph
from himix_edge.export.rewrites import native_decoder, native_vision
from himix_edge.export.verify import BOUNDS, verify
from himix_edge.models.checkpoints import Checkpoint
from tests.export.conftest import Exported
from tests.tiny import tiny_config

CONFIG = tiny_config()  # 4 image tokens, positions for 256 tokens of text
SLOTS = 4 + 60


@pytest.fixture(scope="module")
def native_graphs(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    for name, rewrite in ((VISION_GRAPH, native_vision), (DECODER_GRAPH, native_decoder)):
        graph = onnx_ir.load(tiny_bundle / name)
        rewrite(graph, CONFIG, SLOTS)
        write_graph(graph, folder / name)
    return folder


@pytest.mark.usefixtures("ready_graphs")
def test_a_bundle_says_its_dialect_and_the_size_of_its_cache(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    exported = export_bundle(
        tiny_checkpoint, tmp_path / "bundle", dialect="native", max_text=60
    ).manifest
    manifest = Manifest.read(tmp_path / "bundle")
    assert manifest == exported
    assert (manifest.dialect, manifest.cache_slots) == ("native", SLOTS)
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert 'dialect "native" (opset 24, a cache of 64 slots)' in card


@pytest.mark.usefixtures("ready_graphs")
def test_by_default_the_cache_holds_as_much_as_the_model_up_to_a_limit(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    manifest = export_bundle(tiny_checkpoint, tmp_path / "bundle", dialect="native").manifest
    assert manifest.cache_slots == 4 + min(256, DEFAULT_MAX_TEXT)


def test_the_graphs_are_native_and_no_longer_portable(native_graphs: Path) -> None:
    for name in (VISION_GRAPH, DECODER_GRAPH):
        graph = onnx_ir.load(native_graphs / name)
        assert graph.opset_imports[""] == NATIVE_OPSET
        require_native(graph)
        graph.opset_imports[""] = 18
        with pytest.raises(ExportError, match=r"the portable dialect lacks.*found .*TensorScatter"):
            require_portable(graph)


def test_a_rewritten_graph_is_as_close_to_the_model_as_before(
    native_graphs: Path, tiny_checkpoint: Checkpoint
) -> None:
    parity = verify(_asked(tiny_checkpoint), native_graphs, CONFIG, "float32")
    assert parity.greedy_tokens == parity.greedy_tokens_equal >= 3
    worst = max(c.error for c in (*parity.vision.values(), *parity.decoder.values()))
    assert worst < BOUNDS["float32"].error / 10


def test_bfloat16_too(bfloat: Exported, tmp_path: Path) -> None:
    for name, rewrite in ((VISION_GRAPH, native_vision), (DECODER_GRAPH, native_decoder)):
        graph = onnx_ir.load(bfloat.folder / name)
        rewrite(graph, bfloat.checkpoint.config, SLOTS)
        write_graph(graph, tmp_path / name)
    parity = verify(_asked(bfloat.checkpoint), tmp_path, bfloat.checkpoint.config, "bfloat16")
    assert parity.greedy_tokens == parity.greedy_tokens_equal >= 3


def test_a_mask_that_shows_one_slot_too_many_is_noticed(
    native_graphs: Path, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Slots that nothing was written into hold other numbers than zero in the comparison."""
    for name in (VISION_GRAPH, DECODER_GRAPH):
        graph = onnx_ir.load(native_graphs / name)
        for value in graph.graph.initializers.values():
            if value.name == "mask.slots":
                value.const_value = onnx_ir.tensor(np.arange(-1, SLOTS - 1))
        onnx_ir.save(graph, tmp_path / name, external_data=f"{name}.data")
    with pytest.raises(ParityError, match="gives other numbers than the model"):
        verify(_asked(tiny_checkpoint), tmp_path, CONFIG, "float32")


@pytest.mark.parametrize(
    ("dialect", "max_text", "message"),
    [
        ("portable", 60, "max_text means nothing in the portable dialect.*--dialect native"),
        ("native", 257, "max_text is out of range: expected 1 to the 256 .* found 257"),
        ("native", 0, "found 0"),
        (
            "native",
            20,
            "max_text is too small: expected .* a short question and its answer, found 20",
        ),
    ],
)
def test_impossible_caches(
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    dialect: Dialect,
    max_text: int | None,
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", dialect=dialect, max_text=max_text)
    assert not list(tmp_path.iterdir())


def _asked(checkpoint: Checkpoint) -> Expected:
    images = trial_images(CONFIG.preprocess)
    return expected_from_model(checkpoint.model(), images, [[3, 9, 40, 7], [11, 12]])
