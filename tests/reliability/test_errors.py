"""Whatever fails, the command line says it in one line, with the remedy that helps."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from himix_edge import files
from himix_edge.console import one_line
from himix_edge.errors import BundleError
from himix_edge.remedies import MEMORY, output_error
from tests.reliability.table import tried


def said(line: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A shell's line, in which $himix is the command."""
    return subprocess.run(
        ["sh", "-c", f'himix="{sys.executable} -m himix_edge"; {line}'],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1]), **more},
    )


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1, done
    assert done.stderr.startswith("Error: "), done
    assert done.stderr.count("\n") == 1, done
    for word in words:
        assert word in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@tried("Errors", "stdout on a full disk", "one line: free some space")
def test_a_full_stdout() -> None:
    refused(said("$himix models > /dev/full"), "No space left on device", "free some space")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@tried("Errors", "stderr on a full disk", "the exit code alone says it")
def test_a_full_stderr(tmp_path: Path) -> None:
    done = said(f"$himix info {tmp_path} 2> /dev/full")
    assert (done.returncode, done.stdout) == (1, "")


@tried("Errors", "a closed stdout", "one line: send it to a file")
def test_a_closed_stdout() -> None:
    refused(said("$himix models >&-"), "stdout is closed", "send it to a file")


@tried("Errors", "a limit on the size of files", "one line: raise the limit")
def test_a_limit_on_files(tmp_path: Path) -> None:
    place = tmp_path / "a.png"
    refused(
        said(f"ulimit -f 1; $himix scene -o {place} --size 2048"), "File too large", "ulimit -f"
    )
    assert list(tmp_path.iterdir()) == []


@tried("Errors", "too few open files allowed", "one line: ulimit -n")
def test_too_few_open_files() -> None:
    program = (
        "import os, sys; from himix_edge.console import run_command\n"
        "sys.exit(run_command(lambda: [os.open('/dev/null', 0) for _ in range(99)][0]))"
    )
    done = subprocess.run(
        ["sh", "-c", f'ulimit -n 40; exec {sys.executable} -c "{program}"'],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])},
    )
    refused(done, "Too many open files: /dev/null", "ulimit -n")


@tried("Errors", "each error of the system against an output", "the remedy is that error's own")
@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space on the disk"),
        (errno.EDQUOT, "free some space of your quota"),
        (errno.EROFS, "choose a place that is not read-only"),
        (errno.EACCES, "choose a place that you may write to, or change its permissions"),
        (errno.ENOMEM, MEMORY),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "check the disk"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.EBUSY, "wait until nothing else uses it"),
    ],
)
def test_remedies(number: int, remedy: str) -> None:
    error = output_error("cannot write b", OSError(number, os.strerror(number)))
    assert str(error).startswith("cannot write b: ")
    assert os.strerror(number) in str(error)
    assert remedy in str(error).split("Fix: ")[1]


@tried("Errors", "too little memory, as Python, torch and ONNX Runtime say it", "one line says so")
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)"
        ),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"),
        RuntimeError("Failed to allocate memory for requested buffer of size 99"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_too_little_memory(error: Exception) -> None:
    assert one_line(error).endswith(f"Fix: {MEMORY}")
    wrapped = BundleError("cannot open b", found="x", fix="export it again")
    wrapped.__cause__ = error
    assert one_line(wrapped).startswith("cannot open b: ")
    assert one_line(wrapped).endswith(f"Fix: {MEMORY}")


@tried("Errors", "an error that nobody foresaw", "one line, and how to report it")
def test_the_unforeseen() -> None:
    assert one_line(KeyError("a\nb")) == (
        "KeyError: 'a\\nb'. Fix: run it again with --debug, and report what it prints"
    )


@tried("Errors", "NaN, huge integers and deep nesting in a checkpoint's config.json", "one line")
@pytest.mark.parametrize(
    "text",
    [
        '{"config": {"vision": NaN}}',
        '{"config": {"vision": {"image_size": Infinity}}}',
        '{"name": ' + "9" * 5000 + "}",
        '{"name": 1e999}',
        '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"name": "\\ud800"}',
        "{",
        "\0",
    ],
    ids=["NaN", "Infinity", "digits", "1e999", "deep", "surrogate", "cut", "NUL"],
)
@pytest.mark.slow
def test_hostile_configs(tmp_path: Path, text: str) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text(text)
    refused(said(f"$himix export --checkpoint {tmp_path / 'c'} -o {tmp_path / 'x'}"))
    assert not (tmp_path / "x").exists()
