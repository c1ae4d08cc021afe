"""A bfloat16 graph in float32: the same nodes and the same rounded weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch

from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH
from himix_edge.export.graphs import DecoderGraph, flat
from himix_edge.export.sessions import DecoderSession, VisionSession
from himix_edge.export.widen import write_widened
from himix_edge.models.himix import HiMix
from tests.export.conftest import Exported
from tests.models.reference import random_ids, random_tensor
from tests.tolerances import BFLOAT16_CONSTANTS, GRAPH_LOGITS

GRAPHS = (VISION_GRAPH, DECODER_GRAPH)


@pytest.fixture(scope="module")
def widened(bfloat: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("widened")
    for name in GRAPHS:
        write_widened(bfloat.folder / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def rounded(bfloat: Exported) -> HiMix:
    """The model in fp32, with weights that bfloat16 has."""
    model = bfloat.checkpoint.model()
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())
    return model


@pytest.mark.parametrize("name", GRAPHS)
def test_no_bfloat16_is_left_and_no_node_is_new(bfloat: Exported, widened: Path, name: str) -> None:
    assert sorted(path.name for path in widened.iterdir()) == sorted(
        [*GRAPHS, *(f"{graph}.data" for graph in GRAPHS)]
    )
    onnx.checker.check_model(widened / name, full_check=True)
    narrow, wide = (onnx_ir.load(folder / name).graph for folder in (bfloat.folder, widened))
    assert [node.op_type for node in wide] == [node.op_type for node in narrow]
    values = [*wide.inputs, *wide.outputs, *wide.initializers.values()]
    assert {value.dtype for value in values} <= {onnx_ir.DataType.FLOAT, onnx_ir.DataType.INT64}
    casts = [node.attributes["to"].as_int() for node in wide if node.op_type == "Cast"]
    assert onnx_ir.DataType.BFLOAT16 not in casts
    assert wide.initializers.keys() == narrow.initializers.keys()
    for key, value in narrow.initializers.items():
        before, after = value.const_value, wide.initializers[key].const_value
        assert before is not None
        assert after is not None
        assert np.array_equal(before.numpy().astype(np.float32), after.numpy().astype(np.float32))


def test_its_decoder_is_the_model_with_rounded_weights(widened: Path, rounded: HiMix) -> None:
    session = DecoderSession(widened / DECODER_GRAPH, rounded.config)
    ids = random_ids(2, 5, 300)
    slots = [random_tensor(2, 2, 4, 16, seed=seed) for seed in range(4)]
    logits, present = session.step(ids.numpy(), [slot.numpy() for slot in slots])
    with torch.inference_mode():
        expected = DecoderGraph(rounded)(ids, torch.arange(5).expand(2, 5), slots)
    found = [logits[:, None], *present]
    for array, tensor in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, tensor, rtol=0, atol=GRAPH_LOGITS)


def test_its_encoder_is_the_model_but_for_rounded_constants(
    widened: Path, rounded: HiMix, bfloat: Exported
) -> None:
    session = VisionSession(widened / VISION_GRAPH, rounded.config)
    pixels = random_tensor(2, 3, 28, 28)
    with torch.inference_mode():
        expected = flat(rounded.encode(pixels))
        unrounded = flat(bfloat.checkpoint.model().encode(pixels))
    worst = 0.0
    for array, tensor, other in zip(
        session.encode(pixels.numpy()), expected, unrounded, strict=True
    ):
        np.testing.assert_allclose(array, tensor, rtol=0, atol=BFLOAT16_CONSTANTS)
        worst = max(worst, float((other - tensor).abs().max()))
    assert worst > 2 * BFLOAT16_CONSTANTS  # rounding the weights is what it shows
