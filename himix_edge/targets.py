"""Where a bundle is to run, and which graphs that takes: standard library only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import get_args

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

    def updated(self, dialect: str | None, dtype: str | None) -> Target:
        """The same target with graphs of another kind; None leaves it as it is.

        Raises:
            ConfigError: a name of none; it names the closest.
        """
        dialects: dict[str, Dialect] = {name: name for name in get_args(Dialect)}
        dtypes: dict[str, Dtype] = {name: name for name in get_args(Dtype)}
        for kind, name, known in (("dialect", dialect, dialects), ("dtype", dtype, dtypes)):
            if name is not None and name not in known:
                raise ConfigError(f"no {kind} is named {name!r}", fix=closest(name, known))
        return dataclasses.replace(
            self,
            dialect=dialects[dialect] if dialect else self.dialect,
            dtype=dtypes[dtype] if dtype else self.dtype,
        )


TARGETS = {
    "cpu": Target("ort", "float32", "ONNX Runtime"),
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
