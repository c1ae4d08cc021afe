"""All that running an engine asks of TensorRT: 10.3, 10.16 and 11 alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from himix_edge.contract import Manifest
from himix_edge.engines.gpu import gpu_here
from himix_edge.engines.progress import Report
from himix_edge.engines.store import Engines, find_engines
from himix_edge.engines.trt import (
    collecting_logger,
    engine_device,
    refit_engine,
    tensorrt_version,
)
from himix_edge.errors import EngineError
from himix_edge.runtimes.cuda import Stream

if TYPE_CHECKING:
    import tensorrt as trt

    from himix_edge.bundle.signature import Trusted


def engines_here(
    bundle: Path,
    manifest: Manifest,
    *,
    trusted: Trusted | None = None,
    build: Report | None = None,
) -> Engines:
    """The engines of a bundle that fit this device and may be run on it.

    Args:
        trusted: whose signature makes an engine as good as one that was built here.
        build: builds them where none is fit, and tells this function how far that has come.

    Raises:
        DependencyError: no TensorRT, or no cuda-python.
        EngineError: no GPU, no engine that fits it, or one that can't be built.
    """
    tensorrt_version()  # first: without TensorRT the GPU is no matter
    device = engine_device(gpu_here())
    try:
        found = find_engines(bundle, manifest, device, trusted=trusted)
        if build is not None:
            found.check()  # those that are damaged are built again
        return found
    except EngineError:
        if build is None:
            raise
    from himix_edge.engines.build import build_engines
    from himix_edge.engines.plan import plan_build

    return build_engines(plan_build(bundle), report=build).engines


class Library:
    """TensorRT's runtime, and the errors that it has logged."""

    def __init__(self) -> None:
        import tensorrt as trt

        self.errors: list[str] = []
        self._logger = collecting_logger(self.errors)  # must live as long as what it is given to
        self._runtime = trt.Runtime(self._logger)
        self.strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE

    def engine_from_plan(self, engines: Engines, plan: Path, graph: Path) -> trt.ICudaEngine:
        """Loads an engine, and gives it its weights where it was built without.

        Raises:
            EngineError: the file is not that of its record, or TensorRT can't load it.
        """
        self.errors.clear()
        engine = self._runtime.deserialize_cuda_engine(engines.read(plan))  # the bytes just checked
        if engine is None:
            raise self.error(f"TensorRT can't load {plan}")
        if engines.key.stripped:
            refit_engine(engine, graph)
        return engine

    def error(self, failed: str) -> EngineError:
        """What failed, in TensorRT's own words."""
        return EngineError(failed, found="; ".join(self.errors) or "no reason given")


class Context:
    """An execution context with one profile; memory for the shapes of that profile alone."""

    def __init__(
        self, library: Library, engine: trt.ICudaEngine, profile: int, stream: Stream
    ) -> None:
        self._library = library
        made = engine.create_execution_context(library.strategy)
        context = cast("trt.IExecutionContext | None", made)  # the stubs don't know of None
        if context is None or not context.set_optimization_profile_async(profile, stream.handle):
            raise library.error("TensorRT can't make an execution context")
        stream.synchronize()
        self._context = context

    def bind(self, name: str, address: int, shape: tuple[int, ...] | None = None) -> None:
        """Says where a tensor is, and of an input, what shape it has."""
        self._library.errors.clear()
        context = self._context
        if shape is not None and not context.set_input_shape(name, shape):
            raise self._library.error(f"the engine doesn't take {name} as {list(shape)}")
        if not context.set_tensor_address(name, address):
            raise self._library.error(f"the engine has no tensor {name}")

    def enqueue(self, stream: Stream) -> None:
        """Puts a run on a stream."""
        self._library.errors.clear()
        if not self._context.execute_async_v3(stream.handle):
            raise self._library.error("TensorRT can't run the engine")
