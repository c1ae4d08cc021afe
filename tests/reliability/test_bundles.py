"""Bundles from strangers: what is in them stays data, and stays in their folder."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from typer.testing import CliRunner

import himix_edge
from himix_edge.bundle.files import BundleFiles
from himix_edge.cli import app
from himix_edge.contract import CHAT_TEMPLATE, DECODER_GRAPH, MANIFEST, TOKENIZER, FileRecord
from himix_edge.errors import BundleError, HimixError
from tests.reliability.table import tried

Body = dict[str, Any]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "download" / "bundle"))


def body_of(bundle: Path) -> Body:
    body: Body = json.loads((bundle / MANIFEST).read_bytes())
    return body


def seal(bundle: Path, body: Body) -> None:
    """Writes a manifest as anyone can: its seal is no secret."""
    body = {name: value for name, value in body.items() if name != "seal"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps({**body, "seal": digest}))


def record(path: Path) -> dict[str, Any]:
    found = FileRecord.of(path)
    return {"sha256": found.sha256, "size": found.size}


def refused(bundle: Path, message: str) -> None:
    """By whatever reads a bundle."""
    output = bundle.parent / "small"
    for command in (
        ["info", str(bundle)],
        ["quantize", str(bundle), "-o", str(output), "--decoder", "int8"],
    ):
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, HimixError), (command, result.output, result.exception)
    for verify in (True, False):
        with pytest.raises(BundleError, match=message):
            himix_edge.load(bundle, threads=1, device="cpu", verify=verify)
    assert not output.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../../.bashrc",
        "../small/manifest.json",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        ".hidden",
        "manifest.json",
        "a" * 5000,
        "a\n",
        "a\\b",
        "C:x",
        "\ud800",
        "name\x1b[2J",
    ],
)
@tried("Bundles", "a manifest with a file name that is no plain name", "refused, nothing written")
def test_names_that_leave_the_folder(bundle: Path, name: str) -> None:
    payload = bundle.parents[1] / ".bashrc"
    payload.write_text("echo harmed")
    body = body_of(bundle)
    body["files"][name] = record(payload)
    seal(bundle, body)
    refused(bundle, "names of files in the bundle's own folder")


@pytest.mark.parametrize("left_out", [None, f"{DECODER_GRAPH}.data", TOKENIZER])
@tried("Bundles", "a manifest that does not list a file that is opened", "refused, with its name")
def test_files_that_are_not_listed(bundle: Path, left_out: str | None) -> None:
    body = body_of(bundle)
    if left_out:
        del body["files"][left_out]
    else:
        body["files"] = {}
    seal(bundle, body)
    refused_by_load(bundle, left_out or "none of vision.onnx, decoder.onnx, tokenizer.json")


def refused_by_load(bundle: Path, message: str) -> None:
    for verify in (True, False):
        with pytest.raises(BundleError, match=message):
            himix_edge.load(bundle, threads=1, device="cpu", verify=verify)


@pytest.mark.parametrize("name", [TOKENIZER, f"{DECODER_GRAPH}.data", CHAT_TEMPLATE])
@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "pipe", "folder", "device"])
@tried("Bundles", "a link, a pipe, a folder or a device in the place of a file", "refused at once")
def test_what_is_no_regular_file(bundle: Path, name: str, kind: str) -> None:
    path, outside = bundle / name, bundle.parents[1] / "id_rsa"
    path.replace(outside)
    if kind == "symbolic link":
        path.symlink_to(outside)
    elif kind == "hard link":
        path.hardlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    refused(bundle, "can't be used: .*found a link|found a folder, a pipe or a device")


@tried("Bundles", "a manifest that is a link to a good one elsewhere", "refused")
def test_a_manifest_that_is_a_link(bundle: Path) -> None:
    (bundle / MANIFEST).replace(bundle.parent / "elsewhere.json")
    (bundle / MANIFEST).symlink_to(bundle.parent / "elsewhere.json")
    refused(bundle, "found a link")


@pytest.mark.parametrize("location", ["../outside.data", "/etc/passwd", "gone.data", TOKENIZER])
@tried("Bundles", "a graph whose weights are outside of the bundle", "refused before it is opened")
def test_weights_outside_of_the_bundle(bundle: Path, location: str) -> None:
    weights = bundle / f"{DECODER_GRAPH}.data"
    shutil.copyfile(weights, bundle.parent / "outside.data")
    graph = onnx.load(bundle / DECODER_GRAPH, load_external_data=False)
    for constant in graph.graph.initializer:
        for entry in constant.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(graph, bundle / DECODER_GRAPH)
    body = body_of(bundle)
    body["files"][DECODER_GRAPH] = record(bundle / DECODER_GRAPH)
    seal(bundle, body)
    refused_by_load(bundle, "expected weights in a file of the bundle")


@tried("Bundles", "a graph with a loop, which could run for ever", "refused before it is opened")
def test_a_graph_with_a_program(bundle: Path) -> None:
    graph = onnx.load(bundle / DECODER_GRAPH, load_external_data=False)
    inner = onnx.helper.make_graph([], "forever", [], [])
    graph.graph.node.append(onnx.helper.make_node("Loop", ["", ""], [], body=inner))
    onnx.save(graph, bundle / DECODER_GRAPH)
    body = body_of(bundle)
    body["files"][DECODER_GRAPH] = record(bundle / DECODER_GRAPH)
    seal(bundle, body)
    refused_by_load(bundle, "is not a graph that himix-edge writes: .*found the operator 'Loop'")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("config", "decoder", "num_hidden_layers"), 10**7, "num_hidden_layers is invalid"),
        (("config", "decoder", "vocab_size"), 10**12, "vocab_size is invalid"),
        (("config", "decoder", "hidden_size"), 10**9, "hidden_size is invalid"),
        (("config", "decoder", "head_dim"), 1 << 40, "head_dim is invalid"),
        (("config", "decoder", "max_position_embeddings"), 1 << 60, "max_position_embeddings"),
        (("config", "vision", "image_size"), 10**6, "image_size is invalid"),
        (("config", "prefix_tokens"), 10**9, "prefix_tokens is invalid"),
        (("cache_slots",), 1 << 40, "cache_slots"),
        (("cache_slots",), 0, "cache_slots"),
        (("notice",), "x" * 100_000, "a notice of 4000 characters"),
        (("name",), "x" * 1000, "a name of 200"),
        (("files", "vision.onnx", "size"), 1 << 60, "sizes in bytes"),
        (("files", "vision.onnx", "size"), -1, "sizes in bytes"),
        (("files",), {f"f{i}": {"sha256": "", "size": 0} for i in range(5000)}, "none of"),
        (("config", "decoder", "eos_token_ids"), [10**9], "eos_token_ids"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else None,
)
@tried("Bundles", "sizes in a manifest that no model has", "refused before memory is taken")
def test_sizes_that_no_model_has(
    bundle: Path, path: tuple[str, ...], value: Any, message: str
) -> None:
    body = body_of(bundle)
    *parents, name = path
    target = body
    for parent in parents:
        target = target[parent]
    target[name] = value
    seal(bundle, body)
    refused_by_load(bundle, message)


@pytest.mark.parametrize(
    "data", [b"[" * 5_000_000, b'{"a":' * 200_000, b" " * (5 << 20), b"\xff" * 100, b"1" * 10_000]
)
@tried("Bundles", "a manifest of 5 MB, or nested 200,000 deep", "refused before it is parsed")
def test_a_manifest_that_is_too_much(bundle: Path, data: bytes) -> None:
    (bundle / MANIFEST).write_bytes(data)
    refused_by_load(bundle, "manifest.json is corrupt")


@tried("Bundles", "terminal escapes in a name, a notice, tools, or an answer", "shown as text")
def test_terminal_escapes(bundle: Path, tmp_path: Path) -> None:
    controls = "\x1b\x07\x9b\r\x08\u202e"
    escape = f"\x1b]52;c;Y3VybA==\x07\x1b[2J{controls}"
    body = body_of(bundle)
    body["name"] = body["notice"] = f"evil{escape}"
    body["tools"] = {f"tool{escape}": escape}
    seal(bundle, body)
    picture = tmp_path / "scene.png"
    runner = CliRunner()
    assert runner.invoke(app, ["scene", "-o", str(picture)]).exit_code == 0
    small = tmp_path / "small"
    for command in (
        ["info", str(bundle)],
        ["info", str(bundle), "--json"],
        ["run", str(picture), "describe", "--bundle", str(bundle), "--max-tokens", "2"],
        ["run", str(picture), "x", "--bundle", str(bundle), "--json", "--max-tokens", "2"],
        ["verify", str(bundle)],
        ["plan", str(bundle)],
        ["quantize", str(bundle), "-o", str(small)],
    ):
        result = runner.invoke(app, command)
        said = result.output + result.stderr
        assert not set(controls) & set(said), (command, said)


@tried("Bundles", "a tokenizer exchanged between check and use, again and again", "never used")
def test_what_is_checked_is_what_is_used(bundle: Path) -> None:
    good = (bundle / TOKENIZER).read_bytes()
    evil = good.replace(b'"version":"1.0"', b'"version":"2.0"')
    assert len(evil) == len(good)
    assert evil != good
    stop = threading.Event()

    def swap() -> None:
        for text in itertools.cycle((evil, good)):
            if stop.is_set():
                return
            (bundle / "other").write_bytes(text)
            (bundle / "other").replace(bundle / TOKENIZER)

    thread = threading.Thread(target=swap)
    thread.start()
    outcomes = {"used": 0, "refused": 0}
    try:
        for used in reads(bundle, 200):
            assert used in (None, good)
            outcomes["refused" if used is None else "used"] += 1
    finally:
        stop.set()
        thread.join()
    assert outcomes["used"] > 0
    assert outcomes["refused"] > 0


def reads(bundle: Path, count: int) -> Iterator[bytes | None]:
    def read() -> bytes | None:
        try:
            with BundleFiles.open(bundle) as files:
                return files.read(TOKENIZER)
        except BundleError:
            return None

    return (read() for _ in range(count))


@tried("Bundles", "a file beside those of the manifest", "not used; `info` names it")
def test_a_file_that_nobody_listed(bundle: Path) -> None:
    (bundle / "extra.so").write_bytes(b"\x7fELF")
    result = CliRunner().invoke(app, ["info", str(bundle)])
    assert result.exit_code == 0
    assert "not in the manifest, and not used: extra.so" in result.output
    assert himix_edge.load(bundle, threads=1, device="cpu").device == "cpu"
