"""As much of ONNX Runtime's C API as compiling ahead of time takes, through ctypes.

The device to compile for is described in the options of ONNX Runtime's environment, and Python's
`onnxruntime` makes that environment itself, without options, when it is imported. The functions
stand in tables that only ever grow at their end (`onnxruntime_c_api.h`: "no functions can be
reordered or removed"), so that an index is good for every later version.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from ctypes import POINTER, byref, c_bool, c_char_p, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

OLDEST = 24  # the first minor version that has all of these functions
WARNING, ERROR = 2, 3  # of OrtLoggingLevel

Log = Callable[[int, str], None]  # a message's level, and its text


class OrtError(Exception):
    """What ONNX Runtime says it could not do."""


class _Function(NamedTuple):
    """Where a function stands in its table, what it returns, what it takes."""

    slot: int
    result: Any
    arguments: tuple[Any, ...]


_STRINGS = POINTER(c_char_p)
_POINTERS = POINTER(c_void_p)
_STATUS = c_void_p  # OrtStatus*: null is success


class _Base(ctypes.Structure):
    """OrtApiBase."""

    _fields_ = (
        ("GetApi", ctypes.CFUNCTYPE(c_void_p, c_uint32)),
        ("GetVersionString", ctypes.CFUNCTYPE(c_char_p)),
    )


_LogFunction = ctypes.CFUNCTYPE(None, c_void_p, c_int32, c_char_p, c_char_p, c_char_p, c_char_p)


class _EnvironmentOptions(ctypes.Structure):
    """OrtEnvCreationOptions."""

    _fields_ = (
        ("version", c_uint32),
        ("logging_severity_level", c_int32),
        ("log_id", c_char_p),
        ("custom_logging_function", _LogFunction),
        ("custom_logging_param", c_void_p),
        ("threading_options", c_void_p),
        ("config_entries", c_void_p),
    )


_API = {  # OrtApi
    "GetErrorMessage": _Function(2, c_char_p, (_STATUS,)),
    "CreateSessionOptions": _Function(10, _STATUS, (_POINTERS,)),
    "GetCompileApi": _Function(294, c_void_p, ()),
    "CreateKeyValuePairs": _Function(295, None, (_POINTERS,)),
    "AddKeyValuePair": _Function(296, None, (c_void_p, c_char_p, c_char_p)),
    "RegisterExecutionProviderLibrary": _Function(301, _STATUS, (c_void_p, c_char_p, c_char_p)),
    "GetEpDevices": _Function(
        303, _STATUS, (c_void_p, POINTER(POINTER(c_void_p)), POINTER(c_size_t))
    ),
    "SessionOptionsAppendExecutionProvider_V2": _Function(
        304,
        _STATUS,
        (c_void_p, c_void_p, _POINTERS, c_size_t, _STRINGS, _STRINGS, c_size_t),
    ),
    "EpDevice_EpName": _Function(312, c_char_p, (c_void_p,)),
    "CreateEnvWithOptions": _Function(
        406, _STATUS, (POINTER(_EnvironmentOptions), POINTER(c_void_p))
    ),
}
_COMPILE_API = {  # OrtCompileApi
    "CreateModelCompilationOptionsFromSessionOptions": _Function(
        1, _STATUS, (c_void_p, c_void_p, _POINTERS)
    ),
    "ModelCompilationOptions_SetInputModelPath": _Function(2, _STATUS, (c_void_p, c_char_p)),
    "ModelCompilationOptions_SetOutputModelPath": _Function(4, _STATUS, (c_void_p, c_char_p)),
    "ModelCompilationOptions_SetEpContextEmbedMode": _Function(7, _STATUS, (c_void_p, c_bool)),
    "CompileModel": _Function(8, _STATUS, (c_void_p, c_void_p)),
}


class Environment:
    """ONNX Runtime's environment, which lives as long as the process.

    Args:
        library: `libonnxruntime.so`.
        options: of the environment.
        log: called with every message from WARNING on.

    Raises:
        OrtError: a version of ONNX Runtime without these functions, or what it says itself.
    """

    def __init__(self, library: Path, options: Mapping[str, str], log: Log) -> None:
        get_base = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL).OrtGetApiBase
        get_base.restype = POINTER(_Base)
        base = get_base().contents
        found = base.GetVersionString().decode()
        version = int(found.split(".")[1])
        if version < OLDEST:
            raise OrtError(f"ONNX Runtime {found} is older than 1.{OLDEST}")
        self._api = _Table(base.GetApi(version), _API)
        self._compile_api = _Table(self._api.call("GetCompileApi"), _COMPILE_API)

        entries = c_void_p()
        self._api.call("CreateKeyValuePairs", byref(entries))
        for key, value in options.items():
            self._api.call("AddKeyValuePair", entries, key.encode(), value.encode())
        self._log = _LogFunction(functools.partial(_logged, log))  # kept: C holds it too
        how = _EnvironmentOptions(version, WARNING, b"himix-edge", self._log, None, None, entries)
        self._environment = c_void_p()
        self._check(self._api, "CreateEnvWithOptions", byref(how), byref(self._environment))

    def register(self, name: str, library: Path) -> None:
        """Loads an execution provider's library.

        Raises:
            OrtError: what ONNX Runtime says.
        """
        self._check(
            self._api,
            "RegisterExecutionProviderLibrary",
            self._environment,
            name.encode(),
            str(library).encode(),
        )

    def devices(self, provider: str) -> list[int]:
        """What an execution provider offers to run on: an opaque handle each.

        Raises:
            OrtError: what ONNX Runtime says.
        """
        devices, count = POINTER(c_void_p)(), c_size_t()
        self._check(self._api, "GetEpDevices", self._environment, byref(devices), byref(count))
        handles = [devices[i] for i in range(count.value)]
        return [
            handle
            for handle in handles
            if handle and self._api.call("EpDevice_EpName", handle) == provider.encode()
        ]

    def compile(self, graph: Path, target: Path, device: int, options: Mapping[str, str]) -> None:
        """Compiles what the device can take of a graph; the rest stays as nodes in `target`.

        Args:
            graph: an ONNX file.
            target: the ONNX file to write; each compiled part is a file beside it.
            device: one of `devices`.
            options: the execution provider's.

        Raises:
            OrtError: what ONNX Runtime or the provider says.
        """
        session, job = c_void_p(), c_void_p()
        self._check(self._api, "CreateSessionOptions", byref(session))
        self._check(
            self._api,
            "SessionOptionsAppendExecutionProvider_V2",
            session,
            self._environment,
            (c_void_p * 1)(device),
            1,
            _strings(options.keys()),
            _strings(options.values()),
            len(options),
        )
        for name, *arguments in (
            ("CreateModelCompilationOptionsFromSessionOptions", session, byref(job)),
            ("ModelCompilationOptions_SetInputModelPath", str(graph).encode()),
            ("ModelCompilationOptions_SetOutputModelPath", str(target).encode()),
            ("ModelCompilationOptions_SetEpContextEmbedMode", False),
        ):
            first = job if name.startswith("ModelCompilation") else self._environment
            self._check(self._compile_api, name, first, *arguments)
        self._check(self._compile_api, "CompileModel", self._environment, job)

    def _check(self, table: _Table, name: str, *arguments: Any) -> None:
        if status := table.call(name, *arguments):
            raise OrtError(self._api.call("GetErrorMessage", status).decode(errors="replace"))


class _Table:
    """A struct of function pointers."""

    def __init__(self, address: int, functions: Mapping[str, _Function]) -> None:
        self._slots = ctypes.cast(address, _POINTERS)
        self._functions = functions

    def call(self, name: str, *arguments: Any) -> Any:
        function = self._functions[name]
        prototype = ctypes.CFUNCTYPE(function.result, *function.arguments)
        return prototype(self._slots[function.slot] or 0)(*arguments)


def _strings(values: Any) -> Any:
    encoded = [value.encode() for value in values]
    return (c_char_p * len(encoded))(*encoded)


def _logged(
    log: Log, _param: int, level: int, _category: bytes, _id: bytes, _where: bytes, text: bytes
) -> None:
    log(level, text.decode(errors="replace"))
