"""What fits a device by its facts, and the command for each thing missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from himix_edge.analysis.memory import Setting, build_bytes, memory
from himix_edge.doctor.facts import Facts, Gpu
from himix_edge.engines.versions import (
    FIRST_TENSORRT,
    Version,
    reads,
    tensorrt_of_jetpack,
    version_of,
    version_text,
)
from himix_edge.presets import DECODERS, ENCODERS, preset_config
from himix_edge.targets import TARGETS

# What TensorRT for RTX works on: cards for desks, not for data centres.
RTX_CAPABILITIES = ("7.5", "8.6", "8.9", "12.0", "12.1")
BASE = ("numpy", "pillow", "tokenizers", "jinja2")  # what a bundle needs besides an engine library
SMALL = 16 << 30  # bytes of memory below which a build may need more than there is
RTX_PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx"


@dataclass(frozen=True)
class Advice:
    """What is missing, and the commands that bring it."""

    missing: str
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """One pair of presets in the memory that is free now.

    Attributes:
        run_bytes, build_bytes: as `analysis.memory` estimates them.
        runs: whether there is room to run it.
        builds: whether there is room to build its engines, swap included; None where none are.
    """

    encoder: str
    decoder: str
    run_bytes: int
    build_bytes: int
    runs: bool
    builds: bool | None


@dataclass(frozen=True)
class Verdict:
    """What follows from the facts.

    Attributes:
        target: the best of `TARGETS` for this device.
        targets: all that fit, the best first.
        devices: the values of `run --device`; "" where it works, else what it lacks.
        fits: every pair of presets, as exported for `target`.
        advice: in the order to follow it in.
    """

    target: str
    targets: tuple[str, ...]
    devices: Mapping[str, str]
    fits: tuple[Fit, ...]
    advice: tuple[Advice, ...]

    @property
    def can_run(self) -> bool:
        """Whether a bundle runs on any `--device`, with all that the base package needs."""
        return not all(self.devices.values())


def judge(facts: Facts) -> Verdict:
    """Concludes; facts that are missing count against."""
    targets = _targets(facts)
    return Verdict(
        targets[0],
        targets,
        _devices(facts),
        tuple(_fits(facts, targets[0])),
        tuple(_advice(facts, targets[0])),
    )


def tensorrt_version(facts: Facts) -> Version:
    """Of the Python module, or of the library that it would load."""
    module = facts.modules["tensorrt"]
    libraries = (f"libnvinfer{major}" for major in (11, 10, 8))
    installed = (facts.packages[name] for name in libraries if name in facts.packages)
    return version_of(module.version if module else None) or version_of(next(installed, None))


def _targets(facts: Facts) -> tuple[str, ...]:
    version, gpu = tensorrt_version(facts), next(iter(facts.gpus), None)
    found = []
    if facts.jetson:
        # TensorRT is JetPack's: where it is not installed yet, JetPack says which it will be.
        version = version or tensorrt_of_jetpack(facts.l4t)
        if reads(version, "native"):
            found.append("jetpack-7.2")
        if reads(version, "portable"):
            found.append("jetpack-6.2")
    elif gpu is not None:
        if reads(version, "native"):
            found.append("tensorrt")
        elif reads(version, "portable"):
            found.append("jetpack-6.2")
        if gpu.compute_capability in RTX_CAPABILITIES:
            found.append("rtx")
    return (*found, "cpu")


def _devices(facts: Facts) -> dict[str, str]:
    base = [name for name in BASE if not facts.distributions[name]]
    runtime = _unless(_works(facts, "onnxruntime"), "onnxruntime")
    gpu = [] if facts.gpus else ["an NVIDIA GPU with its driver"]
    fits = _works(facts, "tensorrt") and reads(tensorrt_version(facts), "portable")
    tensorrt = _unless(fits, f"tensorrt, {version_text(FIRST_TENSORRT['portable'])} or later")
    tensorrt += _unless(_works(facts, "cuda.bindings.runtime"), "cuda-python")
    if "TensorrtExecutionProvider" in facts.providers:  # which takes its place
        tensorrt = []
    lacks = {
        "cpu": runtime,
        "cuda": gpu + _unless("CUDAExecutionProvider" in facts.providers, "onnxruntime-gpu"),
        "tensorrt": gpu + tensorrt,
        "tensorrt-rtx": runtime
        + gpu
        + _unless(_works(facts, "onnxruntime_ep_nv_tensorrt_rtx"), RTX_PACKAGE),
    }
    return {name: ", ".join(base + missing) for name, missing in lacks.items()}


def _unless(there: bool, name: str) -> list[str]:
    return [] if there else [name]


def _works(facts: Facts, name: str) -> bool:
    module = facts.modules[name]
    return module is not None and module.error is None


def _fits(facts: Facts, target: str) -> Iterator[Fit]:
    chosen = TARGETS[target]
    setting = Setting(target, chosen.dialect, chosen.dtype)
    free = next((gpu.free_bytes for gpu in facts.gpus), None)  # None: it shares the system's
    room = facts.available_bytes or 0
    if setting.on_gpu and free is not None:
        room = free
    swap = (facts.swap_bytes or 0) if free is None else 0
    for encoder in ENCODERS:
        for decoder in DECODERS:
            needed = memory(preset_config(encoder, decoder), setting)
            build = build_bytes(needed, shared=free is None)
            yield Fit(
                encoder,
                decoder,
                needed.run,
                build,
                needed.run <= room,
                build <= room + swap if setting.on_gpu else None,
            )


# Advice.


def _advice(facts: Facts, target: str) -> Iterator[Advice]:
    missing = [name for name in (*BASE, "typer") if not facts.distributions[name]]
    if missing:
        yield Advice(", ".join(missing), ("pip install himix-edge",))
    if facts.jetson:
        yield from _jetson_advice(facts)
    elif facts.gpus:
        yield from _gpu_advice(facts, facts.gpus[0])
    if not _works(facts, "onnxruntime") and (target == "cpu" or not _works(facts, "tensorrt")):
        yield Advice("onnxruntime, to run on the CPU", ("pip install 'himix-edge[cpu]'",))


def _gpu_advice(facts: Facts, gpu: Gpu) -> Iterator[Advice]:
    if gpu.compute_capability not in RTX_CAPABILITIES:
        if not _works(facts, "tensorrt"):
            yield Advice("TensorRT", ("pip install tensorrt",))
    elif not _works(facts, "onnxruntime_ep_nv_tensorrt_rtx"):
        yield Advice("TensorRT for RTX", (f"pip install onnxruntime {RTX_PACKAGE}",))
    yield from _cuda_python_advice(facts)


def _jetson_advice(facts: Facts) -> Iterator[Advice]:
    if facts.l4t and not reads(tensorrt_of_jetpack(facts.l4t), "portable"):
        url = "https://developer.nvidia.com/embedded/jetpack"
        first = version_text(FIRST_TENSORRT["portable"])
        yield Advice(
            f"JetPack 6.2 or 7.2, which have TensorRT {first} or later", (f"flash it anew: {url}",)
        )
        return
    yield from _tensorrt_advice(facts)
    yield from _cuda_python_advice(facts)
    fastest = next((name for name in ("MAXN_SUPER", "MAXN") if name in facts.power_modes), None)
    if facts.power_mode and fastest and facts.power_mode != fastest:
        number = facts.power_modes[fastest]
        yield Advice(
            f"the fastest power mode, {fastest}; it runs in {facts.power_mode}",
            (f"sudo nvpmodel -m {number}", "sudo jetson_clocks"),
        )
    total, swap = facts.memory_bytes or 0, facts.swap_bytes or 0
    if facts.desktop and total < SMALL:
        yield Advice(
            "the memory that the desktop takes",
            ("sudo systemctl set-default multi-user.target", "sudo reboot"),
        )
    if total < SMALL and swap < total:
        yield Advice(
            "swap, to build engines with",
            (
                "sudo fallocate -l 16G /swapfile",
                "sudo chmod 600 /swapfile",
                "sudo mkswap /swapfile",
                "sudo swapon /swapfile",
            ),
        )


def _tensorrt_advice(facts: Facts) -> Iterator[Advice]:
    """The first thing that keeps Python from JetPack's TensorRT."""
    module, packages = facts.modules["tensorrt"], facts.packages
    if not any(name.startswith("libnvinfer") for name in packages) and module is None:
        yield Advice("TensorRT and CUDA", ("sudo apt update", "sudo apt install nvidia-jetpack"))
    elif module and module.error and "libnvdla_compiler" in module.error:
        yield Advice(
            "the compiler of the DLA, which TensorRT loads",
            ("sudo apt install nvidia-l4t-dla-compiler",),
        )
    elif module and module.error:
        yield Advice(
            f"a TensorRT that Python can load ({module.error})",
            ("sudo apt install --reinstall python3-libnvinfer",),
        )
    elif module is None and "python3-libnvinfer" not in packages:
        yield Advice("TensorRT's Python module", ("sudo apt install python3-libnvinfer",))
    elif module is None:
        why = "hides apt's packages" if facts.isolated else f"is Python {facts.python}"
        yield Advice(
            f"TensorRT's Python module is installed; this environment {why}",
            (
                "/usr/bin/python3 -m venv --system-site-packages ~/himix",
                "~/himix/bin/pip install himix-edge",
            ),
        )


def _cuda_python_advice(facts: Facts) -> Iterator[Advice]:
    if _works(facts, "cuda.bindings.runtime") or not _works(facts, "tensorrt"):
        return
    # Its runtime is linked in, so it should be no newer than the driver's.
    ours = ".".join(map(str, version_of(facts.cuda)[:2]))
    wanted = ours or ("12.6" if (facts.l4t or "").startswith("36.") else "13")
    yield Advice("cuda-python, of CUDA's version", (f"pip install 'cuda-python=={wanted}.*'",))
