"""What a device installs is enough, and is loaded no sooner than needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import himix_edge
from tests.runtimes.conftest import TinyBundle

PACKAGE = Path(himix_edge.__file__).parent
DEVICE_MODULES = sorted(
    ".".join(("himix_edge", *path.relative_to(PACKAGE).with_suffix("").parts))
    for pattern in (
        "contract.py",
        "config.py",
        "data/*.py",
        "errors.py",
        "files.py",
        "bench/[!p]*.py",  # the plot is for a desk, the product graphs are made with onnx
        "doctor/*.py",
        "engines/*.py",
        "runtimes/*.py",
        "shapes/*.py",
    )
    for path in PACKAGE.glob(pattern)
)
NOT_ON_A_DEVICE = ("torch", "transformers", "onnx", "onnxscript", "safetensors", "typer", "rich")

# Whatever imports one of these finds that it isn't installed.
BLOCK = """
import importlib, sys
for name in {names!r}:
    sys.modules[name] = None
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_list_of_modules_is_whole() -> None:
    assert "himix_edge.runtimes.ort" in DEVICE_MODULES
    assert "himix_edge.runtimes.model" in DEVICE_MODULES
    assert "himix_edge.bench.measure" in DEVICE_MODULES
    assert "himix_edge.shapes.render" in DEVICE_MODULES
    assert len(DEVICE_MODULES) >= 17


def test_the_device_modules_import_by_themselves() -> None:
    code = BLOCK.format(names=(*NOT_ON_A_DEVICE, "onnxruntime"))
    code += "for name in sys.argv[1:]: print(importlib.import_module(name).__name__)"
    assert python(code, *DEVICE_MODULES).split() == DEVICE_MODULES


def test_the_block_blocks() -> None:
    code = BLOCK.format(names=NOT_ON_A_DEVICE) + "import himix_edge.models.himix"
    with pytest.raises(AssertionError, match="torch"):
        python(code)


def test_a_device_answers(bundle: TinyBundle) -> None:
    code = BLOCK.format(names=NOT_ON_A_DEVICE)
    code += """
import numpy, himix_edge
model = himix_edge.load(sys.argv[1], threads=1)
image = model.encode(numpy.zeros((20, 20, 3), numpy.uint8))
answer = model.generate(image, "what", max_tokens=5)
print(len(list(answer)) > 0, answer.tokens)
"""
    assert python(code, str(bundle.folder)).split() == ["True", "5"]


def test_importing_the_package_imports_nothing_else() -> None:
    heavy = ("numpy", "PIL", "tokenizers", "onnxruntime", "torch", "onnx", "transformers")
    code = f"import sys, himix_edge; print([n for n in {heavy!r} if n in sys.modules])"
    assert python(code).strip() == "[]"
    code = "import sys, himix_edge.runtimes; print('onnxruntime' in sys.modules)"
    assert python(code).strip() == "False"
