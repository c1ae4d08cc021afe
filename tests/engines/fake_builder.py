"""A `tensorrt` that builds, as far as we use it; `test_types.py` holds it to the real ones.

A plan is JSON that says what it was built of. What is to go wrong stands in `script`.
"""

from __future__ import annotations

import enum
import hashlib
import json
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CORRUPT, FOREIGN = b"corrupt", b"foreign"  # timing caches that can't be read, or don't fit


@dataclass
class Script:
    """What will happen, and what has.

    Attributes:
        driver: whether CUDA works.
        parser_errors: operator and description.
        builder_error: what the build ends with.
        at_step: called before each step, on a thread of the builder's.
        timed: the layers that had to be timed, in all builds.
        steps: how many steps were completed.
    """

    driver: bool = True
    parser_errors: list[tuple[str, str]] = field(default_factory=list)
    builder_error: str | None = None
    at_step: Callable[[int], None] = lambda _: None
    timed: list[str] = field(default_factory=list)
    steps: int = 0


script = Script()


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    REFIT_IDENTICAL = 1
    STRIP_PLAN = 2
    VERSION_COMPATIBLE = 3


class MemoryPoolType(enum.Enum):
    WORKSPACE = 1


class Dims(list[int]):
    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape)


class IHostMemory(bytes):
    pass


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._graph = b""


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, list[Dims]] = {}

    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:  # noqa: A002
        self._shapes[input] = [min, opt, max]


class ITimingCache:
    def __init__(self, layers: bytes) -> None:
        self._layers: list[str] = json.loads(layers or b"[]")

    def serialize(self) -> IHostMemory:
        return IHostMemory(json.dumps(self._layers).encode())


class IBuilderConfig:
    progress_monitor: IProgressMonitor | None = None

    def __init__(self, log: ILogger) -> None:
        self._log = log
        self._flags: list[str] = []
        self._limits: dict[str, int] = {}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.append(flag.name)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._limits[pool.name] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        for low, typical, high in profile._shapes.values():
            bounds = zip(low, typical, high, strict=True)
            if not all(0 <= a <= b <= c for a, b, c in bounds):
                return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        if serialized_timing_cache == CORRUPT:
            self._log.log(ILogger.Severity.ERROR, "the timing cache is corrupt")
            return None
        cache = ITimingCache(
            b"[]" if serialized_timing_cache == FOREIGN else serialized_timing_cache
        )
        cache._layers += ["foreign"] if serialized_timing_cache == FOREIGN else []
        return cache

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if "foreign" in cache._layers and not ignore_mismatch:
            self._log.log(ILogger.Severity.ERROR, "the timing cache is another device's")
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class Builder:
    def __init__(self, logger: ILogger) -> None:
        if not script.driver:
            logger.log(ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._log = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._log)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None:
        """On threads of its own, as the real one does, while the caller's waits."""
        plans: list[IHostMemory | None] = []
        thread = threading.Thread(target=lambda: plans.append(self._build(network, config)))
        thread.start()
        thread.join()
        return plans[0]

    def _build(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        monitor = config.progress_monitor
        assert monitor is not None
        layers = [f"{network._graph.decode()} {i}" for i in range(3)]
        monitor.phase_start("Building", None, len(layers))
        for step, layer in enumerate(layers):
            script.at_step(step)
            monitor.phase_start("Timing", "Building", 2)
            cache = config._cache
            assert cache is not None
            if layer not in cache._layers:
                script.timed.append(layer)
                cache._layers.append(layer)
            monitor.step_complete("Timing", 0)
            monitor.phase_finish("Timing")
            if not monitor.step_complete("Building", step):
                monitor.phase_finish("Building")
                return None
            script.steps += 1
        monitor.phase_finish("Building")
        if script.builder_error:
            self._log.log(ILogger.Severity.WARNING, "this is only a warning")
            self._log.log(ILogger.Severity.ERROR, script.builder_error)
            self._log.log(ILogger.Severity.INTERNAL_ERROR, "and what follows from it")
            return None
        made = {
            "graph": network._graph.decode(),
            "network": network._flags,
            "flags": config._flags,
            "limits": config._limits,
            "profiles": [profile._shapes for profile in config._profiles],
        }
        return IHostMemory(json.dumps(made).encode())


class ParserError:
    def __init__(self, operator: str, description: str) -> None:
        self._operator, self._description = operator, description

    def desc(self) -> str:
        return self._description

    def node(self) -> int:
        return 12

    def node_name(self) -> str:
        return "layers.0.attention"

    def node_operator(self) -> str:
        return self._operator


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network

    def parse_from_file(self, model: str) -> bool:
        self._network._graph = hashlib.sha256(Path(model).read_bytes()).hexdigest()[:8].encode()
        return not script.parser_errors

    @property
    def num_errors(self) -> int:
        return len(script.parser_errors)

    def get_error(self, index: int) -> ParserError:
        return ParserError(*script.parser_errors[index])


class ICudaEngine:
    def __init__(self) -> None:
        self._graph: str | None = None
        self._refitted = False


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine = engine

    def refit_cuda_engine(self) -> bool:
        self._engine._refitted = self._engine._graph is not None
        return self._engine._refitted


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter = refitter

    def refit_from_file(self, model: str) -> bool:
        if not script.parser_errors:
            self._refitter._engine._graph = model
        return not script.parser_errors

    @property
    def num_errors(self) -> int:
        return len(script.parser_errors)

    def get_error(self, index: int) -> ParserError:
        return ParserError(*script.parser_errors[index])


CLASSES = tuple(
    thing
    for thing in list(globals().values())
    if isinstance(thing, type) and thing.__module__ == __name__ and thing is not Script
)


def fake_tensorrt(version: str) -> Any:
    """The module, with a fresh script."""
    script.__init__()  # type: ignore[misc] # all as at first, for whoever has imported it
    module = types.ModuleType("tensorrt")
    module.__dict__.update({each.__name__: each for each in CLASSES})
    module.__dict__["__version__"] = version
    return module


def fake_cuda(
    *,
    name: bytes = b"Orin",
    capability: tuple[int, int] = (8, 7),
    free: int = 6 << 30,
    unified: bool = True,
    error: str | None = None,
) -> dict[str, types.ModuleType]:
    """The modules of `cuda.bindings.runtime`, with one GPU, or failing with an error."""

    class CudaError(enum.Enum):
        cudaSuccess = 0  # noqa: N815
        cudaErrorInsufficientDriver = 35  # noqa: N815

    code = CudaError[error] if error else CudaError.cudaSuccess
    properties = types.SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        multiProcessorCount=8,
        integrated=int(unified),
    )
    runtime = types.ModuleType("cuda.bindings.runtime")
    runtime.__dict__.update(
        cudaError_t=CudaError,
        cudaGetDeviceProperties=lambda device: (code, properties if device == 0 else None),
        cudaMemGetInfo=lambda: (code, free, 8 << 30),
    )
    cuda, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
    cuda.__dict__["bindings"], bindings.__dict__["runtime"] = bindings, runtime
    return {module.__name__: module for module in (cuda, bindings, runtime)}
