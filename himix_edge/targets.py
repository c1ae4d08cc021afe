"""Where a bundle is to run, and which graphs that takes: standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from himix_edge.contract import Dialect, Dtype
from himix_edge.errors import ConfigError, closest


@dataclass(frozen=True)
class Target:
    """A family of devices with one engine library.

    Attributes:
        dialect: what its engine library reads.
        dtype: what it computes fastest in without loss that matters.
        engine: the library, for people.
    """

    dialect: Dialect
    dtype: Dtype
    engine: str


TARGETS = {
    "cpu": Target("portable", "float32", "ONNX Runtime"),
    "jetpack-6.2": Target("portable", "float16", "TensorRT 10.3"),
    "jetpack-7.2": Target("native", "float16", "TensorRT 10.16"),
    "tensorrt": Target("native", "float16", "TensorRT 10.15 or later"),
    "rtx": Target("native", "float16", "TensorRT for RTX"),
}


def target(name: str) -> Target:
    """The target of that name.

    Raises:
        ConfigError: no such target; it names the closest.
    """
    if name not in TARGETS:
        raise ConfigError(f"no target is named {name!r}", fix=closest(name, TARGETS))
    return TARGETS[name]
