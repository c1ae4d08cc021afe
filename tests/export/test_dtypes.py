"""Graphs in float32, float16 and bfloat16: what is in which type, and what stays wide."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch

from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH, Dtype
from himix_edge.export.expected import Array
from himix_edge.export.graphs import DecoderGraph, flat
from himix_edge.export.onnx import (
    TORCH_DTYPES,
)
from himix_edge.export.sessions import DecoderSession, VisionSession
from himix_edge.export.verify import Closeness
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.models.himix import HiMix
from tests.export.conftest import Exported
from tests.models.reference import random_ids, random_tensor
from tests.tolerances import HALF_GRAPH

GRAPHS = (VISION_GRAPH, DECODER_GRAPH)
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Typed:
    """A bundle, the type of its weights, and the model it was made from."""

    dtype: Dtype
    folder: Path
    model: HiMix

    @property
    def torch(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    @property
    def onnx(self) -> onnx_ir.DataType:
        return onnx_ir.DataType[{"float32": "FLOAT"}.get(self.dtype, self.dtype.upper())]


@pytest.fixture(params=DTYPES)
def typed(request: pytest.FixtureRequest, tiny_checkpoint: Checkpoint) -> Typed:
    if request.param == "bfloat16":
        bfloat: Exported = request.getfixturevalue("bfloat")
        return Typed("bfloat16", bfloat.folder, bfloat.checkpoint.model())
    names = {"float32": "tiny_bundle", "float16": "half_bundle"}
    folder = request.getfixturevalue(names[request.param])
    return Typed(request.param, folder, tiny_checkpoint.model())


def shown_types(values: list[onnx.ValueInfoProto]) -> dict[str, int]:
    return {value.name: value.type.tensor_type.elem_type for value in values}


def test_pixels_and_logits_are_float32_and_the_cache_is_the_dtype(typed: Typed) -> None:
    vision, decoder = (
        onnx.load(typed.folder / name, load_external_data=False).graph for name in GRAPHS
    )
    wide, own, ids = onnx.TensorProto.FLOAT, int(typed.onnx), onnx.TensorProto.INT64
    parts = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    cache = {f"present.{part}": own for part in parts}
    assert shown_types(list(vision.input)) == {"pixel_values": wide}
    assert shown_types(list(vision.output)) == cache
    assert shown_types(list(decoder.input)) == {
        "input_ids": ids,
        "position_ids": ids,
        **{f"past_key_values.{part}": own for part in parts},
    }
    assert shown_types(list(decoder.output)) == {"logits": wide, **cache}


def as_float(tensor: Any) -> Array:
    """Of a type that numpy may lack."""
    wide: Array = tensor.numpy().astype(np.float32)
    return wide


def test_every_weight_is_the_model_s_in_the_dtype(typed: Typed) -> None:
    """And none is what the memory held in which the graph was traced."""
    expected = {name: tensor.to(typed.torch) for name, tensor in typed.model.state_dict().items()}
    projections = [f"injection.layers.{i}.{part}_proj.weight" for part in "kv" for i in (0, 1)]
    expected["injection.weight"] = torch.cat([expected.pop(name) for name in projections])
    positions = expected.pop("vision.model.embeddings.position_embedding.weight")
    patches = "vision.model.embeddings.patch_embedding.weight"
    found = set()
    for graph in GRAPHS:
        for name, value in onnx_ir.load(typed.folder / graph).graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            if tensor.dtype == onnx_ir.DataType.INT64:
                continue
            array = as_float(tensor)
            assert np.isfinite(array).all(), name
            own = name.removesuffix(".T")
            if own in expected:
                weight = expected[own].float()
                assert np.array_equal(array, weight.T if name != own else weight), name
                assert tensor.dtype == typed.onnx
                found.add(own)
            elif array.shape == (1, *positions.shape):
                assert np.array_equal(array[0], positions.float())
                assert tensor.dtype == typed.onnx
            elif array.shape == expected[patches].shape:  # widened: see `WidePatches`
                assert typed.dtype == "bfloat16"
                assert tensor.dtype == onnx_ir.DataType.FLOAT
                assert np.array_equal(array, expected[patches].float())
                found.add(patches)
            elif name == "decoder.model.rotary.inverse_frequencies":
                assert tensor.dtype == onnx_ir.DataType.FLOAT
                rotary = typed.model.decoder.model.rotary
                assert np.array_equal(array, rotary.inverse_frequencies)
            else:
                assert array.size == 1, name  # a constant of the formulas
    assert found == expected.keys()


WIDE = {"Pow", "ReduceMean", "Sqrt", "Reciprocal", "Softmax", "Sin", "Cos"}


def test_norms_and_softmax_are_in_float32_and_products_in_the_dtype(typed: Typed) -> None:
    seen = set()
    for name in GRAPHS:
        model = onnx.load(typed.folder / name, load_external_data=False)
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        values = (*graph.input, *graph.output, *graph.value_info)
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        types |= {weight.name: weight.data_type for weight in graph.initializer}
        for node in graph.node:
            if node.op_type in WIDE:
                assert types[node.input[0]] == onnx.TensorProto.FLOAT, node
            elif node.op_type == "LayerNormalization":
                stash = [a.i for a in node.attribute if a.name == "stash_type"]
                assert stash in ([], [1])  # in float32 within: ONNX's own default
            elif node.op_type in ("MatMul", "Gemm"):
                assert {types[name] for name in node.input} == {int(typed.onnx)}, node
            seen.add(node.op_type)
    assert seen > WIDE | {"LayerNormalization", "MatMul"}


@pytest.mark.parametrize(
    ("graph", "weight"),
    [
        (VISION_GRAPH, "vision.model.pre_layrnorm.weight"),
        (DECODER_GRAPH, "decoder.model.embed_tokens.weight"),
    ],
)
def test_norms_of_values_whose_squares_overflow_float16(
    half_bundle: Path, tiny_checkpoint: Checkpoint, tmp_path: Path, graph: str, weight: str
) -> None:
    factor = 500.0
    model = tiny_checkpoint.model()
    model.get_parameter(weight).mul_(factor)
    assert float(model.get_parameter(weight).square().max()) > 2 * 65504

    for suffix in ("", ".data"):
        shutil.copy(half_bundle / f"{graph}{suffix}", tmp_path)
    changed = onnx_ir.load(half_bundle / graph)
    value = changed.graph.initializers[weight]
    assert value.const_value is not None
    value.const_value = onnx_ir.tensor(value.const_value.numpy() * np.float16(factor), name=weight)
    onnx_ir.save(changed, tmp_path / graph)

    pixels, ids = random_tensor(1, 3, 28, 28), random_ids(1, 5, 300)
    slots = [random_tensor(1, 2, 4, 16, seed=seed) for seed in range(4)]
    with torch.inference_mode():
        if graph == VISION_GRAPH:
            expected = flat(model.encode(pixels))
            found = VisionSession(tmp_path / graph, model.config).encode(pixels.numpy())
        else:
            expected = DecoderGraph(model)(ids, torch.arange(5)[None], slots)
            session = DecoderSession(tmp_path / graph, model.config)
            logits, present = session.step(ids.numpy(), [slot.half().numpy() for slot in slots])
            found = [logits[:, None], *present]
    for array, tensor in zip(found, expected, strict=True):
        closeness = Closeness.of(array, tensor.numpy())
        assert closeness.error < HALF_GRAPH
