"""What a device has, as its files and commands say it. What can't be found out is None or empty."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from himix_edge.doctor.machine import Machine

# JetPack by the version of Jetson Linux (L4T). Source: NVIDIA's JetPack archive,
# https://developer.nvidia.com/embedded/jetpack-archive, as other projects' tables copy it.
JETPACK = {
    "35.1.0": "5.0.2",
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "35.6.1": "5.1.5",
    "36.2.0": "6.0 DP",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.2": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.5.0": "6.2.2",
    "36.5.2": "6.2.3",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}
# Source: https://developer.nvidia.com/cuda-gpus and /cuda-legacy-gpus
BOARD_CAPABILITY = {"Thor": "11.0", "Orin": "8.7", "Xavier": "7.2", "TX2": "6.2", "Nano": "5.3"}
PACKAGES = ("numpy", "pillow", "tokenizers", "jinja2", "typer", "onnx", "torch")
# Imported in a process of their own each, because a library that doesn't fit may end it.
MODULES = ("tensorrt", "cuda.bindings.runtime", "onnxruntime", "onnxruntime_ep_nv_tensorrt_rtx")

_IMPORT = """
import importlib, json, sys
name = sys.argv[1]
try:
    module = importlib.import_module(name)
except ModuleNotFoundError as error:
    if error.name and (name + ".").startswith(error.name + "."):
        print(json.dumps(None))
        sys.exit()
    raise
above = sys.modules.get(name.rpartition(".")[0])
facts = {"version": str(getattr(module, "__version__", getattr(above, "__version__", "")))}
if name == "onnxruntime":
    facts["providers"] = module.get_available_providers()
print(json.dumps(facts))
"""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        compute_capability: "8.7"; None where it is not known.
        memory_bytes, free_bytes: of its own; None where it shares the system's.
    """

    name: str
    compute_capability: str | None
    memory_bytes: int | None = None
    free_bytes: int | None = None


@dataclass(frozen=True)
class Module:
    """A Python module: its version ("" if it has none), or why it can't be imported."""

    version: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Facts:
    """All that `look` found.

    Attributes:
        board: the device tree's name of it; None on a PC.
        l4t: Jetson Linux's version, "36.4.3"; None on anything but a Jetson.
        jetpack: the release that it belongs to, None if unknown.
        driver: NVIDIA's.
        cuda: the toolkit's version.
        packages: Debian's, by name: those of NVIDIA that matter.
        distributions: Python's, by name.
        modules: of `MODULES`; None where there is no such module.
        providers: of ONNX Runtime.
        isolated: in a virtual environment that does not see apt's Python packages.
        power_mode: Jetson's, by name; None on anything else.
        power_modes: their numbers by name.
        desktop: whether a desktop starts with the system.
        problems: what was there and could not be read.
    """

    system: str
    python: str
    board: str | None
    l4t: str | None
    jetpack: str | None
    gpus: tuple[Gpu, ...]
    driver: str | None
    cuda: str | None
    packages: Mapping[str, str]
    distributions: Mapping[str, str | None]
    modules: Mapping[str, Module | None]
    providers: tuple[str, ...]
    isolated: bool
    memory_bytes: int | None
    available_bytes: int | None
    swap_bytes: int | None
    power_mode: str | None
    power_modes: Mapping[str, int]
    desktop: bool
    problems: tuple[str, ...]

    @property
    def jetson(self) -> bool:
        """Whether it is one of NVIDIA's boards."""
        return self.l4t is not None or "Jetson" in (self.board or "")


def look(machine: Machine) -> Facts:
    """Gathers everything; a probe that fails leaves a problem, never an error."""
    board = (machine.read("/proc/device-tree/model") or "").strip() or None
    packages = _debian_packages(machine)
    l4t = _l4t(machine.read("/etc/nv_tegra_release") or "", packages)
    jetson = l4t is not None or "Jetson" in (board or "")
    gpus, driver = _gpus(machine)
    modules = {name: _module(machine, name) for name in MODULES}
    memory = _memory(machine.read("/proc/meminfo") or "")
    return Facts(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        board=board,
        l4t=l4t,
        jetpack=JETPACK.get(l4t) if l4t else None,
        gpus=_board_gpu(board, gpus) if jetson else gpus,
        driver=driver,
        cuda=_cuda(machine),
        packages=packages,
        distributions={name: _distribution(name) for name in PACKAGES},
        modules={name: found[0] for name, found in modules.items()},
        providers=modules["onnxruntime"][1],
        isolated=_isolated(machine),
        memory_bytes=memory.get("MemTotal"),
        available_bytes=memory.get("MemAvailable"),
        swap_bytes=memory.get("SwapTotal"),
        power_mode=_power_mode(machine) if jetson else None,
        power_modes=_power_modes(machine.read("/etc/nvpmodel.conf") or "") if jetson else {},
        desktop=(machine.ask("systemctl", "get-default") or "").strip() == "graphical.target",
        problems=tuple(machine.problems),
    )


