"""The `himix-edge` command as a process, and installed from a wheel on a device."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from signal import SIGINT

import pytest
from PIL import Image

import himix_edge
from himix_edge import __version__
from himix_edge.runtimes import load
from tests.lower_bounds import pins, version_of

ROOT = Path(__file__).parents[1]
PACKAGE = Path(himix_edge.__file__).parent
COMMANDS = (
    *("run", "export", "quantize", "info", "build", "plan", "doctor", "convert", "train", "eval"),
    *("scene", "flops", "models", "bench", "sign", "verify", "trust"),
)
NEED_MORE = {  # than a device has
    "export": ["export"],
    "quantize": ["quantize", "BUNDLE", "-o", "x", "--decoder", "int8"],
    "convert": ["convert", "x", "--calibration", "x", "-o", "x"],
    "train": ["train"],
    "eval of a checkpoint": ["eval", str(PACKAGE / "assets" / "shapes-demo")],
    "flops of a folder": ["flops", "--encoder", "/"],
    "plan of a folder": ["plan", "--device", "cpu", "--encoder", "/"],
}
# Whatever imports one of these finds that it isn't installed.
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))
from himix_edge.__main__ import main
main()
"""
NOT_ON_A_DEVICE = "torch,transformers,onnx,onnxscript,onnx_ir,safetensors,ml_dtypes,matplotlib"
CONSUMER = """
import himix_edge
from himix_edge import Answer, Conversation, EncodedImage, HimixError, Model, SamplingOptions

def describe(bundle: str, picture: str) -> str:
    model: Model = himix_edge.load(bundle)
    image: EncodedImage = model.encode(picture)
    try:
        answer: Answer = model.generate(image, "describe", SamplingOptions(max_tokens=9))
    except HimixError as error:
        raise SystemExit(str(error)) from error
    reveal_type(answer.read())
    return answer.read()

load_it: int = himix_edge.load
conversation: Conversation | None = None
"""


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30), (200, 30, 60)).save(path)
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make wheel` builds it."""
    if not shutil.which("make"):
        pytest.skip("there is no make")
    clone = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(PACKAGE, clone / "himix_edge", ignore=shutil.ignore_patterns("__pycache__"))
    made = run("make", "-C", clone, "wheel", f"PYTHON={sys.executable}")
    if made.returncode and "No matching distribution" in made.stderr:
        pytest.skip(f"hatchling can't be had: {made.stderr.strip().splitlines()[-1:]}")
    assert made.returncode == 0, made.stderr
    [path] = (clone / "dist").glob("*.whl")
    assert path.name == f"himix_edge-{__version__}-py3-none-any.whl"
    assert made.stdout.splitlines()[-1].endswith(path.name) or path.name in made.stdout
    return path


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a fresh environment with what a device installs."""
    constraints = ("-c", str(ROOT / "constraints.txt"))
    return device_install(wheel, tmp_path_factory.mktemp("device"), sys.executable, *constraints)


def run_arguments(bundle: Path, picture: Path) -> list[str]:
    return ["run", str(picture), "describe", "--bundle", str(bundle), "--max-tokens", "5"]


def expected_answer(bundle: Path, picture: Path) -> str:
    model = load(bundle)
    return model.generate(model.encode(picture), "describe", max_tokens=5).read() + "\n"


def without(packages: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", WITHOUT, packages, *arguments, cwd=ROOT)


def run(
    *command: str | Path, cwd: str | Path = "/", **options: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env=options or None
    )


# Without what a device lacks.


def test_a_device_runs_its_commands(tiny_bundle: Path, picture: Path, tmp_path: Path) -> None:
    done = without(NOT_ON_A_DEVICE, *run_arguments(tiny_bundle, picture))
    assert (done.returncode, done.stdout) == (0, expected_answer(tiny_bundle, picture))
    assert done.stderr == "Model: tiny. It knows nothing.\n"
    for command in working_commands(tiny_bundle, tmp_path):
        done = without(NOT_ON_A_DEVICE, *command)
        assert (done.returncode, done.stderr) == (0, ""), command


def working_commands(bundle: Path, folder: Path) -> list[list[str | Path]]:
    """What works on a device, besides what has tests of its own: `run`, `bench`, `doctor`."""
    return [
        ["--version"],
        ["--help"],
        ["info", bundle],
        ["scene", "-o", folder / "scene.png"],
        ["scene", "-o", folder / "scenes", "--count", "2"],
        ["plan", "--device", "orin-nano-8gb", "--target", "jetpack-6.2"],
        ["build", bundle, "--dry-run"],
        ["flops"],
        ["models"],
        ["eval", bundle, "--scenes", "1"],
    ]


@pytest.mark.parametrize("name", NEED_MORE)
def test_a_command_that_needs_more_says_which_extra(
    name: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIMIX_EDGE_CACHE", str(tmp_path))
    arguments = [str(tiny_bundle) if word == "BUNDLE" else word for word in NEED_MORE[name]]
    done = without(NOT_ON_A_DEVICE, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert "pip install 'himix-edge[export]'" in done.stderr


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("onnx", "export"),
        pytest.param("onnxscript", "export", marks=pytest.mark.slow),
        pytest.param("safetensors", "export", marks=pytest.mark.slow),
        ("transformers", "plan of a folder"),
    ],
)
def test_so_does_one_of_a_partial_install(
    missing: str, command: str, tiny_folder: Path, tmp_path: Path
) -> None:
    more: list[str | Path] = []
    if command == "export":
        more = ["--checkpoint", tiny_folder, "-o", tmp_path / "b"]
    done = without(missing, *NEED_MORE[command], *more)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(rf"Error: (this command|a folder or a repository) needs {missing}", done.stderr)
    assert done.stderr.endswith("Fix: pip install 'himix-edge[export]'\n")
    assert done.stderr.count("\n") == 1


def test_without_typer_it_says_so() -> None:
    done = without("typer", "--version")
    assert done.returncode == 1
    assert done.stderr == ("Error: the command line needs typer. Fix: pip install typer\n")


# How a process ends.


def test_a_reader_that_has_gone(tiny_bundle: Path, picture: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "himix_edge", *run_arguments(tiny_bundle, picture)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == "Model: tiny. It knows nothing.\n"
    assert process.wait() == 1


def test_ctrl_c_in_any_command_exits_with_130(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "himix_edge", "scene", "--count", "99999", "-o", tmp_path / "s"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".s-*")) and time.monotonic() < deadline:
        time.sleep(0.02)  # until it writes
    process.send_signal(SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# The public names.


def test_public_names() -> None:
    from himix_edge.errors import HimixError
    from himix_edge.runtimes import Answer, Conversation, EncodedImage, Model, SamplingOptions

    for value in (Answer, Conversation, EncodedImage, HimixError, Model, SamplingOptions, load):
        assert getattr(himix_edge, value.__name__) is value
        assert value.__name__ in himix_edge.__all__
        assert value.__name__ in dir(himix_edge)
    assert all(hasattr(himix_edge, name) for name in himix_edge.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        getattr(importlib.import_module("himix_edge"), "lo" + "de")


# From a wheel.


@pytest.mark.slow
def test_the_wheel_carries_what_is_no_code(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assets = [path for path in (PACKAGE / "assets").rglob("*") if path.is_file()]
    assert len(assets) >= 7
    for path in (*assets, PACKAGE / "py.typed"):
        assert str(path.relative_to(PACKAGE.parent)) in names


@pytest.mark.slow
def test_a_device_install_answers_and_has_no_torch(
    device: Path, tiny_bundle: Path, picture: Path, tmp_path: Path
) -> None:
    assert run(device / "python", "-c", "import himix_edge.runtimes").returncode == 0
    for missing in ("torch", "transformers", "onnx", "matplotlib"):
        assert "ModuleNotFoundError" in run(device / "python", "-c", f"import {missing}").stderr
    done = run(device / "himix-edge", *run_arguments(tiny_bundle, picture))
    assert (done.returncode, done.stdout) == (0, expected_answer(tiny_bundle, picture))
    check_commands(device, tiny_bundle, tmp_path)


@pytest.mark.slow
def test_a_type_checker_finds_the_types(device: Path, tmp_path: Path) -> None:
    """And not only that there are some: a wrong one is refused."""
    (tmp_path / "consumer.py").write_text(CONSUMER)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    done = run(
        *mypy,
        "--config-file=",
        "--python-executable",
        device / "python",
        "consumer.py",
        cwd=tmp_path,
    )
    assert "Skipping analyzing" not in done.stdout
    assert re.search(r'Revealed type is "(builtins\.)?str"', done.stdout), done.stdout
    assert re.search(r"^consumer\.py:15: error: Incompatible types in", done.stdout, re.MULTILINE)
    assert "Found 1 error in 1 file" in done.stdout


@pytest.mark.slow
def test_the_oldest_versions_have_all_commands(
    wheel: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """What JetPack 6.2 has room for; with Python 3.10, where there is one."""
    python = jetpack_python()
    device = device_install(wheel, tmp_path, python, *pins(version_of(python)))
    check_commands(device, tiny_bundle, tmp_path)


def check_commands(device: Path, bundle: Path, folder: Path) -> None:
    """Every command's help, those that work, those that need more, and odd arguments."""
    for command in COMMANDS:
        done = run(device / "himix-edge", command, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"Usage: himix-edge {command}" in done.stdout
    for arguments in working_commands(bundle, folder):
        done = run(device / "himix-edge", *arguments)
        assert (done.returncode, done.stderr) == (0, ""), arguments
    done = run(device / "himix-edge", "train")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "himix-edge[export]" in done.stderr
    assert "[default: 256]" in run(device / "himix-edge", "run", "--help").stdout
    for odd in (["scene", "-o", "x", "--seed", "1" * 400], ["flops", "--text", "9" * 5000]):
        assert run(device / "himix-edge", *odd).returncode == 2
    asked = {"COMP_WORDS": "himix-edge export --target jet", "COMP_CWORD": "3"}
    done = run(device / "himix-edge", _HIMIX_EDGE_COMPLETE="complete_bash", **asked)
    assert done.stdout.split() == ["jetpack-6.2", "jetpack-7.2"]


def device_install(wheel: Path, folder: Path, python: str, *requirements: str) -> Path:
    """The folder of programs of a fresh environment with what a device installs."""
    subprocess.run([python, "-m", "venv", "--without-pip", folder / "device"], check=True)
    programs = folder / "device" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python")]
    install = run(*pip, "install", "-q", "--no-compile", *requirements, f"{wheel}[cpu]")
    if install.returncode:
        pytest.skip(f"pip could not install: {install.stderr.strip().splitlines()[-1:]}")
    return programs


def jetpack_python() -> str:
    """Python 3.10, or else the one that runs the tests."""
    found = shutil.which("python3.10")
    return found if found and run(found, "--version").returncode == 0 else sys.executable
