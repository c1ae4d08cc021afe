"""Types of TensorRT's real Python API, made on a machine with neither TensorRT nor a GPU.

TensorRT's libraries are large and need a GPU to be of use, but its Python bindings are a small
wheel of their own and hold every class, method, signature and enum value. They load against
libraries that are empty but for the symbols they look for; pybind11-stubgen then writes their
types, and mypy checks code that uses TensorRT against the versions that devices really have.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from himix_edge.files import whole_folder

# JetPack 6.2, JetPack 7.2, and the present one, which did away with implicit types.
VERSIONS = ("10.3.0", "10.16.1.11", "11.4.0.106")

CACHE = Path(__file__).parents[2] / "build" / "tensorrt-stubs"
_INFER = """
createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL
getBuilderPluginRegistry getBuilderSafePluginRegistry getPluginRegistry initLibNvInferPlugins
getInferLibVersion getLogger
""".split()  # noqa: SIM905 - a column of strings reads worse
_PARSER = [
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getNvOnnxParserVersion",
]
_LIBRARIES = {"nvinfer": _INFER, "nvinfer_plugin": _INFER, "nvonnxparser": _PARSER}


class NoStubsError(Exception):
    """What this machine lacks to make them."""


def stubs(version: str) -> Path:
    """A folder for MYPYPATH with the types of that version; made once, then kept.

    Raises:
        NoStubsError: the bindings can't be had, or there is no C compiler.
    """
    folder = CACHE / version
    with alone():
        if not folder.exists():
            with whole_folder(folder) as made, tempfile.TemporaryDirectory() as work:
                _make(version, Path(work), made / "tensorrt")
    return folder


def unpacked(package: str) -> Path:
    """A folder for PYTHONPATH with a wheel in it, and nothing that it depends on; kept as well.

    Raises:
        NoStubsError: it can't be had.
    """
    folder = CACHE / package
    with alone():
        if not folder.exists():
            with whole_folder(folder) as made:
                _install(package, made)
    return folder


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keeps other test processes off what is kept in `CACHE`."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(version: str, work: Path, target: Path) -> None:
    major = int(version.split(".")[0])
    package = f"tensorrt_cu{13 if major >= 11 else 12}_bindings=={version}"
    _install(package, work)
    for name, symbols in _LIBRARIES.items():
        source, library = work / f"{name}.c", f"lib{name}.so.{major}"
        source.write_text("".join(f"void*{symbol}(){{return 0;}}\n" for symbol in symbols))
        link = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}"]
        _run([*link, "-o", str(work / library), str(source)])
    module = "tensorrt_bindings.tensorrt"
    environment = {**os.environ, "PYTHONPATH": str(work), "LD_LIBRARY_PATH": str(work)}
    made = work / "stubs"
    stubgen = [sys.executable, "-m", "pybind11_stubgen", module, "-o", str(made)]
    _run([*stubgen, "--ignore-all-errors"], environment)
    parts = made.joinpath(*module.split("."))
    target.mkdir()
    if parts.is_dir():
        text = (parts / "__init__.pyi").read_text()
        for other in parts.glob("[!_]*.pyi"):
            shutil.copy(other, target)
    else:
        text = parts.with_suffix(".pyi").read_text()
    (target / "__init__.pyi").write_text(_mended(text.replace(module, "tensorrt")))


def _install(package: str, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--retries=1", "--timeout=10"]  # without a network, skip the tests soon
    _run([*pip, "--no-deps", "--only-binary=:all:", "--target", str(folder), package])


def _mended(text: str) -> str:
    """What pybind11-stubgen can't know: it writes the signatures that the bindings print."""
    text = re.sub(r"\bin: ", "in_: ", text)  # a keyword as a parameter's name
    # A parameter without a default after those that have one.
    text = re.sub(r"(channel_axis: [\w.]+)\) -> IScaleLayer", r"\1 = ...) -> IScaleLayer", text)
    # TensorRT's own `bool`, a DataType, would be taken for the type.
    text = re.sub(r"(-> |: |\[|, |\| )bool\b(?! *=)", r"\1builtins.bool", text)
    text = re.sub(r"^from __future__ .*$", r"\g<0>\nimport builtins", text, count=1, flags=re.M)
    return f"{text}\n__version__: str\n"


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    except FileNotFoundError as error:
        raise NoStubsError(f"no {command[0]}") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise NoStubsError(f"{' '.join(command[:4])} ...: {last}") from error
