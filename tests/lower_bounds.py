"""The oldest versions that a device install accepts, by pyproject.toml alone, and what runs there.

python -m tests.lower_bounds PYTHON    an environment of them, for this interpreter
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


class InstallError(Exception):
    """Pip reaches no index, or an index has no such version."""


def pins(python: str, extras: tuple[str, ...] = ("cpu", "heif")) -> list[str]:
    """Every requirement of a device install at its lower bound: "numpy==1.26".

    Args:
        python: the version that the markers are for: "3.10".
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    lines += [line for extra in extras for line in project["optional-dependencies"][extra]]
    found = []
    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        [lowest] = [part.version for part in requirement.specifier if part.operator in (">=", "==")]
        found.append(f"{requirement.name}=={lowest}")
    return found


def version_of(python: str) -> str:
    """ "3.10" of an interpreter."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def environment(python: str, *more: str) -> Path:
    """The folder of programs of an environment below `build`, made once for these versions.

    Args:
        more: what else is to be installed.

    Raises:
        InstallError: it can't be installed.
    """
    version = version_of(python)
    folder = ROOT / "build" / "lower-bounds" / version
    folder.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests run in several processes
        return _installed(python, folder, [*pins(version), *more])


def _installed(python: str, folder: Path, wanted: list[str]) -> Path:
    ready, programs = folder / "installed.txt", folder / "bin"
    if ready.is_file() and ready.read_text(encoding="utf-8") == "\n".join(wanted):
        return programs
    subprocess.run([python, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python")]
    done = subprocess.run(
        [*pip, "install", "--quiet", "--disable-pip-version-check", *wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InstallError("; ".join(done.stderr.strip().splitlines()[-1:]))
    ready.write_text("\n".join(wanted), encoding="utf-8")
    return programs


if __name__ == "__main__":
    print(environment(sys.argv[1]))
