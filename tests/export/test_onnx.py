"""The graphs themselves: what is in them, what is not, and their numbers at every open size."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from himix_edge.config import HiMixConfig, RopeScaling
from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH, Dtype
from himix_edge.errors import ExportError
from himix_edge.export.dialects import PORTABLE_OPERATORS, require_portable
from himix_edge.export.graphs import DecoderGraph, StackedProjections, VisionGraph, flat
from himix_edge.export.onnx import (
    decoder_onnx_from_weights,
    interrupts_held,
    onnx_from_module,
    vision_onnx_from_weights,
    write_graph,
)
from himix_edge.export.sessions import DecoderSession, VisionSession
from himix_edge.files import sha256_of
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.models.himix import HiMix
from himix_edge.models.weights import Weight, held_weights
from tests.export.conftest import Traced
from tests.models.reference import random_ids, random_tensor
from tests.tiny import tiny_config, tiny_model
from tests.tolerances import GRAPH_LOGITS, STACKED_PROJECTIONS

GRAPHS = (VISION_GRAPH, DECODER_GRAPH)
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")


def shapes(values: list[onnx.ValueInfoProto]) -> dict[str, list[str | int]]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in values
    }


def test_names_and_sizes_are_the_contract_s(tiny_bundle: Path) -> None:
    vision = onnx.load(tiny_bundle / VISION_GRAPH).graph
    image = ["batch", 2, 4, 16]
    assert shapes(vision.input) == {"pixel_values": ["batch", 3, 28, 28]}
    assert shapes(vision.output) == {
        "present.0.key": image,
        "present.0.value": image,
        "present.1.key": image,
        "present.1.value": image,
    }
    decoder = onnx.load(tiny_bundle / DECODER_GRAPH).graph
    past, present = ["batch", 2, "past", 16], ["batch", 2, "past + tokens", 16]
    assert shapes(decoder.input) == {
        "input_ids": ["batch", "tokens"],
        "position_ids": ["batch", "tokens"],
        "past_key_values.0.key": past,
        "past_key_values.0.value": past,
        "past_key_values.1.key": past,
        "past_key_values.1.value": past,
    }
    assert shapes(decoder.output) == {
        "logits": ["batch", 1, 300],
        "present.0.key": present,
        "present.0.value": present,
        "present.1.key": present,
        "present.1.value": present,
    }


@pytest.mark.parametrize("name", GRAPHS)
def test_nothing_is_left_over(tiny_bundle: Path, name: str) -> None:
    raw = (tiny_bundle / name).read_bytes()
    for trace in (b"pkg.", b"site-packages", b".py", b"himix_edge", str(Path.cwd()).encode()):
        assert trace not in raw, trace
    model = onnx.load(tiny_bundle / name, load_external_data=False)
    graph = model.graph
    assert not model.metadata_props
    assert not model.functions
    assert not any(node.metadata_props or node.doc_string for node in graph.node)
    used = {value for node in graph.node for value in node.input}
    given = {value.name for value in graph.output}
    assert {weight.name for weight in graph.initializer} <= used
    assert all(set(node.output) & (used | given) for node in graph.node)
    weights = {weight.name for weight in graph.initializer}
    constant = [node.name for node in graph.node if set(node.input) <= weights]
    assert constant == [], "nodes that could have been folded"
    assert [node.op_type for node in graph.node if node.op_type == "Identity"] == []


@pytest.mark.parametrize("name", GRAPHS)
def test_weights_keep_their_names_and_stand_in_one_file(tiny_bundle: Path, name: str) -> None:
    graph = onnx.load(tiny_bundle / name, load_external_data=False).graph
    places = set()
    for weight in graph.initializer:
        if weight.data_location == onnx.TensorProto.EXTERNAL:
            places |= {entry.value for entry in weight.external_data if entry.key == "location"}
        else:
            assert len(weight.raw_data) <= 256
        if len(weight.dims) > 1:
            assert weight.name.startswith(("vision.", "decoder.", "injection.")) or (
                weight.name == "embedding"  # the encoder's position embeddings, looked up
            )
    assert places == {f"{name}.data"}


def test_embeddings_that_are_the_head_too_are_stored_once(tiny_bundle: Path) -> None:
    graph = onnx.load(tiny_bundle / DECODER_GRAPH, load_external_data=False).graph
    wide = [weight.name for weight in graph.initializer if 300 in weight.dims]
    assert wide == ["decoder.model.embed_tokens.weight"]


@dataclasses.dataclass(frozen=True)
class Counted:
    """A weight that notes its name whenever it is read."""

    name: str
    weight: Weight
    log: list[str]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self) -> Tensor:
        self.log.append(self.name)
        return self.weight.read()

    def problem(self) -> str | None:
        return self.weight.problem()


def test_the_same_model_gives_the_same_bytes_and_large_weights_are_read_once(
    tiny_checkpoint: Checkpoint,
    tiny_bundle: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    read: list[str] = []
    held = held_weights(tiny_checkpoint.model())  # as against those of the file
    weights = {name: Counted(name, weight, read) for name, weight in held.items()}
    vision = vision_onnx_from_weights(tiny_checkpoint.config, weights)
    decoder = decoder_onnx_from_weights(tiny_checkpoint.config, weights)
    large = [name for name, weight in held.items() if weight.read().numel() > 1024]
    assert len(large) > 10
    assert not set(read) & set(large)  # what the passes look at is small
    written: list[float] = []
    write_graph(vision, tmp_path / VISION_GRAPH, written.append)
    write_graph(decoder, tmp_path / DECODER_GRAPH)
    assert {name: read.count(name) for name in large} == dict.fromkeys(large, 1)
    assert written == sorted(written)
    assert len(written) > 10
    assert written[-1] == 1.0
    for name in (*GRAPHS, *(f"{graph}.data" for graph in GRAPHS)):
        assert sha256_of(tmp_path / name) == sha256_of(tiny_bundle / name), name
    assert capfd.readouterr() == ("", "")


def test_all_layers_projections_are_one_product(
    tiny_checkpoint: Checkpoint, tiny_bundle: Path
) -> None:
    model = tiny_checkpoint.model()
    features = random_tensor(3, 4, 32)
    wide = StackedProjections(model.injection, model.decoder)  # type: ignore[arg-type]
    assert wide.weight.shape == (2 * 2 * 2 * 16, 32)
    expected = flat(model.injection(features, model.decoder))
    for found, part in zip(flat(wide(features, model.decoder)), expected, strict=True):
        assert found.shape == (3, 2, 4, 16)
        torch.testing.assert_close(found, part, rtol=0, atol=STACKED_PROJECTIONS)

    graph = onnx.load(tiny_bundle / VISION_GRAPH, load_external_data=False).graph
    [projection] = [w for w in graph.initializer if w.name.startswith("injection.")]
    assert list(projection.dims) == [32, 128]
    assert sum(projection.name in node.input for node in graph.node) == 1


def test_vision_graph_module_is_the_model_s_encode(tiny_checkpoint: Checkpoint) -> None:
    model = tiny_checkpoint.model()
    pixels = random_tensor(2, 3, 28, 28)
    before = model.vision.model.config._attn_implementation
    for found, part in zip(VisionGraph(model)(pixels), flat(model.encode(pixels)), strict=True):
        torch.testing.assert_close(found, part, rtol=0, atol=GRAPH_LOGITS)
    assert model.vision.model.config._attn_implementation == before != "eager"


@pytest.mark.parametrize(
    ("batch", "tokens", "past"), [(1, 1, 1), (1, 1, 9), (1, 6, 4), (2, 1, 3), (3, 4, 4), (2, 3, 5)]
)
def test_decoder_numbers_at_every_open_size(
    tiny_checkpoint: Checkpoint, tiny_bundle: Path, batch: int, tokens: int, past: int
) -> None:
    check_decoder(tiny_checkpoint.model(), tiny_bundle / DECODER_GRAPH, batch, tokens, past)


def test_a_decoder_with_biases_and_a_head_of_its_own(qwen2: Traced) -> None:
    check_decoder(qwen2.model, qwen2.decoder, 2, 3, 5)
    check_decoder(qwen2.model, qwen2.decoder, 1, 1, 8)


def test_a_decoder_with_scaled_positions_and_one_key_head(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 24, "rope_theta": 500.0}
    model = tiny_model(tiny_config(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), **changes))
    path = tmp_path / DECODER_GRAPH
    write_graph(decoder_onnx_from_weights(model.config, held_weights(model)), path)
    check_decoder(model, path, 2, 3, 5)
    check_decoder(model, path, 1, 1, 8)
    with pytest.raises(AssertionError, match=r"logits"):  # so the scaling is in the graph
        check_decoder(tiny_model(tiny_config(**changes)), path, 2, 3, 5)


def check_decoder(model: HiMix, path: Path, batch: int, tokens: int, past: int) -> None:
    """Random ids, positions and cache through both; each input is another."""
    config = model.config.decoder
    ids, positions = random_ids(batch, tokens, 300), random_ids(batch, tokens, 50, seed=1)
    shape = (batch, config.num_key_value_heads, past, config.head_dim)
    slots = [random_tensor(*shape, seed=seed) for seed in range(4)]
    feeds = {"input_ids": ids.numpy(), "position_ids": positions.numpy()}
    for i, slot in enumerate(slots):
        feeds[f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}"] = slot.numpy()
    names = ["logits"] + [f"present.{i}.{part}" for i in range(2) for part in ("key", "value")]
    found = DecoderSession(path, model.config).session.run(names, feeds)
    with torch.inference_mode():
        expected = DecoderGraph(model)(ids, positions, slots)
    assert found[0].shape == (batch, 1, 300)
    assert found[1].shape == (*shape[:2], past + tokens, shape[3])
    for name, array, tensor in zip(names, found, expected, strict=True):
        np.testing.assert_allclose(array, tensor, rtol=0, atol=GRAPH_LOGITS, err_msg=name)


def siglip() -> HiMixConfig:
    """Four whole patches of 7 and two pixels over; the features are those before the last layer."""
    config = tiny_config()
    vision = dataclasses.replace(
        config.vision,
        model_type="siglip",
        image_size=30,
        patch_size=7,
        num_hidden_layers=3,
        feature_layer=-2,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    )
    return HiMixConfig(
        vision, config.decoder, dataclasses.replace(config.preprocess, image_size=30)
    )


def test_siglip_and_another_feature_layer(tmp_path: Path) -> None:
    model = tiny_model(siglip())
    path = tmp_path / VISION_GRAPH
    write_graph(vision_onnx_from_weights(model.config, held_weights(model)), path)
    pixels = random_tensor(2, 3, 30, 30)
    with torch.inference_mode():
        expected = flat(model.encode(pixels))
    for batch in (pixels, pixels[:1]):
        found = VisionSession(path, model.config).encode(batch.numpy())
        for array, tensor in zip(found, expected, strict=True):
            assert array.shape == (len(batch), 2, 16, 16)
            np.testing.assert_allclose(array, tensor[: len(batch)], rtol=0, atol=GRAPH_LOGITS)
    names = {value.name for value in onnx.load(path, load_external_data=False).graph.initializer}
    assert any("layers.1." in name for name in names)
    assert not any("layers.2." in name for name in names)  # the layer above is not there


@pytest.mark.parametrize("name", GRAPHS)
def test_only_operators_of_the_portable_dialect(tiny_bundle: Path, name: str) -> None:
    model = onnx.load(tiny_bundle / name, load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert {node.op_type for node in model.graph.node} <= PORTABLE_OPERATORS
    assert len(PORTABLE_OPERATORS) == 150
    assert not PORTABLE_OPERATORS & {"Attention", "RMSNormalization", "BitwiseAnd", "SkipLayerNorm"}


def test_foreign_operators_are_named() -> None:
    class Bits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.bitwise_xor(torch.bitwise_and(x, 6), 1)

    with pytest.raises(ExportError, match="found BitwiseAnd, BitwiseXor"):
        onnx_from_module(
            Bits(),
            (torch.zeros(2, 2, dtype=torch.int64),),
            {},
            input_names=["x"],
            output_names=["y"],
            dynamic_shapes=({0: Dim("batch")},),
        )


def test_another_domain_and_another_opset_are_foreign(tiny_bundle: Path) -> None:
    graph = onnx_ir.load(tiny_bundle / DECODER_GRAPH)
    next(iter(graph.graph)).domain = "com.microsoft"
    with pytest.raises(ExportError, match=r"found com\.microsoft::Shape"):
        require_portable(graph)
    graph.opset_imports[""] = 23
    with pytest.raises(ExportError, match="expected 18, found 23"):
        require_portable(graph)


def test_what_torch_cannot_trace_is_one_error() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="torch could not trace Branch"):
        onnx_from_module(
            Branch(),
            (torch.zeros(2, 2),),
            {},
            input_names=["x"],
            output_names=["y"],
            dynamic_shapes=({0: Dim("batch")},),
        )


def test_an_invalid_graph_is_not_handed_out(tiny_bundle: Path, tmp_path: Path) -> None:
    graph = onnx_ir.load(tiny_bundle / DECODER_GRAPH)
    next(node for node in graph.graph if node.op_type == "Softmax").op_type = "Softmix"
    with pytest.raises(ExportError, match=r"decoder\.onnx is not a valid graph.*Softmix"):
        write_graph(graph, tmp_path / DECODER_GRAPH)


def test_looking_at_the_package_needs_no_torch() -> None:
    code = "import sys, himix_edge.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("presses", "error", "lines"),
    [(1, None, 1), (1, ValueError, 1), (2, None, 0)],
    ids=["it waits for the end", "it counts more than an error", "a second one does not wait"],
)
def test_ctrl_c_within_a_block(presses: int, error: type[Exception] | None, lines: int) -> None:
    done = []

    def block() -> None:
        with interrupts_held():
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
            done.append("the rest")
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        block()
    assert len(done) == lines
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_have_no_interrupts_to_hold() -> None:
    done = []

    def work() -> None:
        with interrupts_held():
            done.append("work")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["work"]
