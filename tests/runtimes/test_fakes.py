"""The doubles of CUDA and TensorRT know no more than the real ones."""

from __future__ import annotations

import ast
import enum
import inspect
import re
from typing import Any

import pytest

from tests.engines.stubs import VERSIONS, NoStubsError, stubs
from tests.runtimes.fake_cuda import FakeGpu, runtime_of
from tests.runtimes.fake_tensorrt import tensorrt_of


def public(thing: object) -> dict[str, Any]:
    return {name: value for name, value in vars(thing).items() if not name.startswith("_")}


def test_cuda() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    functions = 0
    for name, fake in public(runtime_of(FakeGpu())).items():
        if isinstance(fake, int):
            assert fake == int(getattr(real, name))
        elif isinstance(fake, type) and issubclass(fake, enum.IntEnum):
            for member in fake:
                assert int(member) == int(getattr(getattr(real, name), member.name))
        elif name != "gpu":
            signature = re.match(r"\w+\((.*)\)", str(getattr(real, name).__doc__))
            assert signature is not None
            expected = [re.split(r"[: ]", part.strip()) for part in signature[1].split(",")]
            found = list(inspect.signature(fake).parameters)
            assert len(found) == len([words for words in expected if words != [""]]), name
            for parameter, words in zip(found, expected, strict=False):
                assert parameter in words, (name, parameter)
            functions += 1
    assert functions > 20


@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrt(version: str) -> None:
    try:
        source = (stubs(version) / "tensorrt" / "__init__.pyi").read_text(encoding="utf-8")
    except NoStubsError as error:
        pytest.skip(f"TensorRT's bindings can't be had: {error}")
    real = classes(ast.parse(source))
    methods = 0
    for name, fake in public(tensorrt_of(FakeGpu())).items():
        for attribute, value in public(fake).items():
            if issubclass(fake, enum.Enum) or isinstance(value, type):
                assert attribute in real[name].names
                continue
            parameters = list(inspect.signature(value).parameters)
            assert parameters in real[name].methods.get(attribute, []), (name, attribute)
            methods += 1
    assert methods > 8


class RealClass:
    """What a class in the stubs has."""

    def __init__(self, node: ast.ClassDef) -> None:
        self.names: set[str] = set()
        self.methods: dict[str, list[list[str]]] = {}
        for part in node.body:
            if isinstance(part, ast.ClassDef):
                self.names.add(part.name)
            elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                self.names.add(part.target.id)
            elif isinstance(part, ast.FunctionDef):
                parameters = [argument.arg for argument in part.args.args]
                self.methods.setdefault(part.name, []).append(parameters)


def classes(module: ast.Module) -> dict[str, RealClass]:
    return {node.name: RealClass(node) for node in module.body if isinstance(node, ast.ClassDef)}


def test_work_is_done_when_waited_for_and_in_the_order_of_events() -> None:
    gpu = FakeGpu()
    cuda = runtime_of(gpu)
    _, first = cuda.cudaStreamCreateWithFlags(1)
    _, second = cuda.cudaStreamCreateWithFlags(1)
    _, event = cuda.cudaEventCreateWithFlags(2)
    done: list[str] = []
    gpu.streams[int(first)].put(lambda: done.append("a"))
    cuda.cudaEventRecord(event, first)
    gpu.streams[int(first)].put(lambda: done.append("b"))
    cuda.cudaStreamWaitEvent(second, event, 0)
    gpu.streams[int(second)].put(lambda: done.append("c"))
    assert done == []
    cuda.cudaStreamSynchronize(second)
    assert done == ["a", "c"]  # and not what was put on the first stream after the event
    cuda.cudaDeviceSynchronize()
    assert done == ["a", "c", "b"]
