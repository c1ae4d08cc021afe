"""All that building an engine asks of TensorRT: 10.3, 10.16 and 11 alike.

What can be decided without TensorRT is elsewhere: the shapes in `profiles.py`, the memory in
`memory.py`, the progress in `progress.py`, what goes where in `build.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsInt, cast

from himix_edge.engines.gpu import Gpu
from himix_edge.engines.key import EngineDevice, EngineKey
from himix_edge.engines.profiles import Profile
from himix_edge.engines.progress import BuildProgress
from himix_edge.errors import DependencyError, EngineError

if TYPE_CHECKING:
    import tensorrt as trt


def tensorrt_version() -> str:
    """The version that is installed, in full.

    Raises:
        DependencyError: none is.
    """
    try:
        import tensorrt as trt
    except ImportError as error:
        raise DependencyError(
            "TensorRT is missing",
            found=str(error),
            fix="on a Jetson: sudo apt install python3-libnvinfer, in an environment made with "
            "--system-site-packages; elsewhere: pip install tensorrt",
        ) from error
    version: str = trt.__version__
    return version


def engine_device(gpu: Gpu) -> EngineDevice:
    """What an engine built here fits.

    Raises:
        DependencyError: no TensorRT.
    """
    return EngineDevice("tensorrt", tensorrt_version(), gpu.name, gpu.compute_capability)


def collecting_logger(errors: list[str]) -> trt.ILogger:
    """A logger that appends errors to a list, and says nothing."""
    import tensorrt as trt

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                errors.append(msg)

    return Collector()


def engine_from_onnx(
    graph: Path,
    target: Path,
    profiles: Sequence[Profile],
    key: EngineKey,
    timings: bytes,
    workspace_bytes: int,
    progress: BuildProgress,
) -> bytes:
    """Builds an engine and writes it.

    Args:
        graph: an ONNX file, its weights beside it.
        target: the plan's file.
        profiles: in the order in which the runtime will number them.
        key: says whether it is to be version compatible, and stripped of its weights.
        timings: what earlier builds measured, where they fit; TensorRT parses them.
        workspace_bytes: how much memory the builder may use to try a kernel.

    Returns:
        the timings, with those of this build.

    Raises:
        EngineError: TensorRT can't parse the graph, or can't build it, with its own first error;
            or the build was called off.
        OSError: the plan can't be written.
    """
    import tensorrt as trt

    errors: list[str] = []
    log = collecting_logger(errors)
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # what its bindings make of a null pointer: CUDA does not work
        raise _refused("TensorRT can't start", [*errors, str(error)]) from error
    # The only mode of TensorRT 11, which ignores the flag.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        found = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise _refused(f"TensorRT {trt.__version__} can't read {graph}", found + errors)
    config = _config(builder, profiles, key, workspace_bytes, graph)
    monitor = _monitor(progress)  # must live as long as the build: the config doesn't keep it
    config.progress_monitor = monitor
    _attach_timings(config, timings)
    errors.clear()  # those of a timing cache that doesn't fit: it is begun anew
    # The types that its bindings give say nothing of None, here and below.
    plan = cast("trt.IHostMemory | None", builder.build_serialized_network(network, config))
    if plan is None:
        if progress.cancelled:
            raise EngineError(f"the build of {graph} was called off")
        raise _refused(f"TensorRT {trt.__version__} can't build {graph}", errors)
    target.write_bytes(memoryview(cast("Any", plan)))
    return bytes(memoryview(cast("Any", config.get_timing_cache().serialize())))


def refit_engine(engine: trt.ICudaEngine, graph: Path) -> None:
    """Gives a stripped engine its weights, from the graph that it was built of.

    Raises:
        EngineError: TensorRT can't find them all there.
    """
    import tensorrt as trt

    errors: list[str] = []
    log = collecting_logger(errors)
    refitter = trt.Refitter(engine, log)
    reader = trt.OnnxParserRefitter(refitter, log)
    if not (reader.refit_from_file(str(graph)) and refitter.refit_cuda_engine()):
        found = [_parser_error(reader.get_error(i)) for i in range(reader.num_errors)]
        raise _refused(f"TensorRT can't take an engine's weights from {graph}", found + errors)


def _config(
    builder: trt.Builder,
    profiles: Sequence[Profile],
    key: EngineKey,
    workspace_bytes: int,
    graph: Path,
) -> trt.IBuilderConfig:
    import tensorrt as trt

    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    if key.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if key.stripped:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for name, bounds in profile.shapes.items():
            shapes.set_shape(name, *(trt.Dims(list(shape)) for shape in bounds))
        if config.add_optimization_profile(shapes) < 0:
            raise EngineError(f"TensorRT refuses the profile {profile.name!r} of {graph}")
    return config


def _attach_timings(config: trt.IBuilderConfig, timings: bytes) -> None:
    """Those that were kept, or none where they are corrupt or another GPU's."""
    cache = cast("trt.ITimingCache | None", config.create_timing_cache(timings))
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _monitor(progress: BuildProgress) -> trt.IProgressMonitor:
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(
            self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt
        ) -> None:
            progress.start(phase_name, parent_phase, int(num_steps))

        def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
            return progress.step(phase_name, int(step))

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()


def _parser_error(error: trt.ParserError) -> str:
    """ "Attention (node 12, layers.0.attention): ..."; the node is -1 where it is none's."""
    where = f"{error.node_operator()} (node {error.node()}, {error.node_name()}): "
    return f"{where if error.node() >= 0 else ''}{error.desc()}"


def _refused(failed: str, errors: list[str]) -> EngineError:
    first = next((error.strip() for error in errors if error.strip()), "no reason given")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return EngineError(failed, found=f"{first}{more}")
