"""A graph of a bundle is data: what ONNX Runtime may be handed, and what it is spared.

ONNX can hold programs (Loop, If), operators that load files or run what is in them, and constants
of any size in a few bytes. None of it is in a graph that himix-edge writes, so all of it is refused
before an engine library reads the graph. How much a graph computes has no limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from himix_edge.bundle.files import Buffer, BundleFiles
from himix_edge.bundle.protobuf import fields_of, message_of, numbers_of, text_of
from himix_edge.contract import WEIGHTS_SUFFIX, FileRecord, corrupt
from himix_edge.errors import BundleError
from himix_edge.plain import shown

MAX_GRAPH = 64 << 20  # bytes, without the weights beside it; ours have some 200 kB
MAX_NODES = 100_000  # ours have some 2,000
MAX_FILLED = 1 << 28  # numbers that a node makes of a constant shape

# What himix-edge writes. EPContext, say, is not among them: it loads a compiled engine.
OUR_OPERATORS = {
    "com.microsoft": frozenset(
        (
            "DynamicQuantizeMatMul",
            "GatherBlockQuantized",
            "GroupQueryAttention",
            "MatMulIntegerToFloat",
            "MatMulNBits",
            "QuickGelu",
        )
    )
}
_STANDARD = ("", "ai.onnx")
_PROGRAMS = frozenset(("Loop", "If", "Scan", "SequenceMap"))
_FILLING = frozenset(("ConstantOfShape", "Expand", "Tile", "Range", "Pad", "Resize"))

# Numbers of fields in onnx.proto.
_MODEL_GRAPH, _MODEL_OPSETS, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 8, 20, 25
_NODE, _INITIALIZER, _SPARSE_INITIALIZER = 1, 5, 15
_NODE_INPUT, _NODE_OUTPUT, _OP_TYPE, _ATTRIBUTE, _DOMAIN = 1, 2, 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE = (22, 23)
_DIMS, _DATA_TYPE, _NAME, _RAW_DATA, _EXTERNAL, _LOCATION = 1, 2, 8, 9, 13, 14
_TYPED_DATA = (4, 5, 6, 7, 10, 11)
_INT64 = 7
# Bits of a number by data type, as TensorProto.DataType numbers them; texts are not among them.
_BITS = {
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((7, 11, 13, 14), 64),
    15: 128,
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((25, 26), 2),
}


@dataclass
class Graph:
    """What was found while a graph was read.

    Attributes:
        weights: the names of the files that hold its weights.
        shapes: int64 constants that are in the graph itself, by name: perhaps a node's shape.
        filling: the inputs of nodes that make many numbers of few.
    """

    weights: set[str] = field(default_factory=set)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    filling: list[tuple[str, list[str]]] = field(default_factory=list)


@dataclass
class _Node:
    operator: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: list[memoryview] = field(default_factory=list)


@dataclass
class _Tensor:
    dims: list[int] = field(default_factory=list)
    data_type: int = 0
    name: str = ""
    raw: memoryview | None = None
    typed: int = 0  # bytes
    numbers: list[int] = field(default_factory=list)
    external: dict[str, str] = field(default_factory=dict)
    is_external: bool = False


def read_graph(files: BundleFiles, name: str) -> tuple[bytes, dict[str, Buffer]]:
    """A graph that may be handed to an engine library, and the weights beside it.

    Returns:
        the graph's bytes, and by name the bytes of the files with its weights, not yet compared
        with their records: `BundleFiles.check` does.

    Raises:
        BundleError: a file that is corrupt, or a graph that himix-edge does not write.
    """
    if name in files.manifest.files and files.manifest.files[name].size > MAX_GRAPH:
        raise corrupt(files.path / name, f"at most {MAX_GRAPH} bytes", "more")
    data = files.read(name)
    graph = checked_graph(memoryview(data), files.path / name, files.manifest.files)
    return data, {weights: files.map(weights) for weights in sorted(graph.weights)}


def checked_graph(model: memoryview, path: Path, files: dict[str, FileRecord]) -> Graph:
    """Reads a model, and refuses whatever himix-edge does not write.

    Args:
        path: where it is from, for errors.
        files: what weights beside it may be in.

    Raises:
        BundleError: no model, or one that holds programs, operators of others, or constants that
            are larger than what is there of them.
    """
    try:
        graph = Graph()
        for number, value in fields_of(model):
            if number == _MODEL_GRAPH:
                _read_graph(message_of(value), graph, path, files)
            elif number in (_MODEL_FUNCTIONS, _MODEL_TRAINING):
                raise _foreign(path, "functions or training steps")
            elif number == _MODEL_OPSETS:
                _read_opset(message_of(value), path)
        for operator, inputs in graph.filling:
            for name in inputs:
                sizes = [abs(size) for size in graph.shapes.get(name, [])]
                if max([math.prod(sizes), *sizes]) > MAX_FILLED:
                    raise _foreign(path, f"{operator} to {shown(graph.shapes[name])}")
    except ValueError as error:
        raise corrupt(path, "an ONNX model", str(error)) from error
    return graph


def _read_graph(
    message: memoryview, graph: Graph, path: Path, files: dict[str, FileRecord]
) -> None:
    nodes = 0
    for number, value in fields_of(message):
        if number == _NODE:
            nodes += 1
            if nodes > MAX_NODES:
                raise _foreign(path, f"more than {MAX_NODES} nodes")
            _check_node(_node(message_of(value)), graph, path)
        elif number == _INITIALIZER:
            tensor = _tensor(message_of(value))
            _check_tensor(tensor, graph, path, files)
            _note_shape(tensor.name, tensor, graph)
        elif number == _SPARSE_INITIALIZER:
            raise _foreign(path, "sparse constants")


def _read_opset(message: memoryview, path: Path) -> None:
    for number, value in fields_of(message):
        if number == 1 and text_of(value) not in (*_STANDARD, *OUR_OPERATORS):
            raise _foreign(path, f"operators of the domain {shown(text_of(value))}")


def _check_node(node: _Node, graph: Graph, path: Path) -> None:
    ours = OUR_OPERATORS.get(node.domain)
    unknown = node.operator not in ours if ours else node.domain not in _STANDARD
    if unknown or node.operator in _PROGRAMS:
        name = f"{node.domain}.{node.operator}" if node.domain else node.operator
        raise _foreign(path, f"the operator {shown(name)}")
    for attribute in node.attributes:
        for number, value in fields_of(attribute):
            if number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                raise _foreign(path, f"a graph within the operator {shown(node.operator)}")
            if number in (*_ATTRIBUTE_SPARSE, _ATTRIBUTE_TENSORS):
                raise _foreign(path, f"constants within the operator {shown(node.operator)}")
            if number == _ATTRIBUTE_TENSOR:
                tensor = _tensor(message_of(value))
                _check_tensor(tensor, graph, path, {})
                if node.operator == "Constant" and node.outputs:
                    _note_shape(node.outputs[0], tensor, graph)
    if node.operator in _FILLING:
        graph.filling.append((node.operator, node.inputs))


def _check_tensor(tensor: _Tensor, graph: Graph, path: Path, files: dict[str, FileRecord]) -> None:
    """A constant is as large as it claims, and lies where the manifest has a file."""
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        raise _foreign(path, f"a constant of data type {tensor.data_type}")
    if any(size < 0 for size in tensor.dims):
        raise corrupt(path, "sizes of constants", shown(tensor.dims))
    size = -(-math.prod(tensor.dims) * bits // 8)
    if not tensor.is_external:
        # Numbers that are not raw take a byte at least, in which there may be several of few bits.
        most = len(tensor.raw) if tensor.raw is not None else tensor.typed * max(bits // 8, 1)
        if size > most or (tensor.raw is not None and size < most):
            raise corrupt(path, f"a constant of {size} bytes", f"{most} bytes of it")
        return
    name = tensor.external.get("location", "")
    if name not in files or not name.endswith(WEIGHTS_SUFFIX):
        raise corrupt(path, "weights in a file of the bundle", shown(name))
    offset, length = (
        int(tensor.external.get(key, default))
        for key, default in (("offset", "0"), ("length", str(size)))
    )
    if length != size or offset < 0 or offset + length > files[name].size:
        raise corrupt(
            path,
            f"a weight of {size} bytes within the {files[name].size} of {name}",
            f"{length} bytes at {offset}",
        )
    graph.weights.add(name)


def _note_shape(name: str, tensor: _Tensor, graph: Graph) -> None:
    if tensor.data_type == _INT64 and math.prod(tensor.dims) <= 16:
        raw = tensor.raw or b""
        numbers = [
            int.from_bytes(raw[i : i + 8], "little", signed=True) for i in range(0, len(raw), 8)
        ]
        graph.shapes[name] = numbers or tensor.numbers


def _node(message: memoryview) -> _Node:
    node = _Node()
    for number, value in fields_of(message):
        if number == _NODE_INPUT:
            node.inputs.append(text_of(value))
        elif number == _NODE_OUTPUT:
            node.outputs.append(text_of(value))
        elif number == _OP_TYPE:
            node.operator = text_of(value)
        elif number == _DOMAIN:
            node.domain = text_of(value)
        elif number == _ATTRIBUTE:
            node.attributes.append(message_of(value))
    return node


def _tensor(message: memoryview) -> _Tensor:
    tensor = _Tensor()
    for number, value in fields_of(message):
        if number == _DIMS:
            tensor.dims += numbers_of(value)
        elif number == _DATA_TYPE and isinstance(value, int):
            tensor.data_type = value
        elif number == _NAME:
            tensor.name = text_of(value)
        elif number == _RAW_DATA:
            tensor.raw = message_of(value)
        elif number == _EXTERNAL:
            key, text = _entry(message_of(value))
            tensor.external[key] = text
        elif number == _LOCATION:
            tensor.is_external = value != 0
        elif number in _TYPED_DATA:
            tensor.typed += 8 if isinstance(value, int) else max(len(value), 1)
            if tensor.data_type == _INT64 and len(tensor.numbers) <= 16:
                tensor.numbers += numbers_of(value)
    tensor.is_external |= bool(tensor.external)
    return tensor


def _entry(message: memoryview) -> tuple[str, str]:
    """Of a map of texts: its key and its value."""
    parts: dict[int, str] = {number: text_of(value) for number, value in fields_of(message)}
    return parts.get(1, ""), parts.get(2, "")


def _foreign(path: Path, found: str) -> BundleError:
    return BundleError(
        f"{path} is not a graph that himix-edge writes",
        expected="operators and constants of its own",
        found=found,
        fix="export the model again with: himix-edge export",
    )