def _debian_packages(machine: Machine) -> dict[str, str]:
    """Versions of what NVIDIA's meta-packages bring."""
    names = ("nvidia-jetpack", "nvidia-l4t-core", "libnvinfer10", "libnvinfer11")
    wanted = (*names, "libnvinfer8", "python3-libnvinfer", "nvidia-l4t-dla-compiler")
    form = "--showformat=${Package} ${Status} ${Version}\\n"
    # It exits with 1 where one of them is not there.
    answer = machine.ask("dpkg-query", "--show", form, *wanted, may_fail=True) or ""
    return dict(re.findall(r"^(\S+) install ok installed (\S+)$", answer, re.M))


def _l4t(release: str, packages: Mapping[str, str]) -> str | None:
    """Of "# R36 (release), REVISION: 4.3, ...", or of nvidia-l4t-core's version."""
    if match := re.search(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", release):
        major, rest = match.groups()
        return f"{major}.{rest}" if "." in rest else f"{major}.{rest}.0"
    return packages.get("nvidia-l4t-core", "").partition("-")[0] or None


def _gpus(machine: Machine) -> tuple[tuple[Gpu, ...], str | None]:
    """By nvidia-smi, which may know less than it is asked; and the driver's version."""
    fields = "name,compute_cap,memory.total,memory.free,driver_version"
    answer = machine.ask("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in (answer or "").splitlines()]
    rows = [row for row in rows if len(row) == 5 and row[0]]
    gpus = tuple(
        Gpu(name, known if re.fullmatch(r"\d+\.\d", known) else None, _bytes(total), _bytes(free))
        for name, known, total, free, _ in rows
    )
    version = re.match(r"\d+\.[\d.]+", rows[0][4]) if rows else None
    return gpus, version[0] if version else None


def _bytes(mebibytes: str) -> int | None:
    return int(mebibytes) << 20 if re.fullmatch(r"[0-9]{1,12}", mebibytes) else None


def _board_gpu(board: str | None, gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """A Jetson's one GPU, which shares the system's memory, whatever nvidia-smi knows of it."""
    known = next((cap for name, cap in BOARD_CAPABILITY.items() if name in (board or "")), None)
    first = gpus[0] if gpus else Gpu("its own", None)
    return (Gpu(first.name, first.compute_capability or known),)


def _cuda(machine: Machine) -> str | None:
    """The toolkit's version: of its own record, or of its compiler."""
    with_nvcc = machine.ask("/usr/local/cuda/bin/nvcc", "--version")
    text = machine.read("/usr/local/cuda/version.json") or ""
    try:
        version = json.loads(text)["cuda"]["version"]
        if isinstance(version, str):
            return version[:20]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    match = re.search(r"release (\d+\.\d+)", with_nvcc or machine.ask("nvcc", "--version") or "")
    return match[1] if match else None


def _module(machine: Machine, name: str) -> tuple[Module | None, tuple[str, ...]]:
    """A module, imported in a process of its own; and ONNX Runtime's providers."""
    answer = machine.run((sys.executable, "-c", _IMPORT, name))
    if answer is None:
        return None, ()
    if answer.code != 0:
        said = (answer.err or answer.out).strip().splitlines()
        return Module(error=said[-1][:300] if said else f"exit code {answer.code}"), ()
    try:
        found = json.loads(answer.out.strip().splitlines()[-1])
        if found is None:
            return None, ()
        providers = tuple(str(provider) for provider in found.get("providers", ()))
        return Module(str(found["version"])), providers
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return Module(error="its import printed what is no answer"), ()


def _distribution(name: str) -> str | None:
    try:
        return str(metadata.version(name))
    except (metadata.PackageNotFoundError, OSError, ValueError, KeyError, TypeError):
        return None


def _isolated(machine: Machine) -> bool:
    """By the environment's own record."""
    if sys.prefix == sys.base_prefix:
        return False
    record = machine.read(f"{sys.prefix}/pyvenv.cfg") or ""
    return not re.search(r"^include-system-site-packages\s*=\s*true", record, re.M | re.I)


def _memory(meminfo: str) -> dict[str, int]:
    """Bytes by name, of lines like "MemTotal:  7802516 kB"."""
    rows = re.findall(r"^(\w+):\s+(\d{1,15}) kB$", meminfo, re.M)
    return {name: int(kibibytes) << 10 for name, kibibytes in rows}


def _power_mode(machine: Machine) -> str | None:
    """Of "NV Power Mode: MAXN_SUPER"."""
    match = re.search(r"NV Power Mode:\s*(\S+)", machine.ask("nvpmodel", "-q") or "")
    return match[1] if match else None


def _power_modes(configuration: str) -> dict[str, int]:
    """Of lines like "< POWER_MODEL ID=2 NAME=MAXN_SUPER >"."""
    rows = re.findall(r"<\s*POWER_MODEL\s+ID=(\d{1,3})\s+NAME=(\S+)\s*>", configuration)
    return {name: int(number) for number, name in rows}
