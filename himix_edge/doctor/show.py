"""Facts and verdict, for people and for scripts."""

from __future__ import annotations

import dataclasses
from typing import Any

from himix_edge.doctor.facts import Facts, Gpu, Module
from himix_edge.doctor.judge import Fit, Verdict, tensorrt_version
from himix_edge.targets import TARGETS


def as_data(facts: Facts, verdict: Verdict) -> dict[str, Any]:
    """Everything, ready for JSON."""
    return {
        "can_run": verdict.can_run,
        "facts": dataclasses.asdict(facts),
        "verdict": dataclasses.asdict(verdict),
    }


def as_text(facts: Facts, verdict: Verdict) -> str:
    """What matters, in one screen."""
    lines = [f"{label:<15}{said}" for label, said in _facts_rows(facts)]
    lines += ["", "run --device"]
    lines += [
        f"  {name:<13}{f'lacks {lacking}' if lacking else 'works'}"
        for name, lacking in verdict.devices.items()
    ]
    best = TARGETS[verdict.target]
    lines += [
        "",
        f"export --target {verdict.target}   for {best.engine}"
        + (f"; also {', '.join(verdict.targets[1:])}" if verdict.targets[1:] else ""),
        "",
        *_fit_lines(verdict),
    ]
    if verdict.advice:
        lines += ["", "Missing, and what brings it:"]
    for advice in verdict.advice:
        lines.append(f"  {advice.missing}")
        lines += [f"      {command}" for command in advice.commands]
    if facts.problems:
        lines += ["", "Could not be read:", *(f"  {problem}" for problem in facts.problems)]
    answer = "A bundle can run here." if verdict.can_run else "No bundle can run here yet."
    return "\n".join([*lines, "", answer])


def _facts_rows(facts: Facts) -> list[tuple[str, str]]:
    rows = [("system", f"{facts.system}, Python {facts.python}")]
    if facts.jetson:
        rows += [
            ("board", facts.board or "unknown"),
            ("JetPack", f"{facts.jetpack or 'unknown'} (Jetson Linux {facts.l4t or 'unknown'})"),
            ("power mode", facts.power_mode or "unknown"),
        ]
    rows += [("GPU", _gpu_said(gpu)) for gpu in facts.gpus] or [("GPU", "none of NVIDIA's found")]
    driver = f", driver {facts.driver}" if facts.driver else ""
    library, named = ".".join(map(str, tensorrt_version(facts))), facts.distributions
    return [
        *rows,
        ("CUDA", f"{facts.cuda or 'no toolkit'}{driver}"),
        ("TensorRT", f"{library or 'none'}; in Python {_module_said(facts.modules['tensorrt'])}"),
        ("cuda-python", _module_said(facts.modules["cuda.bindings.runtime"])),
        ("ONNX Runtime", _ort_said(facts)),
        ("for RTX", _module_said(facts.modules["onnxruntime_ep_nv_tensorrt_rtx"])),
        (
            "memory",
            f"{_gigabytes(facts.memory_bytes)}, of them {_gigabytes(facts.available_bytes)} free; "
            f"swap {_gigabytes(facts.swap_bytes)}",
        ),
        ("packages", ", ".join(f"{name} {of or 'none'}" for name, of in named.items())),
    ]


def _gpu_said(gpu: Gpu) -> str:
    capability = f"compute capability {gpu.compute_capability or 'unknown'}"
    if gpu.memory_bytes is None:
        return f"{gpu.name}, {capability}"
    return f"{gpu.name}, {capability}, {_gigabytes(gpu.memory_bytes)}"


def _module_said(module: Module | None) -> str:
    if module is None:
        return "none"
    if module.error:
        return f"can't be imported: {module.error}"
    return module.version or "there, of unknown version"


def _ort_said(facts: Facts) -> str:
    providers = (name.removesuffix("ExecutionProvider") for name in facts.providers)
    listed = f" ({', '.join(providers)})" if facts.providers else ""
    return f"{_module_said(facts.modules['onnxruntime'])}{listed}"


def _fit_lines(verdict: Verdict) -> list[str]:
    """The presets' decoders, each with the largest encoder that it has room beside."""
    lines = ["What fits in the memory that is free now, by estimate:"]
    by_decoder: dict[str, list[Fit]] = {}
    for fit in verdict.fits:
        by_decoder.setdefault(fit.decoder, []).append(fit)
    for decoder, fits in by_decoder.items():
        fitting = [fit for fit in fits if fit.runs]
        if not fitting:
            least = min(fits, key=lambda fit: fit.run_bytes)
            lines.append(f"  {decoder:<16}nothing; {_gigabytes(least.run_bytes)} at least")
            continue
        most = max(fitting, key=lambda fit: fit.run_bytes)
        build = ""
        if most.builds is not None:
            build = "; builds here" if most.builds else "; to build, it takes "
            build += "" if most.builds else _gigabytes(most.build_bytes)
        lines.append(f"  {decoder:<16}with {most.encoder}, {_gigabytes(most.run_bytes)}{build}")
    return lines


def _gigabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"
