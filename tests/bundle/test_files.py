"""A bundle's files: what is checked is what is used, and nothing else is there."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from himix_edge.bundle.files import BundleFiles
from himix_edge.contract import MANIFEST, FileRecord
from himix_edge.errors import BundleError
from tests.test_contract import FILES, manifest_of


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / MANIFEST).write_text(manifest_of(FILES).to_json())
    return folder


def test_files_are_read_as_recorded(bundle: Path) -> None:
    with BundleFiles.open(bundle) as files:
        files.check()
        files.require_unchanged()
        for name, data in FILES.items():
            assert files.read(name) == data
            assert bytes(files.map(name)[:]) == data
    assert files.manifest == manifest_of(FILES)


def test_what_was_opened_is_used_whatever_stands_at_its_path(bundle: Path) -> None:
    files = BundleFiles.open(bundle)
    other = bundle / "other"
    other.write_bytes(b'{"model": 1}!')
    other.replace(bundle / "tokenizer.json")
    assert files.read("tokenizer.json") == FILES["tokenizer.json"]
    files.check()
    files.require_unwritten()
    with pytest.raises(BundleError, match=r"tokenizer\.json is corrupt: .*found another one"):
        files.require_unchanged()


def test_a_file_exchanged_before_it_is_opened_is_refused(bundle: Path) -> None:
    data = FILES["tokenizer.json"].replace(b"model", b"lemod")
    (bundle / "tokenizer.json").write_bytes(data)
    files = BundleFiles.open(bundle)
    for used in (lambda: files.read("tokenizer.json"), files.check):
        with pytest.raises(BundleError, match=r"tokenizer\.json is corrupt: expected sha256"):
            used()
    assert BundleFiles.open(bundle, verify=False).read("tokenizer.json") == data


def test_a_file_that_is_written_to_while_it_is_open(bundle: Path) -> None:
    files = BundleFiles.open(bundle)
    with (bundle / "vision.onnx").open("r+b") as file:
        file.write(b"\x08\x0a")  # what was there
    os.utime(bundle / "vision.onnx", ns=(1, 1))
    with pytest.raises(BundleError, match="written to"):
        files.require_unwritten()


def test_a_bundle_that_is_replaced_meanwhile_stays_readable(bundle: Path) -> None:
    files = BundleFiles.open(bundle)
    shutil.rmtree(bundle)
    assert files.read("vision.onnx") == FILES["vision.onnx"]
    files.check()
    files.require_unwritten()


def test_a_bundle_that_is_replaced_while_it_is_opened_is_read_again(bundle: Path) -> None:
    """The old manifest was read, and the new files stand there."""
    new = {**FILES, "vision.onnx": b"\x08\x0b" * 70}
    stale = manifest_of(FILES)
    (bundle / "vision.onnx").write_bytes(new["vision.onnx"])
    (bundle / MANIFEST).write_text(manifest_of(new).to_json())
    manifests = iter([stale, manifest_of(new)])
    files = BundleFiles.open(bundle, read_manifest=lambda _: next(manifests))
    assert files.read("vision.onnx") == new["vision.onnx"]
    with pytest.raises(BundleError, match="expected 100 bytes, found 140 bytes"):
        BundleFiles.open(bundle, read_manifest=lambda _: stale)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_are_closed(bundle: Path) -> None:
    before = open_descriptors()
    for _ in range(3):
        with BundleFiles.open(bundle) as files:
            files.check()
        BundleFiles.open(bundle)
    (bundle / "vision.onnx").unlink()
    with pytest.raises(BundleError, match="no such file"):
        BundleFiles.open(bundle)
    assert open_descriptors() == before


def test_a_file_that_is_not_listed_is_not_read(bundle: Path) -> None:
    (bundle / "prefill.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"prefill\.onnx .*expected a record of it in manifest"):
        BundleFiles.open(bundle).read("prefill.onnx")


def test_an_empty_file(bundle: Path) -> None:
    assert BundleFiles.open(bundle).read("README.md") == b""
    assert FileRecord.of(bundle / "README.md") == FileRecord(hashlib.sha256(b"").hexdigest(), 0)
