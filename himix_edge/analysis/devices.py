"""Devices as their makers describe them: memory, bandwidth, peak rates. Standard library only.

The documents named as sources could not be opened in the original when this was written; the
figures are as several web pages and other projects quote them.

Rates are dense: marketing's "sparse" figures are twice as high and mean nothing here. Where a maker
states only a sparse rate, half of it stands here; where only cores and a clock are known, their
product, at 1024 fp16 multiply-adds a clock in an SM of Orin (which gives back the published rates
of those Orins that have one), and `unverified` says so. An int8 rate is twice that of fp16.
GeForce cards multiply in fp16 twice as fast with fp16 sums as with fp32 ones; the faster rate
stands here, so that a time computed from it stays a floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from himix_edge.errors import ConfigError, closest

GIB = 1 << 30
GIGA, TERA = 1e9, 1e12

Arithmetic = Literal["float32", "float16", "int8"]


@dataclass(frozen=True)
class Device:
    """One device in one power mode.

    Attributes:
        title: its name in full.
        memory_bytes: what the graphs can share with all else that runs there.
        bandwidth: bytes a second, from memory.
        rates: operations a second, two a multiply-add, dense; bfloat16 runs at float16's.
        targets: names of `targets.TARGETS`, the usual one first.
        compute_capability: of its GPU; None where there is none.
        shared_memory: one memory for CPU and GPU, so that a build takes of it too.
        reserved_bytes: an assumption: what the firmware (0.6 of an Orin's 8 GiB) and a system
            without a desktop keep for themselves; on a card, what a desktop shows itself with.
        sources: where the figures are from.
        unverified: what of them is derived, or was not found in a document of the maker's.
    """

    title: str
    memory_bytes: int
    bandwidth: float
    rates: Mapping[Arithmetic, float]
    targets: tuple[str, ...]
    compute_capability: str | None
    shared_memory: bool
    reserved_bytes: int
    sources: tuple[str, ...]
    unverified: str = ""


_CAPABILITIES = "https://developer.nvidia.com/cuda-gpus"
_SUPER = (
    "https://developer.nvidia.com/blog/nvidia-jetson-orin-nano-developer-kit-gets-a-super-boost/"
)
_ORIN_NANO = "NVIDIA Jetson Orin Nano Series Modules Data Sheet"
_ORIN_NX = "NVIDIA Jetson Orin NX Series Modules Data Sheet"
_AGX_ORIN = "NVIDIA Jetson AGX Orin Series Modules Data Sheet, DS-10662-001 v1.8"
_THOR = "NVIDIA Jetson Thor Series Modules Data Sheet"
_GEFORCE = "NVIDIA's architecture white paper of its GeForce generation"


def _jetson(
    title: str,
    gigabytes: int,
    bandwidth: float,
    half: float,
    *,
    thor: bool = False,
    sources: tuple[str, ...],
    unverified: str = "",
) -> Device:
    return Device(
        title,
        gigabytes * GIB,
        bandwidth * GIGA,
        {"float16": half * TERA, "int8": 2 * half * TERA},
        ("jetpack-7.2",) if thor else ("jetpack-7.2", "jetpack-6.2"),
        "11.0" if thor else "8.7",
        shared_memory=True,
        reserved_bytes=3 * GIB // 2,
        sources=(*sources, _CAPABILITIES),
        unverified=unverified,
    )


def _card(
    title: str,
    gigabytes: int,
    bandwidth: float,
    half: float,
    capability: str,
    *,
    source: str = _GEFORCE,
    targets: tuple[str, ...] = ("rtx", "tensorrt"),
    unverified: str = "",
) -> Device:
    return Device(
        title,
        gigabytes * GIB,
        bandwidth * GIGA,
        {"float16": half * TERA, "int8": 2 * half * TERA},
        targets,
        capability,
        shared_memory=False,
        reserved_bytes=GIB // 2,
        sources=(source, _CAPABILITIES),
        unverified=unverified,
    )


_FROM_CLOCK = "the rates are cores times clock"
_CARD_FROM_CLOCK = "the rates are cores times clock, the bandwidth is as commonly given"

DEVICES = {
    "orin-nano-4gb": _jetson(
        "Jetson Orin Nano 4GB, 10 W",
        4,
        34,
        5,
        sources=(_ORIN_NANO,),
        unverified="the fp16 rate is half of int8's",
    ),
    "orin-nano-8gb": _jetson("Jetson Orin Nano 8GB, 15 W", 8, 68, 10, sources=(_SUPER, _ORIN_NANO)),
    "orin-nano-8gb-super": _jetson(
        "Jetson Orin Nano 8GB, MAXN SUPER", 8, 102, 17, sources=(_SUPER,)
    ),
    "orin-nx-8gb": _jetson(
        "Jetson Orin NX 8GB, 20 W", 8, 102.4, 12.5, sources=(_ORIN_NX,), unverified=_FROM_CLOCK
    ),
    "orin-nx-16gb": _jetson(
        "Jetson Orin NX 16GB, 25 W", 16, 102.4, 15, sources=(_ORIN_NX,), unverified=_FROM_CLOCK
    ),
    "agx-orin-32gb": _jetson(
        "Jetson AGX Orin 32GB, MAXN",
        32,
        204.8,
        27,
        sources=(_AGX_ORIN,),
        unverified="the rates are a quarter and half of the GPU's 108 sparse int8 TOPS",
    ),
    "agx-orin-64gb": _jetson(
        "Jetson AGX Orin 64GB, MAXN",
        64,
        204.8,
        42.5,
        sources=(_AGX_ORIN,),
        unverified="the rates are a quarter and half of the GPU's 170 sparse int8 TOPS",
    ),
    "thor-t4000": _jetson(
        "Jetson T4000 (Thor)",
        64,
        273,
        150,
        thor=True,
        sources=(_THOR,),
        unverified="the rates are half of the sparse ones, as a third party quotes the table",
    ),
    "thor-t5000": _jetson(
        "Jetson T5000 (Thor)",
        128,
        273,
        258.5,
        thor=True,
        sources=(_THOR,),
        unverified="the rates are half of the sparse ones, as a third party quotes the table",
    ),
    "rtx-3060": _card("GeForce RTX 3060 12GB", 12, 360, 51, "8.6", unverified=_CARD_FROM_CLOCK),
    "rtx-4060": _card("GeForce RTX 4060", 8, 272, 60.5, "8.9", unverified=_CARD_FROM_CLOCK),
    "rtx-4090": _card("GeForce RTX 4090", 24, 1008, 330.3, "8.9"),
    "rtx-5090": _card("GeForce RTX 5090", 32, 1792, 419, "12.0"),
    "dgx-spark": Device(
        "DGX Spark (GB10)",
        128 * GIB,
        273 * GIGA,
        {"float16": 125 * TERA, "int8": 250 * TERA},
        ("tensorrt", "rtx"),
        "12.1",
        shared_memory=True,
        reserved_bytes=4 * GIB,
        sources=(
            "https://developer.nvidia.com/blog/how-nvidia-dgx-sparks-performance-enables-intensive-ai-tasks",
            _CAPABILITIES,
        ),
        unverified="the rates follow from one petaflop of sparse fp4 by GeForce Blackwell's ratios",
    ),
    "h100": _card(
        "H100 80GB SXM",
        80,
        3350,
        989.4,
        "9.0",
        source="NVIDIA H100 Tensor Core GPU data sheet",
        targets=("tensorrt",),
    ),
    "raspberry-pi-5": Device(
        "Raspberry Pi 5, 8 GB",
        8 * GIB,
        17.1 * GIGA,
        {"float32": 0.1536 * TERA, "int8": 0.6144 * TERA},
        ("cpu",),
        None,
        shared_memory=True,
        reserved_bytes=GIB,
        sources=("https://www.raspberrypi.com/products/raspberry-pi-5/",),
        unverified="4 Cortex-A76 at 2.4 GHz with two 128-bit units; LPDDR4X-4267 on 32 bits",
    ),
    "cpu": Device(
        "a desktop CPU: 4 cores, 3 GHz, AVX2, two channels of DDR4-3200, 16 GB",
        16 * GIB,
        51.2 * GIGA,
        {"float32": 0.384 * TERA, "int8": 1.536 * TERA},
        ("cpu",),
        None,
        shared_memory=True,
        reserved_bytes=GIB,
        sources=(),
        unverified="made up of what is common; int8 with VNNI",
    ),
}


def device(name: str) -> Device:
    """The device of that name.

    Raises:
        ConfigError: no such device; it names the closest.
    """
    if name not in DEVICES:
        raise ConfigError(f"no device is named {name!r}", fix=closest(name, DEVICES))
    return DEVICES[name]
