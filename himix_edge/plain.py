"""Frozen dataclasses from plain data, such as JSON gives, with nothing let through unchecked."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from himix_edge.errors import ConfigError, closest

T = TypeVar("T")


def dataclass_from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Builds a (nested) dataclass from plain JSON data, and accepts nothing it doesn't know.

    Args:
        cls: the dataclass; its fields are numbers, strings, literals, tuples, dicts, dataclasses,
            or one of these or None.
        data: what `dataclasses.asdict` gave, perhaps by way of JSON.
        where: the path of `data` within the whole, for error messages.

    Raises:
        ConfigError: an unknown, missing or mistyped field, by its full name.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{where.rstrip('.') or cls.__name__} is invalid",
            expected="an object",
            found=shown(data),
        )
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ConfigError(
                f"unknown key {f'{where}{key}'!r} in {cls.__name__}", fix=closest(str(key), fields)
            )
    missing = [
        name
        for name, field in fields.items()
        if name not in data
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{cls.__name__} lacks {', '.join(where + name for name in missing)}")
    values = {key: _typed(hints[key], value, f"{where}{key}") for key, value in data.items()}
    return cls(**values)


def _typed(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type that `hint` names, or a ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # of a type and None; there is no other here
        [kind] = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _typed(kind, value, where)
    if dataclasses.is_dataclass(hint):
        return dataclass_from_dict(typing.cast(type, hint), value, f"{where}.")
    if origin is Literal:
        if value in arguments:
            return value
        near = closest(str(value), [str(argument) for argument in arguments])
        raise ConfigError(f"{where} can't be {value!r}", fix=near)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) == len(value):
            return tuple(_typed(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    elif origin is dict and isinstance(value, Mapping):
        return {
            str(key): _typed(arguments[1], item, f"{where}.{key}") for key, item in value.items()
        }
    elif hint is Any:
        return value
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer beyond all floats
            return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    raise ConfigError(f"{where} is invalid", expected=_hint_name(hint), found=shown(value))


def _hint_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def shown(value: Any) -> str:
    """A value in an error message, cut to a readable length."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        return f"an {type(value).__name__} of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
