"""The oldest versions that a device install accepts answer alike, and hold against attacks."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
from PIL import Image

from himix_edge.contract import DECODER_GRAPH, MANIFEST
from himix_edge.runtimes import load
from tests.lower_bounds import ROOT, InstallError, environment, pins, version_of
from tests.reliability.table import tried

# Tests that need no torch and no fixture of conftest.py, which needs it.
PURE_TESTS = (
    "tests/test_contract.py",
    "tests/test_files.py",
    "tests/data",
    "tests/runtimes/test_generate.py",
    "tests/runtimes/test_image_files.py",
    "tests/runtimes/test_shape_notices.py",
    "tests/runtimes/test_tokenizer.py",
    "tests/doctor/test_judge.py",
    "tests/shapes/test_render.py",
)
ANSWER = """
import sys, himix_edge
model = himix_edge.load(sys.argv[1], threads=1, device="cpu")
print(model.generate(model.encode(sys.argv[2]), "describe", max_tokens=8).read())
"""
LOAD = """
import sys, himix_edge
try:
    himix_edge.load(sys.argv[1], threads=1, device="cpu")
except himix_edge.HimixError as error:
    print("refused:", error)
else:
    print("opened")
"""
RENDER = """
import sys
from himix_edge.contract import Chat
from himix_edge.errors import HimixError
from himix_edge.runtimes.chat import ChatTemplate, user_message
try:
    print(ChatTemplate(sys.argv[1], Chat()).render([user_message("x")]))
except HimixError as error:
    print("refused:", error)
"""
# The first reads an environment variable with Jinja 3.1.5 (CVE-2025-27516).
THEFTS = (
    "{{ ('{0.__globals__[datetime].sys.modules[os].environ[SECRET]}'|attr('format'))"
    "(raise_exception) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.environ['SECRET'] }}",
    "{{ raise_exception.__globals__['datetime'].sys.modules['os'].environ['SECRET'] }}",
)


def pythons() -> Iterator[str]:
    """This interpreter, and JetPack 6.2's where there is one."""
    yield sys.executable
    found = shutil.which("python3.10")
    if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode:
        found = None
    if found and version_of(sys.executable) != "3.10":
        yield found


@functools.cache
def installed(python: str) -> Path:
    try:
        return environment(python, "pytest", "hypothesis")
    except InstallError as error:
        pytest.skip(f"pip could not install the oldest versions: {error}")


@pytest.fixture(params=list(pythons()), ids=version_of)
def python(request: pytest.FixtureRequest) -> str:
    """The interpreter of an environment at the lower bounds, which takes minutes to install."""
    if not os.environ.get("HIMIX_EDGE_LOWER_BOUNDS"):
        pytest.skip("run by: make test-lower-bounds")
    return str(installed(request.param) / "python")


def run(python: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, *arguments],
        env=kept | {"PYTHONPATH": str(ROOT), "SECRET": "hidden"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_bound_is_a_lower_one_and_safe() -> None:
    """Onnxruntime and Pillow have a line of their own for Python 3.10; the rest is for all."""
    old, new = (dict(pin.split("==") for pin in pins(version)) for version in ("3.10", "3.11"))
    assert old.keys() == new.keys() >= {"numpy", "pillow", "tokenizers", "jinja2", "onnxruntime"}
    assert {name for name in old if old[name] != new[name]} == {"pillow", "onnxruntime"}
    assert (old["jinja2"], old["pillow"], new["pillow"]) == ("3.1.6", "12.3", "13.0")
    assert (old["onnxruntime"], new["onnxruntime"]) == ("1.23.2", "1.25.1")


@pytest.mark.slow
def test_the_oldest_versions_answer_alike(
    python: str, tiny_bundle: Path, half_bundle: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (40, 30), (200, 30, 60)).save(picture)
    for bundle in (tiny_bundle, half_bundle):  # portable, in float32 and in float16
        with load(bundle, threads=1, device="cpu") as model:
            expected = model.generate(model.encode(picture), "describe", max_tokens=8).read()
        done = run(python, "-c", ANSWER, bundle, picture)
        assert (done.returncode, done.stdout) == (0, expected + "\n"), done.stderr


@pytest.mark.slow
def test_the_tests_of_a_device_pass_there(python: str) -> None:
    options = ("-q", "-p", "no:cacheprovider", "--noconftest", "-m", "not slow", "-W", "default")
    done = run(python, "-m", "pytest", *options, *PURE_TESTS)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d{3} passed", done.stdout), done.stdout[-300:]


@tried(
    "Prompts",
    "a chat template that reads the environment through Python's attributes, with the oldest Jinja",
    "refused",
)
@pytest.mark.slow
@pytest.mark.parametrize("template", THEFTS)
def test_a_template_stays_in_its_sandbox(python: str, template: str) -> None:
    done = run(python, "-c", RENDER, template)
    assert done.stdout.startswith("refused: "), (done.stdout, done.stderr[-1000:])
    assert "hidden" not in done.stdout


def outside(bundle: Path) -> None:
    """The weights one folder up, by the graph's own word."""
    point_to(bundle, "../outside.data")


def absolute(bundle: Path) -> None:
    point_to(bundle, str(bundle.parent / "outside.data"))


def link(bundle: Path) -> None:
    (bundle / f"{DECODER_GRAPH}.data").symlink_to(bundle.parent / "outside.data")


def folder_link(bundle: Path) -> None:
    (bundle / "sub").symlink_to(bundle.parent)
    point_to(bundle, "sub/outside.data")


def point_to(bundle: Path, location: str) -> None:
    graph = onnx.load(bundle / DECODER_GRAPH, load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(graph, bundle / DECODER_GRAPH)


@tried(
    "Bundles",
    "a graph whose weights are outside of the bundle ('../x', '/x', links), with the oldest "
    "versions of all packages",
    "refused",
)
@pytest.mark.slow
@pytest.mark.parametrize("attack", [outside, absolute, link, folder_link])
def test_weights_outside_of_the_bundle_are_refused(
    python: str, attack: Callable[[Path], None], tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    data = f"{DECODER_GRAPH}.data"
    (bundle / data).rename(tmp_path / "outside.data")
    attack(bundle)
    body = json.loads((bundle / MANIFEST).read_bytes())
    del body["seal"]
    graph = (bundle / DECODER_GRAPH).read_bytes()
    record = {"sha256": hashlib.sha256(graph).hexdigest(), "size": len(graph)}
    body["files"][DECODER_GRAPH] = record
    if attack is not link:
        del body["files"][data]
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps({**body, "seal": seal}))
    done = run(python, "-c", LOAD, bundle)
    assert done.stdout.startswith("refused: "), (done.stdout, done.stderr[-1000:])
