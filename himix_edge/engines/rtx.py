"""ONNX graphs into engines of TensorRT for RTX, on any machine: no GPU, no driver is needed.

A GPU of the architecture in question loads the engine and compiles the last of it for itself. The
builder is the one in NVIDIA's wheel of an execution provider for ONNX Runtime, which is asked here
to compile and never to run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from himix_edge.engines import rtx_worker
from himix_edge.engines.profiles import Profile, Shape
from himix_edge.engines.rtx_driver import driver_stubs, symbols
from himix_edge.engines.rtx_worker import Job, Report
from himix_edge.errors import ConfigError, DependencyError, EngineError, OutputError, closest
from himix_edge.files import whole_file

# Of a decode step: pinned to exactly one token, it would keep the weights a second time.
MAX_DECODE = 2
SMS = ("sm86", "sm89", "sm120", "sm121")  # RTX 30, RTX 40, RTX 50, GB10
ENGINE_SUFFIX = ".engine"

PACKAGE = rtx_worker.PACKAGE
WHEEL = "onnxruntime-ep-nv-tensorrt-rtx-cu13"
TESTED = "0.5.0"  # of the wheel; the switch below is no part of what it promises
INSTALL = f"pip install {WHEEL}=={TESTED} onnxruntime onnx"

_PROVIDER = "libonnxruntime_providers_nv_tensorrt_rtx.so"
_SWITCH = (  # the guard of a static variable, and the variable: `rtx_worker` says what for
    "_ZGVZN10trt_rtx_ep22IsWin32kLockdownActiveEvE6active",
    "_ZZN10trt_rtx_ep22IsWin32kLockdownActiveEvE6active",
)
_ANCHOR = "CreateEpFactories"
_UNWRITTEN = ("engine stream output file", "when saving model to")  # an engine, its graph


@dataclass(frozen=True)
class Compiled:
    """What compiling a graph took.

    Attributes:
        seconds: of the builder alone.
        engine_bytes: the engine's size.
        peak_bytes: the most memory that the compiling process held.
    """

    seconds: float
    engine_bytes: int
    peak_bytes: int


def check_sm(sm: str) -> None:
    """Refuses an architecture that can't be compiled for.

    Raises:
        ConfigError: it names the closest.
    """
    if sm not in SMS:
        raise ConfigError(f"no engine can be compiled for {sm!r}", fix=closest(sm, SMS))


def version() -> str:
    """The version of TensorRT for RTX, as "1.7.1"; nothing is loaded for it.

    Raises:
        DependencyError: it is not installed.
    """
    stem = "libtensorrt_rtx.so."
    names = [path.name for path in _package(PACKAGE, WHEEL).glob(f"{stem}*.*")]
    if not names:
        raise _dependency_error(f"a library {stem}* in {WHEEL}", "none")
    return max(names).removeprefix(stem)


def libraries() -> list[Path]:
    """What of the wheel is linked against a driver.

    Raises:
        DependencyError: it is not installed.
    """
    folder = _package(PACKAGE, WHEEL)
    return sorted(path for path in folder.glob("*.so*") if not path.is_symlink())


def engine_from_onnx(graph: Path, target: Path, sm: str, profiles: Sequence[Profile]) -> Compiled:
    """Compiles a graph into one engine.

    Args:
        graph: an ONNX file, its weights beside it.
        target: the ONNX file to write. It has one node, which names the engine beside it:
            `vision.onnx` and `vision.engine`. They come whole, or not at all.
        sm: one of `SMS`.
        profiles: shapes to compile for, of all inputs in each. A runtime chooses among them by
            their place (`nv_profile_index`).

    Raises:
        ConfigError: an `sm` that can't be compiled for.
        DependencyError: a package, a compiler or `nm` is missing.
        EngineError: the graph did not become one engine; it has the builder's own words.
        OutputError: the files can't be written.
    """
    check_sm(sm)
    with whole_file(target) as temporary:
        job = _job(graph.absolute(), temporary.absolute(), sm, profiles)
        report = _run(job)
        if report.errors:
            _fail(graph, target, sm, report.errors)
        engine = _only_engine(graph, temporary, sm)
        compiled = Compiled(report.seconds, engine.stat().st_size, report.peak_bytes)
        engine.replace(target.with_suffix(ENGINE_SUFFIX))
    return compiled


def _job(graph: Path, target: Path, sm: str, profiles: Sequence[Profile]) -> Job:
    package, runtime = _package(PACKAGE, WHEEL), _package("onnxruntime", "onnxruntime")
    libraries = sorted(runtime.glob("capi/libonnxruntime.so.1*"))
    if not libraries:
        raise _dependency_error("libonnxruntime.so.1.* in onnxruntime", "none")
    provider = package / _PROVIDER
    options = {
        f"nv_profile_{bound}_shapes": _shapes(profiles, place)
        for place, bound in enumerate(("min", "opt", "max"))
    }
    return Job(
        runtime=str(libraries[-1]),
        provider=str(provider),
        switch=_switch(provider),
        graph=str(graph),
        target=str(target),
        sm=sm,
        options=options,
    )


def _shapes(profiles: Sequence[Profile], place: int) -> str:
    """One bound of all profiles as the provider reads it: an input's name comes once a profile."""

    def text(shape: Shape) -> str:
        return "x".join(map(str, shape))

    return ",".join(
        f"{name}:{text(bounds[place])}"
        for profile in profiles
        for name, bounds in profile.shapes.items()
    )


