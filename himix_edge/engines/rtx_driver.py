"""Stand-ins for NVIDIA's driver, which the libraries of TensorRT for RTX are linked against.

Compiling ahead of time asks nothing of a GPU, but without `libcuda.so.1` and `libnvidia-ml.so.1`
the libraries don't load. Those made here have every function that they import, and each answers
that there is no device. They are used on machines with a GPU too: what is built then doesn't depend
on which, and a provider that finds one offers it in place of the device to compile for.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from himix_edge.claims import scratch_folder
from himix_edge.errors import DependencyError

TOOLS = {"cc": "a C compiler", "nm": "binutils"}
_UNDEFINED = re.compile(r"^ +[Uw] (\w+)", re.MULTILINE)  # in what `nm` prints
_STUBS = {  # soname: what its functions are called, and their "no device"
    "libcuda.so.1": (re.compile(r"cu[A-Z]\w*"), 100),  # CUDA_ERROR_NO_DEVICE
    "libnvidia-ml.so.1": (re.compile(r"nvml\w+"), 9),  # NVML_ERROR_DRIVER_NOT_LOADED
}
_IN_WORDS = {  # the few that don't return a code, or must fill in a string
    "cuGetErrorName": 'int {}(int e, const char **s) {{ *s = "NO_DRIVER"; return 0; }}',
    "cuGetErrorString": 'int {}(int e, const char **s) {{ *s = "no driver"; return 0; }}',
    "nvmlErrorString": 'const char *{}(int e) {{ return "no driver"; }}',
}


def driver_stubs(libraries: Iterable[Path]) -> Path:
    """A folder with a driver for these libraries to load; it lasts as long as this process.

    Raises:
        DependencyError: no C compiler, or no `nm`.
    """
    return _stubs(tuple(libraries))


def symbols(library: Path, *options: str) -> str:
    """What `nm` prints of a library.

    Raises:
        DependencyError: no `nm`, or a library that it can't read.
    """
    return _output(_tool("nm"), *options, str(library))


@functools.cache
def _stubs(libraries: tuple[Path, ...]) -> Path:
    compiler = _tool("cc")
    wanted = {
        name
        for library in libraries
        for name in _UNDEFINED.findall(symbols(library, "-D", "--undefined-only"))
    }
    stack = contextlib.ExitStack()
    folder = stack.enter_context(scratch_folder())
    atexit.register(stack.close)
    for soname, (pattern, code) in _STUBS.items():
        names = sorted(name for name in wanted if pattern.fullmatch(name))
        source = folder / f"{soname}.c"
        source.write_text("\n".join(_definition(name, code) for name in names) + "\n")
        library = source.with_suffix("")
        soname_option = f"-Wl,-soname,{soname}"
        _output(compiler, "-shared", "-fPIC", soname_option, "-o", str(library), str(source))
    return folder


def _definition(name: str, code: int) -> str:
    return _IN_WORDS.get(name, f"int {{}}(void) {{{{ return {code}; }}}}").format(name)


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise DependencyError(
            "cannot stand in for NVIDIA's driver",
            expected=f"`{name}` ({TOOLS[name]})",
            found="none in PATH",
            fix="apt install build-essential",
        )
    return path


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DependencyError(
            "cannot stand in for NVIDIA's driver",
            expected=f"`{Path(command[0]).name}` to succeed",
            found=done.stderr.strip() or f"exit status {done.returncode}",
            fix="apt install build-essential",
        )
    return done.stdout
