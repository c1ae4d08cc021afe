"""Machines that never were: their files under a folder, and what their commands answer."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from himix_edge.doctor.facts import MODULES, Facts, look
from himix_edge.doctor.machine import Machine, Output

Answers = Mapping[str, Output]

EVERYTHING = dict.fromkeys(
    ("numpy", "pillow", "tokenizers", "jinja2", "typer", "onnx", "torch"), "1.0"
)
ON_A_DEVICE = {**EVERYTHING, "onnx": None, "torch": None}

ORIN_NVPMODEL = """
# FAKEFS defines
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< PM_CONFIG DEFAULT=0 >
"""


def said(text: str, code: int | None = 0, err: str = "") -> Output:
    return Output(code, text, err)


def module(version: str, **facts: Any) -> Output:
    return said(json.dumps({"version": version, **facts}) + "\n")


NO_MODULE = said("null\n")
ORIN_FILES = {
    "/proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit\0",
    "/etc/nv_tegra_release": "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic\n",
    "/etc/nvpmodel.conf": ORIN_NVPMODEL,
    "/proc/meminfo": "MemTotal:  7802516 kB\nMemAvailable:  6291456 kB\nSwapTotal: 3901248 kB\n",
    "/usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}',
}
ORIN_PACKAGES = (
    "nvidia-jetpack install ok installed 6.2.1+b38\n"
    "nvidia-l4t-core install ok installed 36.4.4-20250616085344\n"
    "libnvinfer10 install ok installed 10.3.0.30-1+cuda12.5\n"
    "python3-libnvinfer install ok installed 10.3.0.30-1+cuda12.5\n"
    "libnvinfer8 deinstall ok config-files 8.5.2\n"
)
ORIN_ANSWERS: dict[str, Output] = {
    "dpkg-query": said(ORIN_PACKAGES, code=1, err="dpkg-query: no packages found"),
    "nvidia-smi": said("Orin (nvgpu), [N/A], [N/A], [N/A], 540.4.0\n"),
    "nvpmodel": said("NV Power Mode: 15W\n0\n"),
    "systemctl": said("graphical.target\n"),
    "tensorrt": module("10.3.0"),
    "cuda.bindings.runtime": module("12.9.7"),
}
THOR_FILES = {
    "/proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "/etc/nv_tegra_release": "# R39 (release), REVISION: 2.1, GCID: 46758480, BOARD: generic\n",
    "/etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n",
    "/proc/meminfo": "MemTotal: 128754176 kB\nMemAvailable: 120000000 kB\nSwapTotal: 0 kB\n",
}
THOR_ANSWERS: dict[str, Output] = {
    "dpkg-query": said("libnvinfer10 install ok installed 10.16.2.10-1+cuda13.2\n"),
    "nvidia-smi": said("NVIDIA Thor, 11.0, [N/A], [N/A], 595.78\n"),
    "nvpmodel": said("NV Power Mode: MAXN\n0\n"),
    "/usr/local/cuda/bin/nvcc": said("Cuda compilation tools, release 13.2, V13.2.86\n"),
    "systemctl": said("multi-user.target\n"),
    "tensorrt": module("10.16.2.10"),
    "cuda.bindings.runtime": module("13.5.0"),
}
PC_FILES = {
    "/proc/meminfo": "MemTotal: 65754176 kB\nMemAvailable: 60000000 kB\nSwapTotal: 0 kB\n",
}
PC_ANSWERS: dict[str, Output] = {
    "nvidia-smi": said("NVIDIA GeForce RTX 4090, 8.9, 24564, 23000, 580.65.06\n"),
    "onnxruntime": module("1.32.0", providers=["CPUExecutionProvider"]),
}


class Board(Machine):
    """A machine of these files and answers; of modules it has those that answer."""

    def __init__(self, root: Path, files: Mapping[str, str], answers: Answers) -> None:
        for path, text in files.items():
            (root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            (root / path.lstrip("/")).write_bytes(text.encode())

        def run(command: Sequence[str]) -> Output | None:
            name = command[-1] if command[0] == sys.executable else command[0]
            return answers.get(name, NO_MODULE if name in MODULES else None)

        super().__init__(root, run)


def facts_of(root: Path, files: Mapping[str, str], answers: Answers, **changes: Any) -> Facts:
    """What is found there, beside the packages of a device."""
    found = look(Board(root, files, answers))
    return dataclasses.replace(
        found, **{"distributions": ON_A_DEVICE, "isolated": False, **changes}
    )
