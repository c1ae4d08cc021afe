"""Bundles in float16 of a model that float16 can't hold, from the checkpoint to the model card."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir
import pytest
from PIL import Image

from himix_edge.contract import MODEL_CARD, VISION_GRAPH, Manifest
from himix_edge.errors import ConfigError, ExportError
from himix_edge.export.bundle import export_bundle
from himix_edge.export.expected import trial_images
from himix_edge.export.sessions import VisionSession
from himix_edge.export.verify import Closeness
from himix_edge.export.weight_only import WeightOnly, quantize_weights
from himix_edge.models.checkpoints import Checkpoint, read_checkpoint, save_checkpoint
from himix_edge.models.himix import HiMix
from tests.export.test_wide import blocks, massive_channel
from tests.tiny import tiny_checkpoint, tiny_config
from tests.tolerances import INT8_KV_COSINE


def checkpoint_of(folder: Path, model: HiMix, sound: Checkpoint) -> Checkpoint:
    save_checkpoint(
        folder,
        model,
        name="tiny",
        notice="",
        tokenizer_json=sound.tokenizer_json,
        chat_template=sound.chat_template,
        model_card="# tiny\n",
    )
    return read_checkpoint(folder)


@pytest.fixture
def sound(tmp_path: Path) -> Checkpoint:
    return tiny_checkpoint(tmp_path / "sound", tiny_config())


def test_what_overflows_is_wide_in_the_bundle_and_named_in_it(
    sound: Checkpoint, tmp_path: Path
) -> None:
    """In the native dialect, where attention in float32 has to stay in primitives."""
    model = sound.model()
    massive_channel(model)
    attention = blocks(model)[1].self_attn
    attention.q_proj.weight *= 300
    attention.k_proj.weight *= 300
    checkpoint = checkpoint_of(tmp_path / "large", model, sound)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "pictures" / "red.png")
    exported = export_bundle(
        checkpoint,
        tmp_path / "bundle",
        dtype="float16",
        dialect="native",
        calibration=tmp_path / "pictures",
    )
    ranges = exported.manifest.ranges
    assert ranges is not None
    assert ranges["images"] == 4  # three scenes and the picture
    assert ranges["in_float32"] == (
        "the residual stream, attention of block 1, MLP of block 0, "
        "the projections to keys and values"
    )
    assert ranges["encoder"][0]["mlp"]["output"] > 65504
    assert exported.manifest == Manifest.read(tmp_path / "bundle")
    card = (tmp_path / "bundle" / MODEL_CARD).read_text(encoding="utf-8")
    assert f"and: {ranges['in_float32']}." in card
    assert f"output {ranges['encoder'][0]['mlp']['output']:,.1f} *" in card
    graph = onnx.load(tmp_path / "bundle" / VISION_GRAPH, load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    assert (operators.count("Attention"), operators.count("Softmax")) == (1, 1)

    # Quantized, each weight's scales are of the weight's own type.
    small = tmp_path / VISION_GRAPH
    quantize_weights(tmp_path / "bundle" / VISION_GRAPH, small, WeightOnly("int8"))
    pixels = trial_images(checkpoint.config.preprocess)[0]
    found = VisionSession(small, checkpoint.config).encode(pixels)
    exact = VisionSession(tmp_path / "bundle" / VISION_GRAPH, checkpoint.config).encode(pixels)
    for part, expected in zip(found, exact, strict=True):
        assert Closeness.of(part, expected).cosine > INT8_KV_COSINE
    scales = {
        value.dtype
        for name, value in onnx_ir.load(small).graph.initializers.items()
        if name.endswith(".scales")
    }
    assert scales == {onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16}


def test_a_cache_that_float16_cannot_hold_leaves_nothing(sound: Checkpoint, tmp_path: Path) -> None:
    model = sound.model()
    for weight in model.injection.parameters():
        weight.mul_(5e4)
    checkpoint = checkpoint_of(tmp_path / "large", model, sound)
    with pytest.raises(ExportError, match=r"does not fit into float16.* in the cache, present\."):
        export_bundle(checkpoint, tmp_path / "bundle", dtype="float16")
    assert not (tmp_path / "bundle").exists()


def test_a_folder_without_pictures_is_an_error(sound: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected 1 or more .*found no such folder"):
        export_bundle(sound, tmp_path / "bundle", dtype="float16", calibration=tmp_path / "none")
    assert not (tmp_path / "bundle").exists()


def test_a_text_beside_the_pictures_that_cannot_be_read(sound: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "prompts.txt").write_bytes("Où?\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"prompts\.txt, line 1 is no text: expected UTF-8"):
        export_bundle(sound, tmp_path / "bundle", dtype="float16", calibration=tmp_path)
    assert not (tmp_path / "bundle").exists()
