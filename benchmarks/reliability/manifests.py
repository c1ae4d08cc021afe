"""Mutations of bundles: of the manifest's bytes and fields, and of the graphs', sealed anew."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

from himix_edge.contract import DECODER_GRAPH, MANIFEST, VISION_GRAPH

SMALL, MANY = 8, 40  # changed bytes
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 10**3, 2**31, 2**63, 10**30, -(10**18), 0.5, 1e308, "", "x",
    "../x", "\x1b[2J", "\ud800", "a" * 10_000, "[" * 1000, [], [[]], {}, {"a": {}}, [0] * 10_000,
    float("nan"), float("inf"),
)  # fmt: skip


def mutate(source: Path, bundle: Path, seed: int) -> str:
    """Makes a mutated copy of a bundle in a folder; returns what was done to it."""
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copytree(source, bundle)
    draw = random.Random(seed)
    kind = draw.choice(("bytes", "field", "field", "field", "fields", "graph", "graph", "files"))
    if kind == "bytes":
        (bundle / MANIFEST).write_bytes(_other_bytes((bundle / MANIFEST).read_bytes(), draw))
        return kind
    body = json.loads((bundle / MANIFEST).read_bytes())
    if kind == "graph":
        name = draw.choice((VISION_GRAPH, DECODER_GRAPH))
        (bundle / name).write_bytes(_other_bytes((bundle / name).read_bytes(), draw))
        _record(body, bundle / name)
        kind = f"bytes of {name}"
    elif kind == "files":
        names = list(body["files"])
        one, other = draw.sample(names, 2)
        kind = f"{one} for {other}"
        shutil.copyfile(bundle / one, bundle / other)
        _record(body, bundle / other)
    else:
        done = [_change(body, draw) for _ in range(1 if kind == "field" else draw.randint(2, 6))]
        kind = "; ".join(done)[:200]
    seal(bundle, body)
    return kind


def seal(bundle: Path, body: dict[str, Any]) -> None:
    """Writes a manifest as anyone can."""
    body.pop("seal", None)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps({**body, "seal": digest}))


def _record(body: dict[str, Any], path: Path) -> None:
    data = path.read_bytes()
    body["files"][path.name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def _change(body: dict[str, Any], draw: random.Random) -> str:
    """Another value, another key, or no value, somewhere in the tree."""
    places = list(_places(body))
    parent, key = draw.choice(places)
    act = draw.choice(("set", "set", "set", "near", "delete", "rename"))
    value = parent[key]
    if act == "near" and isinstance(value, int) and not isinstance(value, bool):
        parent[key] = value + draw.choice((-1, 1, value, -value, 7 * value))
    elif act == "delete":
        del parent[key]
    elif act == "rename" and isinstance(parent, dict):
        parent[draw.choice(("", "x", "../y", str(key) + "s", "\x00"))] = parent.pop(key)
    else:
        parent[key] = copy.deepcopy(draw.choice(VALUES))
    return f"{act} {key!r}"[:60]


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every place of the tree: what holds a value, and under which key or number."""
    if isinstance(node, dict):
        keys: Any = list(node)
    elif isinstance(node, list):
        keys = range(len(node))
    else:
        return []
    return [place for key in keys for place in ((node, key), *_places(node[key]))]


def _other_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flipped, overwritten, cut out, doubled, or cut off."""
    other = bytearray(data)
    act = draw.choice(("flip", "flip", "overwrite", "cut", "double", "end"))
    at = draw.randrange(len(other))
    size = draw.randint(1, MANY)
    if act == "flip":
        for _ in range(draw.randint(1, SMALL)):
            other[draw.randrange(len(other))] ^= 1 << draw.randrange(8)
    elif act == "overwrite":
        other[at : at + size] = draw.randbytes(size)
    elif act == "cut":
        del other[at : at + size]
    elif act == "double":
        other[at:at] = other[at : at + size]
    else:
        del other[at:]
    return bytes(other)
