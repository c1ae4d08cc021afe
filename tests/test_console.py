"""Any text can be said on any stream, and every end of a command is one line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from himix_edge.console import print_json, run_command
from himix_edge.errors import BundleError

PROGRAM = """
import os, sys
from pathlib import Path
from himix_edge.console import print_json, run_command
from himix_edge.errors import BundleError

def command():
    {body}
    return 0

sys.exit(run_command(command))
"""
ODD = (
    "\u2500 caf\u00e9 \u4f60 \U0001f600 " + "\udcff"
)  # a box, Latin-1, Chinese, emoji, a lone surrogate


def run(
    body: str, redirection: str = "", encoding: str = "utf-8", **more: str
) -> subprocess.CompletedProcess[bytes]:
    """A command line of these statements, started by a shell."""
    program = PROGRAM.format(body=body.replace("\n", "\n    "))
    return subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, program],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding, **more},
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "latin-1", "utf-16-le"])
def test_what_an_encoding_lacks_is_replaced(encoding: str) -> None:
    done = run(f"print({ODD!a})\nprint({ODD!a}, file=sys.stderr)", encoding=encoding)
    assert done.returncode == 0
    assert done.stdout == (ODD + "\n").encode(encoding, errors="replace")
    assert done.stderr == (ODD + "\n").encode(encoding, errors="backslashreplace")


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1"])
def test_every_locale_can_be_printed_in(locale: str) -> None:
    done = run(f"print({ODD!a})", encoding="", LC_ALL=locale, PYTHONCOERCECLOCALE="0")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_json_is_ascii(encoding: str) -> None:
    done = run(f"print_json({{'text': {ODD!a}}})", encoding=encoding)
    assert done.returncode == 0
    assert json.loads(done.stdout.decode("ascii")) == {"text": ODD}


def test_print_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1, None]})
    assert capsys.readouterr().out == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_an_error_about_an_odd_path_is_one_line(encoding: str) -> None:
    done = run(f"raise BundleError('no bundle in ' + {ODD!a})", encoding=encoding)
    assert (done.returncode, done.stdout) == (1, b"")
    expected = f"Error: no bundle in {ODD}\n"
    assert done.stderr == expected.encode(encoding, errors="backslashreplace")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("open('/nowhere/a')", "Error: No such file or directory: /nowhere/a. Fix: check the path"),
        ("'\\udcff'.encode()", "a name that is no text: '\\udcff'. "),
        ("b'\\xff'.decode()", "UnicodeDecodeError: "),
        ("raise OSError", "Error: OSError. Fix: run it again with --debug"),
        ("raise OSError(28, 'no space')", "Error: no space. Fix: free some space on the disk"),
        (
            "raise OSError(24, 'too many', 'a')",
            "Error: too many: a. Fix: close other programs, or ",
        ),
        ("raise MemoryError", "Error: not enough memory. Fix: close other programs, use --threads"),
        ("raise RuntimeError('std::bad_alloc')", "Error: not enough memory. Fix: close other"),
        ('raise RuntimeError("can\'t allocate memory")', "Error: not enough memory. Fix: close"),
        (
            "raise BundleError('b', fix='no') from MemoryError()",
            "Error: b: found not enough memory",
        ),
        (
            "raise BundleError('b', fix='no') from OSError(24, 'many')",
            "found many. Fix: close other",
        ),
        ("raise RecursionError", "Error: a file is nested too deeply. Fix: "),
        (
            "1 / 0",
            "Error: ZeroDivisionError: division by zero. Fix: run it again with ",
        ),
        ("raise KeyError('\\x1b[31m')", "Error: KeyError: '\\x1b[31m'. "),
        ("raise type('PanicException', (BaseException,), {})('p')", "Error: PanicException: p. "),
        ("raise BundleError('two\\nlines')", "Error: two lines"),
    ],
)
def test_what_a_library_raises_is_one_line(body: str, said: str) -> None:
    done = run(body)
    assert done.returncode == 1
    assert said in done.stderr.decode()
    assert done.stderr.startswith(b"Error: ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("body", ["print('a')", "print('a', flush=True)", "print('a' * 99999)"])
@pytest.mark.parametrize("end", ["pass", "sys.exit(0)", "sys.exit(3)"])
def test_a_full_disk_is_one_line(body: str, end: str) -> None:
    done = run(f"{body}\n{end}", "> /dev/full")
    assert done.returncode == 1
    assert done.stderr == (
        b"Error: No space left on device. "
        b"Fix: free some space on the disk, or choose another place\n"
    )


def test_a_closed_stdout_is_one_line() -> None:
    done = run("Path('/nowhere').write_text('begun')", ">&-")
    assert done.returncode == 1
    assert done.stderr == (b"Error: stdout is closed. Fix: send it to a file, or to /dev/null\n")


def test_what_is_said_to_a_closed_stderr_is_not_said_to_stdout() -> None:
    done = run("print('notice', file=sys.stderr)\nprint('answer')", "2>&-")
    assert (done.returncode, done.stdout) == (0, b"answer\n")


@pytest.mark.parametrize("end", ["print('b' * 10**6)", "print('b', flush=True)", "sys.exit(0)"])
def test_a_reader_that_has_gone_is_no_error(end: str) -> None:
    done = run(f"print('a' * 10**6)\n{end}", "| true")
    assert done.stderr == b""


def test_what_a_command_returns_or_raises(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> int:
        raise error

    assert run_command(lambda: 7) == 7
    assert run_command(lambda: raising(KeyboardInterrupt())) == 130
    assert run_command(lambda: raising(BrokenPipeError())) == 1
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit):
        run_command(lambda: raising(SystemExit(2)))
    with pytest.raises(BundleError):
        run_command(lambda: raising(BundleError("mine")), debug=True)
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: raising(ZeroDivisionError()), debug=True)


def test_a_stream_that_is_no_file_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)

    def command() -> int:
        print(ODD)
        return 3

    assert run_command(command) == 3
    assert stream.getvalue() == ODD + "\n"
