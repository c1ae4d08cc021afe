"""Which TensorRT reads which graphs: the one place, for who builds and who advises alike."""

from __future__ import annotations

import re

from himix_edge.contract import Dialect

Version = tuple[int, ...]  # compares as versions do; () is none, older than all

# What our graphs and our calls are tried with begins at 10.3: see docs/tensorrt.md.
FIRST_TENSORRT: dict[Dialect, Version] = {"portable": (10, 3), "native": (10, 15)}
# By the first Jetson Linux of a series, the TensorRT that its JetPack brings: 6.0 DP, 6.1, 7.0,
# 7.2. Sources: docs/jetson.md; for 6.0, https://docs.nvidia.com/jetson/jetpack/release-notes/
JETPACK_TENSORRT: dict[Version, Version] = {
    (36, 2): (8, 6),
    (36, 4): (10, 3),
    (38,): (10, 13),
    (39,): (10, 16),
}


def version_of(text: str | None) -> Version:
    """Of "10.3.0-1+cuda12.6": (10, 3, 0); empty where the text begins with no version."""
    match = re.match(r"[0-9]{1,6}(?:\.[0-9]{1,6})*(?![0-9])", text or "")
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def version_text(version: Version) -> str:
    """(10, 3) as people write it."""
    return ".".join(map(str, version))


def reads(version: Version, dialect: Dialect) -> bool:
    """Whether a TensorRT reads graphs of a dialect; none reads those of ONNX Runtime."""
    first = FIRST_TENSORRT.get(dialect)
    return first is not None and version >= first


def tensorrt_of_jetpack(l4t: str | None) -> Version:
    """The TensorRT of the JetPack with this Jetson Linux; empty where that is not known."""
    release = version_of(l4t)
    known = [tensorrt for first, tensorrt in JETPACK_TENSORRT.items() if release >= first]
    return known[-1] if known else ()
