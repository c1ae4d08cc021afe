"""Whether a fake still says what the real TensorRT says: names, parameters, members."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterable

from tests.engines.stubs import stubs

Signatures = list[list[str]]  # the names of the parameters, once for each overload


def differences(fakes: Iterable[type], version: str) -> list[str]:
    """All that the fake classes have and those of that version of TensorRT don't.

    Raises:
        NoStubsError: its bindings can't be had.
    """
    real = _classes(version)
    found = []
    for fake in fakes:
        if fake.__name__ in real:
            found += _differences(fake, real[fake.__name__], fake.__name__)
        else:
            found.append(fake.__name__)
    return found


def _differences(fake: type, real: ast.ClassDef, where: str) -> list[str]:
    inner = {node.name: node for node in real.body if isinstance(node, ast.ClassDef)}
    signatures, members = _signatures(real), _members(real)
    found = []
    for name, thing in vars(fake).items():
        if name.startswith("_") and not (name == "__init__" and name in signatures):
            continue
        path = f"{where}.{name}"
        if isinstance(thing, type) and name in inner:
            found += _differences(thing, inner[name], path)
        elif inspect.isfunction(thing):
            parameters = list(inspect.signature(thing).parameters)
            if parameters not in signatures.get(name, []):
                found.append(f"{path}({', '.join(parameters)})")
        elif name not in members:
            found.append(path)
    return found


def _signatures(real: ast.ClassDef) -> dict[str, Signatures]:
    found: dict[str, Signatures] = {}
    for node in real.body:
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append([argument.arg for argument in node.args.args])
    return found


def _members(real: ast.ClassDef) -> set[str]:
    """Attributes, members of an enumeration, and properties."""
    attributes = {
        node.target.id
        for node in real.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    properties = {
        node.name
        for node in real.body
        if isinstance(node, ast.FunctionDef)
        and any(
            isinstance(mark, ast.Name) and mark.id == "property" for mark in node.decorator_list
        )
    }
    return attributes | properties


@functools.cache
def _classes(version: str) -> dict[str, ast.ClassDef]:
    text = (stubs(version) / "tensorrt" / "__init__.pyi").read_text(encoding="utf-8")
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
