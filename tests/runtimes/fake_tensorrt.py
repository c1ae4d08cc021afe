"""TensorRT as far as a runtime uses it: its engines run the ONNX graphs they were built of.

They read and write the bytes at the addresses they are given, when the stream comes to it.
`engines_of` puts such engines into a bundle by the store's own rules.
"""

from __future__ import annotations

import enum
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]

from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH, Manifest, past_names, present_names
from himix_edge.engines.profiles import (
    Profile,
    Sizes,
    decoder_profiles,
    engine_sizes,
    vision_profile,
)
from himix_edge.engines.store import (
    EngineDevice,
    engine_key,
    engine_name,
    seal_engines,
    whole_engines,
)
from tests.runtimes.fake_cuda import FakeGpu

VERSION = "10.16.1.11"
NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
}
_sessions: dict[Path, Any] = {}


def engines_of(
    bundle: Path,
    gpu: FakeGpu,
    *,
    version: str = VERSION,
    stripped: bool = False,
    max_prompt: int | None = None,
    max_cache: int | None = None,
) -> None:
    """Engines for that GPU, in the bundle."""
    manifest = Manifest.read(bundle)
    sizes = engine_sizes(manifest, max_prompt, max_cache)
    major, minor = gpu.capability
    device = EngineDevice("tensorrt", version, f"{gpu.name}, 8 SMs", f"{major}.{minor}")
    key = engine_key(manifest, device, sizes, stripped=stripped)
    with whole_engines(bundle, key) as folder:
        for graph, profiles in _graphs(manifest, sizes).items():
            plan = {
                "graph": str(bundle / graph),
                "profiles": [dict(profile.shapes) for profile in profiles],
                "weights": not stripped,
            }
            (folder / engine_name(graph, "tensorrt")).write_text(json.dumps(plan))
    seal_engines(bundle, key)


def _graphs(manifest: Manifest, sizes: Sizes) -> dict[str, tuple[Profile, ...]]:
    return {
        VISION_GRAPH: (vision_profile(manifest),),
        DECODER_GRAPH: decoder_profiles(manifest, sizes),
    }


def tensorrt_of(gpu: FakeGpu, *, version: str = VERSION) -> types.ModuleType:
    """`tensorrt` for that GPU: nothing in it that isn't in the real one."""

    class ILogger:
        class Severity(enum.Enum):
            INTERNAL_ERROR = 0
            ERROR = 1

        def log(self, severity: Severity, msg: str) -> None:
            raise NotImplementedError

    class ExecutionContextAllocationStrategy(enum.Enum):
        STATIC = 0
        ON_PROFILE_CHANGE = 1

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
            try:
                plan = json.loads(bytes(serialized_engine))
            except ValueError:
                self._logger.log(ILogger.Severity.ERROR, "magic tag does not match")
                return None
            return ICudaEngine(plan, self._logger)

    class ICudaEngine:
        def __init__(self, plan: dict[str, Any], logger: ILogger) -> None:
            self._plan, self._logger = plan, logger

        def create_execution_context(
            self, strategy: ExecutionContextAllocationStrategy
        ) -> IExecutionContext:
            assert strategy is ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
            assert self._plan["weights"], "a stripped engine was not refitted"
            return IExecutionContext(self._plan, self._logger)

    class IExecutionContext:
        def __init__(self, plan: dict[str, Any], logger: ILogger) -> None:
            self._logger = logger
            self._profiles = plan["profiles"]
            self._profile: dict[str, Any] | None = None
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._session = _session(Path(plan["graph"]))
            self._inputs = {node.name: node for node in self._session.get_inputs()}
            self._outputs = {node.name: node for node in self._session.get_outputs()}

        def _refuse(self, message: str) -> bool:
            self._logger.log(ILogger.Severity.ERROR, message)
            return False

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            assert stream_handle in gpu.streams
            self._profile = self._profiles[profile_index]
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            assert self._profile is not None
            if name not in self._inputs:
                return self._refuse(f"{name} is no input")
            low, _, high = self._profile[name]
            fits = len(shape) == len(low) and all(
                a <= size <= b for a, size, b in zip(low, shape, high, strict=True)
            )
            if not fits:
                return self._refuse(f"{name} {shape} is not within {low} and {high}")
            self._shapes[name] = tuple(shape)
            return True

        def set_tensor_address(self, name: str, memory: int) -> bool:
            if name not in self._inputs and name not in self._outputs:
                return self._refuse(f"{name} is no tensor")
            assert memory % 256 == 0
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            if missing := [n for n in (*self._inputs, *self._outputs) if n not in self._addresses]:
                return self._refuse(f"no address for {missing[0]}")
            if missing := [name for name in self._inputs if name not in self._shapes]:
                return self._refuse(f"no shape for {missing[0]}")
            addresses, shapes = dict(self._addresses), dict(self._shapes)
            if not self._in_place(addresses):
                return self._refuse("a cache that is updated in place has two addresses")
            gpu.streams[stream_handle].put(lambda: self._run(addresses, shapes))
            return True

        def _in_place(self, addresses: dict[str, int]) -> bool:
            """What the layer that updates a cache asks: past and present at one address."""
            layers = len(self._outputs) // 2
            pairs = zip(past_names(layers), present_names(layers), strict=True)
            return all(
                addresses[past] == addresses[present]
                for past, present in pairs
                if past in self._inputs and self._outputs[present].shape[2] == self._slots(past)
            )

        def _slots(self, past: str) -> int:
            size = self._inputs[past].shape[2]
            return size if isinstance(size, int) else -1

        def _run(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
            feeds = {
                name: _array(gpu, addresses[name], NUMPY_TYPES[node.type], shapes[name]).copy()
                for name, node in self._inputs.items()
            }
            outputs = self._session.run(list(self._outputs), feeds)
            for name, output in zip(self._outputs, outputs, strict=True):
                _array(gpu, addresses[name], output.dtype, output.shape)[...] = output

    class Refitter:
        def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
            self._plan = engine._plan

        def refit_cuda_engine(self) -> bool:
            self._plan["weights"] = True
            return True

    class OnnxParserRefitter:
        def __init__(self, refitter: Refitter, logger: ILogger) -> None:
            self._plan = refitter._plan

        def refit_from_file(self, model: str) -> bool:
            return bool(model == self._plan["graph"])

    module = types.ModuleType("tensorrt")
    for part in (
        ILogger,
        ExecutionContextAllocationStrategy,
        Runtime,
        ICudaEngine,
        IExecutionContext,
        Refitter,
        OnnxParserRefitter,
    ):
        setattr(module, part.__name__, part)
    module.__dict__["__version__"] = version
    return module


def _array(gpu: FakeGpu, address: int, dtype: Any, shape: Sequence[int]) -> Any:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return gpu.bytes_at(address, size).view(dtype).reshape(shape)


def _session(graph: Path) -> Any:
    if graph not in _sessions:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        _sessions[graph] = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"]
        )
    return _sessions[graph]