def _switch(provider: Path) -> list[int]:
    """Where the switch stands, counted from a function whose address a process can ask for."""
    addresses = {
        name: int(address, 16)
        for address, _, name in (
            line.split() for line in symbols(provider, "--defined-only").splitlines()
        )
        if name in (*_SWITCH, _ANCHOR)
    }
    if missing := [name for name in (*_SWITCH, _ANCHOR) if name not in addresses]:
        raise _dependency_error(f"{WHEEL} {TESTED}", f"another, without {', '.join(missing)}")
    return [addresses[name] - addresses[_ANCHOR] for name in _SWITCH]


def _run(job: Job) -> Report:
    """Runs a job in a process of its own, which ends with this call, whatever ends it."""
    paths = [str(driver_stubs(libraries())), os.environ.get("LD_LIBRARY_PATH", "")]
    with subprocess.Popen(
        [sys.executable, "-m", rtx_worker.__name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=Path(__file__).parents[2],  # where the package is found, installed or not
        env={**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))},
    ) as process:
        try:
            report, said = process.communicate(json.dumps(dataclasses.asdict(job)))
        finally:  # Ctrl-C too: it must be gone before its files are cleared away
            process.kill()
            process.wait()
    if process.returncode == 0:
        body: dict[str, Any] = json.loads(report)
        return Report(**body)
    how = f"exit status {process.returncode}"
    if process.returncode < 0:
        how = signal.Signals(-process.returncode).name
    last = said.strip().splitlines()[-3:]
    return Report(0.0, 0, [f"the builder ended with {how}", *last])


def _only_engine(graph: Path, compiled: Path, sm: str) -> Path:
    """The engine of a compiled graph under the name that it is to have, if it is all there is."""
    import onnx

    model = onnx.load(compiled, load_external_data=False)
    nodes = list(model.graph.node)
    left = [node for node in nodes if node.op_type != "EPContext"]
    if left or len(nodes) != 1:
        engines = len(nodes) - len(left)
        names = ", ".join(f"{node.op_type} {node.name!r}" for node in left)
        raise _engine_error(graph, sm, f"{engines} and {names}" if left else str(engines))
    attribute = next(part for part in nodes[0].attribute if part.name == "ep_cache_context")
    engine = compiled.with_suffix(ENGINE_SUFFIX)
    (compiled.parent / attribute.s.decode()).replace(engine)
    attribute.s = engine.name.encode()
    onnx.save(model, compiled)
    return engine


def _package(module: str, package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise _dependency_error(package, "none")
    return Path(next(iter(spec.submodule_search_locations)))


def _dependency_error(expected: str, found: str) -> DependencyError:
    return DependencyError(
        "cannot compile for TensorRT for RTX", expected=expected, found=found, fix=INSTALL
    )


def _fail(graph: Path, target: Path, sm: str, errors: Sequence[str]) -> NoReturn:
    text = "; ".join(dict.fromkeys(errors))  # the provider repeats itself
    if any(sign in text for sign in _UNWRITTEN):
        raise OutputError(
            f"cannot write {target}",
            expected="a folder that can be written, with room on the disk",
            found=text,
            fix="choose another place, or free some space",
        )
    raise _engine_error(graph, sm, text)


def _engine_error(graph: Path, sm: str, found: str) -> EngineError:
    return EngineError(f"{graph} can't be compiled for {sm}", expected="one engine", found=found)
