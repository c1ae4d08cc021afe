"""Encoders made to overflow float16: their graphs, as they are and with what needs it in fp32.

ONNX Runtime's CPU kernels hide overflow: where it has no kernel in half precision it puts casts
around one in fp32, and of two casts between neighbours nothing remains. So the graphs are evaluated
by `onnx.reference` as well, node by node, every value in the type that the graph gives it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from himix_edge.config import HiMixConfig
from himix_edge.contract import PIXEL_VALUES, VISION_GRAPH
from himix_edge.export.expected import Array
from himix_edge.export.graphs import flat
from himix_edge.export.onnx import vision_onnx_from_weights, write_graph
from himix_edge.export.ranges import FLOAT16_MAX, ranges_from_model, wide_parts
from himix_edge.export.sessions import VisionSession
from himix_edge.export.verify import Closeness
from himix_edge.export.wide import NOTHING_WIDE, WideParts
from himix_edge.models.himix import HiMix
from himix_edge.models.weights import held_weights
from tests.models.reference import random_tensor
from tests.tiny import tiny_config, tiny_model
from tests.tolerances import HALF_GRAPH, HALF_KV_COSINE

PIXELS = random_tensor(2, 3, 28, 28)
PROMPTS = [[1, 2, 3]]
HALF, FLOAT = onnx_ir.DataType.FLOAT16, onnx_ir.DataType.FLOAT


class LayerNormalization(OpRun):
    """As ONNX defines it, with stash_type 1; the one of `onnx.reference` never goes to fp32."""

    op_domain = ""

    def _run(
        self, x: Array, scale: Array, bias: Array, axis: int, epsilon: float, stash_type: int
    ) -> tuple[Array]:
        assert (axis, stash_type) == (-1, 1)
        wide = x.astype(np.float32)
        normal = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(
            wide.var(-1, keepdims=True) + epsilon
        )
        return (normal.astype(x.dtype) * scale + bias,)


def evaluated(path: Path, pixels: Array) -> list[Array]:
    evaluator = ReferenceEvaluator(str(path), new_ops=[LayerNormalization])
    with np.errstate(all="ignore"):
        found: list[Array] = evaluator.run(None, {PIXEL_VALUES: pixels})  # type: ignore[assignment]
    return found


def siglip() -> HiMixConfig:
    config = tiny_config()
    changes: dict[str, Any] = {"model_type": "siglip", "hidden_act": "gelu_pytorch_tanh"}
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **changes))


CONFIGS = {"siglip": siglip(), "clip": tiny_config()}


class Plain:
    """A model whose weights are anybody's to change, and its graph in float16, nothing wide."""

    def __init__(self, config: HiMixConfig) -> None:
        self.model = tiny_model(config)
        self.saved = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        # Weights are read when the graph is written: it is traced once for all that becomes of it.
        self.graph = vision_onnx_from_weights(config, held_weights(self.model), "float16")


plain_of = functools.cache(lambda family: Plain(CONFIGS[family]))


