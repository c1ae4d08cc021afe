"""From torch to ONNX: each half of the model as one graph file with one file of weights beside it.

torch's exporter gives the graph of a model without weights; these are read one by one, in the
layout they are used in, when the file is written, so that exporting a model takes far less memory
than the model. The passes here leave nothing in the graph that no reader needs: no shapes that can
be inferred, no trace of the machine it was made on. The same model gives the same bytes.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import onnx
import onnx_ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn
from torch.export import Dim

from himix_edge.config import HiMixConfig
from himix_edge.contract import (
    INPUT_IDS,
    LOGITS,
    PIXEL_VALUES,
    POSITION_IDS,
    WEIGHTS_SUFFIX,
    Dtype,
    past_names,
    present_names,
)
from himix_edge.errors import ExportError
from himix_edge.export.dialects import PORTABLE_OPSET, require_portable
from himix_edge.export.graphs import DecoderGraph, VisionGraph, vision_graph_weights
from himix_edge.export.wide import NOTHING_WIDE, WideParts
from himix_edge.models.himix import hollow_model
from himix_edge.models.weights import Weight, Weights

MAX_FOLDED_BYTES = 32 << 20  # of a constant that is worth computing beforehand
TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_TORCH_OF_ONNX = {
    onnx_ir.DataType.FLOAT: torch.float32,
    onnx_ir.DataType.FLOAT16: torch.float16,
    onnx_ir.DataType.BFLOAT16: torch.bfloat16,
}


def vision_onnx_from_weights(
    config: HiMixConfig,
    weights: Weights,
    dtype: Dtype = "float32",
    wide: WideParts = NOTHING_WIDE,
) -> onnx_ir.Model:
    """The vision graph of the contract; its batch is free, its image size fixed.

    Args:
        weights: the model's; read when the graph is written.
        wide: what of a graph in float16 is in float32.

    Raises:
        ExportError: torch can't trace it, or it needs operators outside the portable dialect.
    """
    size = config.vision.image_size
    return onnx_from_module(
        VisionGraph(hollow_model(config, TORCH_DTYPES[dtype]), wide),
        (torch.zeros(2, 3, size, size),),
        vision_graph_weights(config, weights),
        input_names=[PIXEL_VALUES],
        output_names=present_names(config.decoder.num_hidden_layers),
        dynamic_shapes=({0: Dim("batch")},),
    )


def decoder_onnx_from_weights(
    config: HiMixConfig, weights: Weights, dtype: Dtype = "float32"
) -> onnx_ir.Model:
    """The decoder graph of the contract; batch, tokens and past (at least one slot) are free.

    Args:
        weights: the model's; read when the graph is written.

    Raises:
        ExportError: torch can't trace it, or it needs operators outside the portable dialect.
    """
    decoder = config.decoder
    layers = decoder.num_hidden_layers
    batch, tokens, past = Dim("batch"), Dim("tokens"), Dim("past")
    # Sizes that differ, so that none passes for another; and no tensor twice, because torch takes
    # inputs that are one object for one input.
    input_ids, position_ids = torch.zeros(2, 2, 3, dtype=torch.int64).unbind()
    shape = (2, decoder.num_key_value_heads, 5, decoder.head_dim)
    slots = tuple(torch.zeros(shape, dtype=TORCH_DTYPES[dtype]) for _ in range(2 * layers))
    return onnx_from_module(
        DecoderGraph(hollow_model(config, TORCH_DTYPES[dtype])),
        (input_ids, position_ids, slots),
        weights,
        input_names=[INPUT_IDS, POSITION_IDS, *past_names(layers)],
        output_names=[LOGITS, *present_names(layers)],
        dynamic_shapes=(
            {0: batch, 1: tokens},
            {0: batch, 1: tokens},
            ({0: batch, 2: past},) * 2 * layers,
        ),
    )


def write_graph(
    graph: onnx_ir.Model, path: Path, progress: Callable[[float], None] = lambda _: None
) -> None:
    """Writes `path`, and its weights beside it, one after the other; checks what stands there.

    Args:
        progress: called with the part of the weights, 0..1, that is written.

    Raises:
        ExportError: the graph is not valid ONNX.
        OSError: the files can't be written.
    """
    graph.graph.name = path.stem
    onnx_ir.save(
        graph,
        path,
        external_data=path.name + WEIGHTS_SUFFIX,
        callback=lambda _, written: progress((written.index + 1) / written.total),
        max_workers=1,  # several would hold several weights at once
    )
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is not a valid graph", found=str(error)) from error


def onnx_from_module(
    module: nn.Module,
    example: tuple[Tensor | Sequence[Tensor], ...],
    weights: Weights,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: tuple[Any, ...],
) -> onnx_ir.Model:
    """Traces a hollow module into a graph of the portable dialect.

    Args:
        example: inputs of any values; the sizes that `dynamic_shapes` doesn't name are fixed.
        weights: by the names of the module's parameters and buffers.
        input_names, output_names: flat, in order.
        dynamic_shapes: as `torch.export.export` takes them.

    Raises:
        ExportError: torch can't trace it, or it needs operators outside the portable dialect.
    """
    try:
        with interrupts_held(), _quiet_exporter():
            program = torch.onnx.export(
                module.eval(),
                example,
                input_names=input_names,
                output_names=output_names,
                opset_version=PORTABLE_OPSET,
                dynamic_shapes=dynamic_shapes,
                dynamo=True,
                optimize=False,  # `_tidy` does
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise ExportError(f"torch could not trace {type(module).__name__}", found=reason) from error
    graph: onnx_ir.Model = program.model  # type: ignore[union-attr] # None only without dynamo
    _bind(graph, weights)
    _tidy(graph)
    require_portable(graph)
    return graph


def _bind(graph: onnx_ir.Model, weights: Weights) -> None:
    """Puts weights in the place of the hollow ones, each transposed if that is how it is used."""
    initializers = graph.graph.initializers
    for name, value in initializers.items():
        if name in weights:
            value.const_value = _lazy(name, weights[name], value, transposed=False)
    for node in list(graph.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.name is None or weight.name not in weights:
            continue
        name = f"{weight.name}.T"  # of a matrix: no weight of more dimensions is transposed
        if name not in initializers:
            tensor = _lazy(name, weights[weight.name], weight, transposed=True)
            turned = onnx_ir.Value(
                name=name, type=weight.type, shape=tensor.shape, const_value=tensor
            )
            initializers.add(turned)
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], initializers[name])
        graph.graph.remove(node, safe=True)


def _lazy(
    name: str, weight: Weight, like: onnx_ir.Value, *, transposed: bool
) -> onnx_ir.LazyTensor:
    """A weight in the type of the initializer `like`, read anew whenever it is needed."""
    dtype = like.dtype or onnx_ir.DataType.FLOAT

    def read() -> onnx_ir.TensorProtocol:
        tensor = weight.read().to(_TORCH_OF_ONNX[dtype])
        return TorchTensor((tensor.T if transposed else tensor).contiguous(), name=name)

    shape = onnx_ir.Shape(weight.shape[::-1] if transposed else weight.shape)
    return onnx_ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)


def _tidy(graph: onnx_ir.Model) -> None:
    """Folds what is constant, drops what can be inferred."""
    onnxscript.optimizer.optimize_ir(
        graph, input_size_limit=MAX_FOLDED_BYTES, output_size_limit=MAX_FOLDED_BYTES
    )
    ClearMetadataAndDocStringPass()(graph)
    graph.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.outputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()
    outputs = set(graph.graph.outputs)
    for node in graph.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outputs:
                value.shape = value.type = None


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Lets Ctrl-C wait for the end of the block; a second one does not wait.

    Raised within torch's C++, a KeyboardInterrupt gets lost, turns into another error, or aborts
    the process before anything is cleared away: each was seen, in one export of twenty.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals only ever reach the main thread
        return
    before = signal.getsignal(signal.SIGINT)
    held = False

    def hold(_signal: int, _frame: FrameType | None) -> None:
        nonlocal held
        held = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without three known remarks of torch's exporter that ask nothing of us; all else is heard."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # "torchvision is not installed"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            warnings.filterwarnings("ignore", r".*The axis name: .* will not be used", UserWarning)
            yield
    finally:
        registration.setLevel(level)
