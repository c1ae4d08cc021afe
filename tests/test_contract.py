"""The contract's names as other tools spell them, and manifests that are right or refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from himix_edge.bundle.files import BundleFiles
from himix_edge.contract import (
    MANIFEST,
    SCHEMA_VERSION,
    Chat,
    FileRecord,
    ImagePlace,
    Manifest,
    past_names,
    present_names,
)
from himix_edge.errors import BundleError
from tests.test_config import CONFIG

FILES = {
    "vision.onnx": b"\x08\x0a" * 50,
    "decoder.onnx": b"\x08\x0b" * 20,
    "tokenizer.json": b'{"model": {}}',
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"",
}


def manifest_of(files: dict[str, bytes]) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name="shapes",
        notice="Knows only its shapes: △ □ ○.",
        dialect="portable",
        dtype="float32",
        config=CONFIG,
        chat=Chat({"eos_token": "</s>"}, image=ImagePlace("<image>", 5, (1, 2))),
        files={
            name: FileRecord(hashlib.sha256(data).hexdigest(), len(data))
            for name, data in files.items()
        },
        tools={"torch": "2.13.0"},
        parity={"logits": 1.25e-05, "images": 200, "per layer": [1e-6, 2e-6], "ok": True},
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / MANIFEST).write_text(manifest_of(FILES).to_json())
    return tmp_path


def test_names_are_those_of_onnxruntime_genai() -> None:
    assert past_names(2) == [
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
    ]
    assert present_names(2) == [
        "present.0.key",
        "present.0.value",
        "present.1.key",
        "present.1.value",
    ]


def test_a_manifest_comes_back(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    assert manifest == manifest_of(FILES)
    BundleFiles(bundle, manifest).check()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=50)
@given(
    parity=st.dictionaries(st.text(), json_values, max_size=4),
    tools=st.dictionaries(st.text(), st.text(), max_size=4),
    name=st.text(),
)
def test_a_manifest_of_any_content_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    parity: dict[str, Any],
    tools: dict[str, str],
    name: str,
) -> None:
    folder = tmp_path_factory.mktemp("bundle")
    manifest = dataclasses.replace(manifest_of(FILES), parity=parity, tools=tools, name=name)
    (folder / MANIFEST).write_text(manifest.to_json())
    assert Manifest.read(folder) == manifest


@pytest.mark.parametrize(("bit", "step"), [(0x01, 1), (0x02, 7), (0x20, 7), (0x80, 7)])
def test_a_flipped_bit_anywhere_is_refused(bundle: Path, bit: int, step: int) -> None:
    path = bundle / MANIFEST
    data, manifest = path.read_bytes(), Manifest.read(bundle)
    positions = range(0, len(data), step)
    refused = 0
    for position in positions:
        path.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
        try:
            assert Manifest.read(bundle) == manifest  # 1e-05 and 1E-05 are one number
        except BundleError:
            refused += 1
    assert refused > 0.99 * len(positions)


def test_a_manifest_cut_off_anywhere_is_refused(bundle: Path) -> None:
    path = bundle / MANIFEST
    data = path.read_bytes()
    assert data.endswith(b"}\n")
    for length in (*range(0, len(data) - 1, 7), len(data) - 2):
        path.write_bytes(data[:length])
        with pytest.raises(BundleError, match=r"manifest.json is corrupt: expected sealed JSON"):
            Manifest.read(bundle)


@pytest.mark.parametrize(
    "text",
    ["", "null", "3", "[]", "{}", '"text"', '{"seal": 1}', '{"schema_version": 1}', "\x00\x00",
     "[" * 100_000],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_what_is_no_manifest_is_refused(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"manifest.json is corrupt: expected sealed JSON"):
        Manifest.read(bundle)


def resealed(body: dict[str, Any]) -> str:
    """A manifest as someone else's program might write it, its seal in order."""
    body = {name: value for name, value in body.items() if name != "seal"}
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "seal": seal})


def test_another_schema_version_is_named(bundle: Path) -> None:
    body = json.loads((bundle / MANIFEST).read_text())
    body["schema_version"] = SCHEMA_VERSION + 1
    body["dialect"] = "of the future"
    (bundle / MANIFEST).write_text(resealed(body))
    with pytest.raises(BundleError) as error:
        Manifest.read(bundle)
    assert str(error.value) == (
        f"{bundle} was made by another version of himix-edge: expected manifest schema "
        f"{SCHEMA_VERSION}, found {SCHEMA_VERSION + 1}. Fix: export it again with this "
        "version"
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dialect", "portabel", "dialect can't be 'portabel'"),
        ("files", {"a": {"sha256": "x", "size": "3"}}, "files.a.size is invalid: expected int"),
        ("chat", {"image": {"placeholder": "a"}}, "ImagePlace lacks chat.image.token_id"),
        ("surprise", 1, "unknown key 'surprise' in Manifest"),
    ],
)
def test_sealed_content_that_is_off_is_refused(
    bundle: Path, field: str, value: Any, message: str
) -> None:
    body = json.loads((bundle / MANIFEST).read_text())
    body[field] = value
    (bundle / MANIFEST).write_text(resealed(body))
    with pytest.raises(BundleError) as error:
        Manifest.read(bundle)
    assert "manifest.json is corrupt: expected this version's fields" in str(error.value)
    assert message in str(error.value)


def test_a_folder_without_a_manifest_and_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: .* found none\. Fix: make one"):
        Manifest.read(tmp_path)
    with pytest.raises(BundleError, match=r"is not a bundle: .* found no such folder"):
        Manifest.read(tmp_path / "nowhere")


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError) as error:
        BundleFiles.open(bundle).check()
    expected = f"{bundle / name} is corrupt: expected {len(FILES[name])} bytes, found no such file"
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_of_another_size_is_named(bundle: Path, name: str) -> None:
    size = len(FILES[name])
    (bundle / name).write_bytes(FILES[name] + b"\n")
    with pytest.raises(BundleError) as error:
        BundleFiles.open(bundle).check()
    expected = f"{bundle / name} is corrupt: expected {size} bytes, found {size + 1} bytes"
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize("name", [name for name, data in FILES.items() if data])
def test_a_flipped_bit_in_a_file_is_named(bundle: Path, name: str) -> None:
    manifest, data = Manifest.read(bundle), FILES[name]
    for position in range(len(data)):
        flipped = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        (bundle / name).write_bytes(flipped)
        with pytest.raises(BundleError) as error:
            BundleFiles(bundle, manifest).check()
        expected, found = hashlib.sha256(data).hexdigest(), hashlib.sha256(flipped).hexdigest()
        assert str(error.value).startswith(
            f"{bundle / name} is corrupt: expected sha256 {expected[:12]}, found {found[:12]}"
        )


def test_a_record_is_the_files_own(bundle: Path) -> None:
    assert FileRecord.of(bundle / "tokenizer.json") == FileRecord(
        hashlib.sha256(FILES["tokenizer.json"]).hexdigest(), 13
    )
