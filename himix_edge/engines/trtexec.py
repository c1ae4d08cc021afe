"""The command line of `trtexec`, which comes with TensorRT, for the engines that we would build."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from himix_edge.engines.profiles import Profile, Shape


def trtexec_command(
    graph: Path,
    engine: str,
    profiles: Sequence[Profile],
    timing_cache: Path,
    workspace_bytes: int,
    *,
    version_compatible: bool,
    strip_weights: bool,
) -> list[str]:
    """A build of one graph by hand, in the words of TensorRT 10.3 to 11.

    TensorRT 11 takes `--stronglyTyped` and ignores it. A workspace without a suffix is in MiB.
    https://github.com/NVIDIA/TensorRT/blob/v11.1/samples/common/sampleOptions.cpp
    """
    return [
        "trtexec",
        f"--onnx={graph}",
        f"--saveEngine={engine}",
        "--stronglyTyped",
        f"--memPoolSize=workspace:{workspace_bytes >> 20}",
        f"--timingCacheFile={timing_cache}",
        *(["--versionCompatible"] if version_compatible else []),
        *(["--stripWeights"] if strip_weights else []),
        *_profile_flags(profiles),
        "--skipInference",
    ]


def shown(shape: Shape) -> str:
    """1x3x224x224"""
    return "x".join(map(str, shape))


def _profile_flags(profiles: Sequence[Profile]) -> list[str]:
    flags = []
    for index, profile in enumerate(profiles):
        flags += [f"--profile={index}"] if len(profiles) > 1 else []
        for place, bound in enumerate(("min", "opt", "max")):
            shapes = [f"{name}:{shown(bounds[place])}" for name, bounds in profile.shapes.items()]
            flags.append(f"--{bound}Shapes={','.join(shapes)}")
    return flags
