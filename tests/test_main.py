"""The `himix-edge` command where only a device's packages are installed."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest
from PIL import Image

from himix_edge.runtimes import load

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
    venv.create(tmp_path / "device", with_pip=True)
    device = tmp_path / "device" / "bin"
    pip = [str(device / "python"), "-m", "pip", "install", "-q"]
    install = subprocess.run(
        [*pip, "-c", str(ROOT / "constraints.txt"), f"{ROOT}[cpu]"],
        capture_output=True,
        text=True,
        check=False,
    )
    if install.returncode:
        pytest.skip(f"pip could not install: {install.stderr.strip().splitlines()[-1:]}")

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert run(device / "python", "-c", "import himix_edge.runtimes").returncode == 0
    for missing in ("torch", "transformers", "onnx", "typer"):
        assert "ModuleNotFoundError" in run(device / "python", "-c", f"import {missing}").stderr
    done = run(device / "himix-edge", *run_arguments(tiny_bundle, picture))
    assert (done.returncode, done.stdout) == (0, expected_answer(tiny_bundle, picture))