@pytest.fixture(params=["siglip", "clip"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def plain(family: str) -> Iterator[Plain]:
    plain: Plain = plain_of(family)
    yield plain
    plain.model.load_state_dict(plain.saved)


def encoded(model: HiMix) -> list[Array]:
    with torch.inference_mode():
        return [part.numpy() for part in flat(model.encode(PIXELS))]


def measured(model: HiMix) -> WideParts:
    images = [image[None].numpy() for image in PIXELS]
    return wide_parts(ranges_from_model(model, images, PROMPTS))


def blocks(model: HiMix) -> list[Any]:
    return list(model.vision.model.encoder.layers)


def massive_channel(model: HiMix) -> None:
    """The first block's MLP makes a channel enormous, all on; the projections don't look at it."""
    first, _ = blocks(model)
    first.mlp.fc2.weight[5] *= 1e5
    first.mlp.fc2.bias[5] = 3e4
    for weight in model.injection.parameters():
        weight[:, 5] = 0


def canceled_channel(model: HiMix) -> None:
    """Each sum is too large, neither of the numbers; the second block takes away what is too much.

    So the features are of ordinary size.
    """
    first, second = blocks(model)
    for layer in (first.self_attn.out_proj, first.mlp.fc2):
        layer.bias[5] += 5e4
    for layer in (second.self_attn.out_proj, second.mlp.fc2):
        layer.bias[5] -= 5e4


def large_within_attention(model: HiMix) -> None:
    """The scores of one block, the values of another; what they give is of ordinary size."""
    first, second = blocks(model)
    first.self_attn.q_proj.weight *= 300
    first.self_attn.k_proj.weight *= 300
    second.self_attn.v_proj.weight *= 5e4
    second.self_attn.out_proj.weight *= 2e-5


def large_within_mlp(model: HiMix) -> None:
    """What goes into the activation of one block, the norm of another."""
    first, second = blocks(model)
    first.mlp.fc1.weight *= 5e4
    first.mlp.fc2.weight *= 2e-5
    second.layer_norm2.weight *= 3e4
    second.mlp.fc1.weight *= 3e-5


def large_patches(model: HiMix) -> None:
    """Before CLIP's first norm, which makes them small again; it has one, and SigLIP has none."""
    embeddings: Any = model.vision.model.embeddings
    embeddings.patch_embedding.weight *= 5e4


@dataclasses.dataclass(frozen=True)
class Overflow:
    family: str
    damage: Callable[[HiMix], None]
    wide: WideParts


BOTH = frozenset({0, 1})
OVERFLOWS = [
    Overflow("siglip", massive_channel, WideParts(True, mlps=frozenset({0}), projections=True)),
    Overflow("siglip", canceled_channel, WideParts(True, attentions=BOTH, mlps=BOTH)),
    Overflow("clip", large_patches, WideParts(True)),
    Overflow("clip", large_within_attention, WideParts(attentions=BOTH)),
    Overflow("siglip", large_within_mlp, WideParts(mlps=BOTH)),
]


@pytest.mark.parametrize(
    ("family", "case"),
    [(case.family, case) for case in OVERFLOWS],
    ids=[f"{case.family}, {case.damage.__name__}" for case in OVERFLOWS],
    indirect=["family"],
)
def test_what_overflows_is_wide_and_then_right(
    plain: Plain, case: Overflow, tmp_path: Path
) -> None:
    model, config = plain.model, plain.model.config
    write_graph(plain.graph, tmp_path / "sound.onnx")
    require_close(evaluated(tmp_path / "sound.onnx", PIXELS.numpy()), encoded(model))
    case.damage(model)
    assert max(float(weight.abs().max()) for weight in model.parameters()) < FLOAT16_MAX
    expected = encoded(model)
    assert max(float(np.abs(part).max()) for part in expected) < 100

    write_graph(plain.graph, tmp_path / "plain.onnx")
    ruined = evaluated(tmp_path / "plain.onnx", PIXELS.numpy())
    assert not all(np.isfinite(part).all() for part in ruined)

    wide = measured(model)
    assert wide == case.wide
    path = tmp_path / VISION_GRAPH
    write_graph(vision_onnx_from_weights(config, held_weights(model), "float16", wide), path)
    for found in (
        evaluated(path, PIXELS.numpy()),
        VisionSession(path, config).encode(PIXELS.numpy()),
    ):
        require_close(found, expected)
    check_types(path, model, wide)


def require_close(found: list[Array], expected: list[Array]) -> None:
    assert {part.dtype for part in found} == {np.dtype(np.float16)}
    for part, other in zip(found, expected, strict=True):
        closeness = Closeness.of(part, other)
        assert closeness.error < HALF_GRAPH
        assert closeness.cosine > HALF_KV_COSINE


def check_types(path: Path, model: HiMix, wide: WideParts) -> None:
    """What is wide is stored in fp32, as the model has it; nothing else is."""
    weights = model.state_dict()
    stored = set()
    for name, value in onnx_ir.load(path).graph.initializers.items():
        own = name.removesuffix(".T")
        if own in weights:
            tensor = value.const_value
            assert tensor is not None
            assert tensor.dtype == (FLOAT if is_wide(own, wide) else HALF), name
            array = weights[own].numpy().astype(tensor.numpy().dtype)
            assert np.array_equal(tensor.numpy(), array if name == own else array.T), name
            stored.add(own)
        elif own == "injection.weight":
            assert value.dtype == (FLOAT if wide.projections else HALF)
    assert any("mlp" in name for name in stored)
    assert any("norm" in name for name in stored)


def is_wide(name: str, wide: WideParts) -> bool:
    """Of a weight of the encoder, by its name alone."""
    if "encoder.layers." not in name:
        return wide.residual
    block = int(name.split("encoder.layers.")[1][0])
    if "self_attn" in name:
        return block in wide.attentions
    if "mlp" in name:
        return block in wide.mlps
    parts = wide.attentions if "layer_norm1" in name else wide.mlps
    return wide.residual or block in parts


def test_a_sound_encoder_has_nothing_wide_but_its_activations(plain: Plain, tmp_path: Path) -> None:
    assert measured(plain.model) == NOTHING_WIDE
    path = tmp_path / VISION_GRAPH
    write_graph(plain.graph, path)
    check_types(path, plain.model, NOTHING_WIDE)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    activations = [node for node in graph.node if node.op_type in ("Sigmoid", "Tanh", "Pow")]
    assert len(activations) in (2, 4)
    assert {types[node.input[0]] for node in activations} == {int(FLOAT)}
    constants = [onnx.numpy_helper.to_array(value) for value in graph.initializer]
    factor = {"quick_gelu": 1.702, "gelu_pytorch_tanh": 0.044715}
    expected = np.float32(factor[plain.model.config.vision.hidden_act])
    assert any(
        value.size == 1 and value.dtype == np.float32 and value == expected for value in constants
    )


def test_wide_parts_in_words() -> None:
    assert str(NOTHING_WIDE) == "nothing"
    assert str(WideParts(mlps=frozenset({11}))) == "MLP of block 11"
    assert str(WideParts(True, frozenset({2}), frozenset({10, 3}), True)) == (
        "the residual stream, attention of block 2, MLP of blocks 3, 10, "
        "the projections to keys and values"
    )
