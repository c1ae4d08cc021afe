"""The `himix-edge` command where only a device's packages are installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from himix_edge.runtimes import load

OLDEST = ("numpy==1.26.4", "pillow==10.3.0", "tokenizers==0.20.0", "onnxruntime==1.18.0")
ROOT = Path(__file__).parents[1]
WITHOUT_TYPER = """
import sys
sys.modules["typer"] = None
from himix_edge.__main__ import main
main()
"""


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30), (200, 30, 60)).save(path)
    return path


def run_arguments(bundle: Path, picture: Path) -> list[str]:
    return ["run", str(picture), "describe", "--bundle", str(bundle), "--max-tokens", "5"]


def expected_answer(bundle: Path, picture: Path) -> str:
    model = load(bundle)
    return model.generate(model.encode(picture), "describe", max_tokens=5).read() + "\n"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_run_works_without_typer(tiny_bundle: Path, picture: Path) -> None:
    done = python(WITHOUT_TYPER, *run_arguments(tiny_bundle, picture))
    assert (done.returncode, done.stdout) == (0, expected_answer(tiny_bundle, picture))
    assert done.stderr == "Model: tiny. It knows nothing.\n"


def test_other_commands_say_what_they_need() -> None:
    done = python(WITHOUT_TYPER, "export")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert "pip install 'himix-edge[cli]'" in done.stderr


@pytest.mark.slow
def test_a_device_install_answers_and_has_no_torch(
    tiny_bundle: Path, picture: Path, tmp_path: Path
) -> None:
    device = device_install(tmp_path, sys.executable, "-c", str(ROOT / "constraints.txt"))
    assert run(device / "python", "-c", "import himix_edge.runtimes").returncode == 0
    for missing in ("torch", "transformers", "onnx", "typer"):
        assert "ModuleNotFoundError" in run(device / "python", "-c", f"import {missing}").stderr
    done = run(device / "himix-edge", *run_arguments(tiny_bundle, picture))
    assert (done.returncode, done.stdout) == (0, expected_answer(tiny_bundle, picture))


@pytest.mark.slow
def test_the_oldest_versions_answer_alike(
    tiny_bundle: Path, half_bundle: Path, picture: Path, tmp_path: Path
) -> None:
    """What JetPack 6.2 has room for; with Python 3.10 too, where there is one."""
    device = device_install(tmp_path, jetpack_python(), *OLDEST)
    for bundle in (tiny_bundle, half_bundle):  # portable, in float32 and float16
        done = run(device / "himix-edge", *run_arguments(bundle, picture))
        assert (done.returncode, done.stdout) == (0, expected_answer(bundle, picture)), done.stderr
    numpy = run(device / "python", "-c", "import numpy; print(numpy.__version__)")
    assert numpy.stdout.strip() == "1.26.4"


def device_install(folder: Path, python: str, *requirements: str) -> Path:
    """The folder of programs of a fresh environment with what a device installs."""
    subprocess.run([python, "-m", "venv", "--without-pip", folder / "device"], check=True)
    programs = folder / "device" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python")]
    install = run(*pip, "install", "-q", "--no-compile", *requirements, f"{ROOT}[cpu]")
    if install.returncode:
        pytest.skip(f"pip could not install: {install.stderr.strip().splitlines()[-1:]}")
    return programs


def jetpack_python() -> str:
    """Python 3.10, or else the one that runs the tests."""
    found = shutil.which("python3.10")
    return found if found and run(found, "--version").returncode == 0 else sys.executable


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
