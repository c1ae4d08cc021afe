"""Protocol buffers as they are on the wire, field by field, without a package for them.

A device has none, and ONNX Runtime's is within it. https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator

Field = tuple[int, int | memoryview]  # its number, and its value: a number, or the bytes of it
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def fields_of(message: memoryview) -> Iterator[Field]:
    """The fields of a message in their order: varints as numbers, all others as bytes.

    Raises:
        ValueError: bytes that are no message.
    """
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if size > end - at:
            raise ValueError(f"a field of {size} bytes in the {end - at} that are left")
        yield number, message[at : at + size]
        at += size


def numbers_of(packed: int | memoryview) -> list[int]:
    """The int64 values of a repeated field, be it one of them or all packed.

    Raises:
        ValueError: bytes that are no varints.
    """
    if isinstance(packed, int):
        return [signed(packed)]
    numbers, at = [], 0
    while at < len(packed):
        number, at = _varint(packed, at)
        numbers.append(signed(number))
    return numbers


def signed(number: int) -> int:
    """An int64 from its 64 bits."""
    return number - (1 << 64) if number >> 63 else number


def text_of(value: int | memoryview) -> str:
    """A string field's text.

    Raises:
        ValueError: a number, or bytes that are no UTF-8.
    """
    if isinstance(value, int):
        raise ValueError("a number in the place of a text")
    return str(value, "utf-8")


def message_of(value: int | memoryview) -> memoryview:
    """A message field's bytes.

    Raises:
        ValueError: a number.
    """
    if isinstance(value, int):
        raise ValueError("a number in the place of a message")
    return value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of 64 bits at most, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it ends within a number")
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFF_FFFF_FFFF_FFFF, at
    raise ValueError("a number of more than 64 bits")
