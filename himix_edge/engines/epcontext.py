"""The engine that a compiled graph names: a small reader of ONNX files, which devices have no
package for.

A graph compiled for TensorRT for RTX has one node, EPContext, which names the file beside it that
the provider loads. That name must not lead to another file than the one that was checked.
"""

from __future__ import annotations

from collections.abc import Iterator

# Numbers of fields in onnx.proto.
_GRAPH, _FUNCTIONS = 7, 25  # of ModelProto
_NODE = 1  # of GraphProto
_OP_TYPE, _ATTRIBUTE = 4, 5  # of NodeProto
_NAME, _INT, _STRING = 1, 3, 4  # of AttributeProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # of protobuf's wire format


def named_engine(model: bytes) -> str:
    """The file that a compiled graph names.

    Raises:
        ValueError: it is no ONNX file with one EPContext node that names a file.
    """
    fields = list(_fields(model))
    nodes = [
        node
        for number, graph in fields
        if number == _GRAPH
        for part, node in _fields(_bytes(graph))
        if part == _NODE
    ]
    if len(nodes) != 1 or any(number == _FUNCTIONS for number, _ in fields):
        raise ValueError(f"{len(nodes)} nodes, or functions")
    parts = list(_fields(_bytes(nodes[0])))
    if [value for number, value in parts if number == _OP_TYPE] != [b"EPContext"]:
        raise ValueError("a node that is no EPContext")
    attributes = [dict(_fields(_bytes(value))) for number, value in parts if number == _ATTRIBUTE]
    modes = [each.get(_INT, 0) for each in attributes if each.get(_NAME) == b"embed_mode"]
    named = [each.get(_STRING) for each in attributes if each.get(_NAME) == b"ep_cache_context"]
    if modes != [0] or len(named) != 1:
        raise ValueError("a node that does not name one file")
    return _bytes(named[0]).decode()


def _bytes(value: int | bytes | None) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a message should be")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: their number, and a number or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("a field beyond the end")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where what follows it begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("a number beyond the end")
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")
