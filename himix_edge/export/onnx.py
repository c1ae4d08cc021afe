"""From torch to ONNX: each half of the model as one graph file with one file of weights beside it.

torch's exporter gives the graph; the passes here leave nothing in it that no reader needs: weights
folded into the layout they are used in, no shapes that can be inferred, no trace of the machine it
was made on. The same model gives the same bytes.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import onnx
import onnx_ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn
from torch.export import Dim

from himix_edge.contract import (
    INPUT_IDS,
    LOGITS,
    PIXEL_VALUES,
    POSITION_IDS,
    past_names,
    present_names,
)
from himix_edge.errors import ExportError
from himix_edge.export.dialects import PORTABLE_OPSET, require_portable
from himix_edge.export.graphs import DecoderGraph, VisionGraph
from himix_edge.models.himix import HiMix

WEIGHTS_SUFFIX = ".data"  # vision.onnx keeps its weights in vision.onnx.data


def vision_onnx_from_model(model: HiMix) -> onnx_ir.Model:
    """The vision graph of the contract; its batch is free, its image size fixed.

    Raises:
        ExportError: torch can't trace it, or it needs operators outside the portable dialect.
    """
    size = model.config.vision.image_size
    return onnx_from_module(
        VisionGraph(model),
        (torch.zeros(2, 3, size, size),),
        input_names=[PIXEL_VALUES],
        output_names=present_names(model.config.decoder.num_hidden_layers),
        dynamic_shapes=({0: Dim("batch")},),
    )


def decoder_onnx_from_model(model: HiMix) -> onnx_ir.Model:
    """The decoder graph of the contract; batch, tokens and past (at least one slot) are free.

    Raises:
        ExportError: torch can't trace it, or it needs operators outside the portable dialect.
    """
    config = model.config.decoder
    layers = config.num_hidden_layers
    batch, tokens, past = Dim("batch"), Dim("tokens"), Dim("past")
    # Sizes that differ, so that none passes for another; and no tensor twice, because torch takes
    # inputs that are one object for one input.
    input_ids, position_ids = torch.zeros(2, 2, 3, dtype=torch.int64).unbind()
    shape = (2, config.num_key_value_heads, 5, config.head_dim)
    slots = tuple(torch.zeros(shape) for _ in range(2 * layers))
    return onnx_from_module(
        DecoderGraph(model),
        (input_ids, position_ids, slots),
        input_names=[INPUT_IDS, POSITION_IDS, *past_names(layers)],
        output_names=[LOGITS, *present_names(layers)],
        dynamic_shapes=(
            {0: batch, 1: tokens},
            {0: batch, 1: tokens},
            ({0: batch, 2: past},) * 2 * layers,
        ),
    )


def onnx_from_module(
    module: nn.Module,
    example: tuple[Tensor | Sequence[Tensor], ...],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: tuple[Any, ...],
) -> onnx_ir.Model:
    """Traces a module into a graph of the portable dialect.

    Args:
        example: inputs of any values; the sizes that `dynamic_shapes` doesn't name are fixed.
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
                optimize=False,  # `_tidy` does, without its limits on size
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise ExportError(f"torch could not trace {type(module).__name__}", found=reason) from error
    graph: onnx_ir.Model = program.model  # type: ignore[union-attr] # None only without dynamo
    _tidy(graph)
    require_portable(graph)
    return graph


def write_graph(graph: onnx_ir.Model, path: Path) -> None:
    """Writes `path`, and its weights beside it, and checks what stands there.

    Raises:
        ExportError: the graph is not valid ONNX.
        OSError: the files can't be written.
    """
    graph.graph.name = path.stem
    onnx_ir.save(graph, path, external_data=path.name + WEIGHTS_SUFFIX)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is not a valid graph", found=str(error)) from error


def _tidy(graph: onnx_ir.Model) -> None:
    """Folds what is constant, keeps the names of folded weights, drops what can be inferred."""
    for node in graph.graph:
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is not None and weight.is_initializer():
            node.outputs[0].name = f"{weight.name}.T"
    onnxscript.optimizer.optimize_ir(
        graph, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize
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
