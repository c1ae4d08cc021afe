"""What `himix-edge plan` shows: a pair on a device, vanilla beside HiMix. Standard library only."""

from __future__ import annotations

import dataclasses
from typing import Any

from himix_edge.analysis.devices import GIB, Device, device
from himix_edge.analysis.floors import Phase, first_token, next_token
from himix_edge.analysis.memory import Setting, build_bytes, memory
from himix_edge.config import Design, HiMixConfig
from himix_edge.errors import ConfigError

DESIGNS: tuple[Design, ...] = ("vanilla", "himix")

MEANING = (
    "Computed from dimensions and data sheets, not measured. Memory is an estimate; times are\n"
    "floors: every product at the device's dense peak rate, every weight and cache slot moved once."
)


def plan_report(on: str, config: HiMixConfig, name: str, setting: Setting) -> dict[str, Any]:
    """Memory and floors of both designs, as plain data for JSON.

    Args:
        on: a name of `DEVICES`.
        config: the pair's; its design does not matter.
        name: the pair's, for people.
        setting: see `setting_for`.

    Raises:
        ConfigError: an unknown device, or more text than the decoder can hold.
    """
    designs = {design: dataclasses.replace(config, design=design) for design in DESIGNS}
    longest = min(model.max_text_tokens for model in designs.values())
    if setting.max_text > longest:
        raise ConfigError(
            "the text is longer than the decoder has positions for",
            expected=f"at most {longest} tokens beside the image",
            found=str(setting.max_text),
        )
    return {
        "model": name,
        "device": on,
        **_device_data(device(on)),
        "setting": dataclasses.asdict(setting),
        "image_tokens": config.vision.num_image_tokens,
        "meaning": MEANING.replace("\n", " "),
        "designs": {
            design: _design_data(model, setting, device(on)) for design, model in designs.items()
        },
    }


def _device_data(on: Device) -> dict[str, Any]:
    return {
        "title": on.title,
        "memory_bytes": on.memory_bytes,
        "reserved_bytes": on.reserved_bytes,
        "bandwidth": on.bandwidth,
        "rates": dict(on.rates),
        "sources": list(on.sources),
        "unverified": on.unverified,
    }


def _design_data(config: HiMixConfig, setting: Setting, on: Device) -> dict[str, Any]:
    needed, images = memory(config, setting), config.image_slots
    room = on.memory_bytes - on.reserved_bytes
    build = build_bytes(needed, shared=on.shared_memory) if setting.on_gpu else None
    phases = first_token(config, setting, on)
    return {
        "bytes": {
            **dataclasses.asdict(needed),
            "weights": needed.weights,
            "run": needed.run,
            "build": build,
        },
        "fits": needed.run <= room,
        "build_fits": None if build is None else build <= room,
        "first_token": [_phase_data(phase) for phase in phases],
        "first_token_seconds": sum(phase.seconds for phase in phases),
        "second_token": _phase_data(
            next_token(config, setting, on, images + setting.text_tokens + 1)
        ),
        "last_token": _phase_data(next_token(config, setting, on, images + setting.max_text)),
    }


def _phase_data(phase: Phase) -> dict[str, Any]:
    return {
        "phase": phase.name,
        "operations": phase.operations,
        "bytes": phase.moved,
        "seconds": phase.seconds,
        "bound": phase.bound,
    }


# The same for people.


def plan_text(report: dict[str, Any]) -> str:
    """The report as lines, 100 columns at most where names are not longer."""
    setting, designs = report["setting"], [report["designs"][design] for design in DESIGNS]
    room = report["memory_bytes"] - report["reserved_bytes"]
    stored = ", ".join(
        f"{part} in {setting[key]}"
        for part, key in (("vision graph", "vision"), ("decoder", "weights"))
        if setting[key]
    )
    weights = f"; {stored}" if stored else ""
    text = setting["text_tokens"]
    lines = [
        f"{report['model']} on {report['title']}",
        f"{setting['target']}: {setting['dialect']} graphs in {setting['dtype']}{weights}",
        f"{report['image_tokens']} image tokens, {text} of the question, "
        f"{setting['max_text']} of question and answer at most",
        "",
        _row("memory (MB)", *DESIGNS),
        *_memory_rows(designs),
        f"The device has {report['memory_bytes'] / GIB:g} GiB; of them this takes "
        f"{report['reserved_bytes'] / GIB:g} GiB as the system's, an assumption:",
        _row(f"  fits in {room / 1e6:,.0f} MB", *(_said(design["fits"]) for design in designs)),
    ]
    if designs[0]["build_fits"] is not None:
        answers = (_said(design["build_fits"]) for design in designs)
        lines.append(_row("  so does the build", *answers))
    lines += ["", _row("least time (ms)", *DESIGNS), *_time_rows(designs), "", MEANING]
    lines += [f"Not verified: {report['unverified']}."] if report["unverified"] else []
    lines += [f"Source: {source}" for source in report["sources"]]
    return "\n".join(lines)


def _memory_rows(designs: list[dict[str, Any]]) -> list[str]:
    rows = [
        ("encoder", "encoder"),
        ("connector, or HiMix's projections", "injection"),
        ("decoder", "decoder"),
        ("cache", "cache"),
        ("activations", "activations"),
        ("CUDA and TensorRT themselves", "libraries"),
        ("to run", "run"),
        ("to build, the larger engine", "build"),
    ]
    return [
        _row(f"  {label}", *(f"{design['bytes'][key] / 1e6:,.0f}" for design in designs))
        for label, key in rows
        if designs[0]["bytes"][key]  # on a CPU there is nothing to build, and no CUDA
    ]


def _time_rows(designs: list[dict[str, Any]]) -> list[str]:
    labels = ("vision", "connector, or HiMix's projections", "prefill")
    columns = [design["first_token"] for design in designs]
    rows = [
        _row(f"  {label}", *map(_milliseconds, phases))
        for label, *phases in zip(labels, *columns, strict=True)
    ]
    totals = (f"{1e3 * design['first_token_seconds']:,.2f}" for design in designs)
    rows.append(_row("first token", *totals))
    for label, key in (("second token", "second_token"), ("last token, cache full", "last_token")):
        rows.append(_row(label, *(_milliseconds(design[key]) for design in designs)))
    return rows


def _milliseconds(phase: dict[str, Any]) -> str:
    return f"{1e3 * phase['seconds']:,.2f} {phase['bound']}"


def _row(label: str, *cells: str) -> str:
    return f"{label:<36}" + "".join(f"{cell:>20}" for cell in cells)


def _said(answer: bool) -> str:
    return "yes" if answer else "NO"
