"""The right engine is found, or none: every other is refused with both keys and the remedy."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from himix_edge.contract import Manifest
from himix_edge.engines.profiles import Sizes, all_profiles, digest
from himix_edge.engines.store import (
    EngineDevice,
    EngineKey,
    Engines,
    engine_key,
    find_engines,
    seal_engines,
    whole_engines,
)
from himix_edge.errors import EngineError, OutputError

ORIN = EngineDevice("tensorrt", "10.16.1.11", "Orin, 8 SMs", "8.7")
THOR = EngineDevice("tensorrt", "10.16.1.11", "Thor, 20 SMs", "11.0")
RTX = EngineDevice("tensorrt-rtx", "1.7.1", "", "12.0")
SIZES = Sizes(60, 64)


def put(
    bundle: Path, device: EngineDevice = ORIN, text: str = "engine", **changes: Any
) -> EngineKey:
    """Stores engines as a build does."""
    key = dataclasses.replace(engine_key(Manifest.read(bundle), device, SIZES), **changes)
    engines = Engines(bundle, key)
    with whole_engines(bundle, key) as folder:
        (folder / engines.vision.name).write_text(f"vision {text}")
        (folder / engines.decoder.name).write_text(f"decoder {text}")
    seal_engines(bundle, key)
    return key


def find(bundle: Path, device: EngineDevice = ORIN) -> Engines:
    """What a runtime finds, and every file of it compared with its record."""
    found = find_engines(bundle, Manifest.read(bundle), device)
    found.check()
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"(folder)"
        for path in folder.rglob("*")
    }


def test_what_was_put_is_found(bundle: Path) -> None:
    key = put(bundle)
    found = find(bundle)
    assert found == Engines(bundle / "engines" / ORIN.digest, key)
    assert found.vision == found.folder / "vision.plan"
    assert found.decoder.read_text() == "decoder engine"
    assert found.key.sizes == SIZES


def test_a_graph_that_names_its_engine(bundle: Path) -> None:
    key = engine_key(Manifest.read(bundle), RTX, SIZES)
    with whole_engines(bundle, key) as folder:
        for name in ("vision.onnx", "vision.engine", "decoder.onnx", "decoder.engine"):
            (folder / name).write_text(name)
    seal_engines(bundle, key)
    assert find(bundle, RTX).decoder.read_text() == "decoder.onnx"
    (find(bundle, RTX).folder / "decoder.engine").unlink()
    with pytest.raises(
        EngineError, match=r"decoder\.engine is corrupt: expected 14 bytes, found no"
    ):
        find(bundle, RTX)


def test_each_device_has_its_own(bundle: Path) -> None:
    put(bundle, ORIN, "of Orin")
    put(bundle, THOR, "of Thor")
    assert find(bundle, ORIN).vision.read_text() == "vision of Orin"
    assert find(bundle, THOR).vision.read_text() == "vision of Thor"


def test_a_new_build_takes_the_place_of_the_old(bundle: Path) -> None:
    put(bundle, text="old")
    put(bundle, text="new")
    assert find(bundle).vision.read_text() == "vision new"
    assert len(list((bundle / "engines").iterdir())) == 1


def test_a_key_says_which_shapes(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    keys = [engine_key(manifest, ORIN, Sizes(prompt, 64)) for prompt in (60, 59)]
    assert keys[0].profiles == digest(all_profiles(manifest, SIZES))
    assert keys[0].profiles != keys[1].profiles


def test_none_was_built(bundle: Path) -> None:
    with pytest.raises(EngineError) as error:
        find(bundle)
    assert str(error.value) == (
        f"{bundle} has no engine for this device: expected one for TensorRT 10.16.1.11 on "
        "Orin, 8 SMs (sm 8.7), found none. Fix: "
        f"himix-edge build {bundle} --target trt"
    )


@pytest.mark.parametrize(
    "other",
    [
        THOR,
        dataclasses.replace(ORIN, version="10.16.1.12"),
        dataclasses.replace(ORIN, gpu="Orin, 16 SMs"),
        dataclasses.replace(ORIN, compute_capability="8.6"),
        RTX,
    ],
    ids=str,
)
def test_an_engine_of_another_device(bundle: Path, other: EngineDevice) -> None:
    key = put(bundle, other)
    with pytest.raises(EngineError) as error:
        find(bundle)
    assert f"expected one for {ORIN}, found one for {key}" in str(error.value)
    assert error.value.fix == f"himix-edge build {bundle} --target trt"


def test_rtx_names_its_own_target(bundle: Path) -> None:
    put(bundle)
    with pytest.raises(EngineError) as error:
        find(bundle, RTX)
    assert error.value.fix == f"himix-edge build {bundle} --target rtx-sm120"


@pytest.mark.parametrize("changed", ["vision.onnx", "decoder.onnx.data"])
def test_a_stale_engine(bundle: Path, changed: str) -> None:
    key = put(bundle)
    manifest = Manifest.read(bundle)
    record = dataclasses.replace(manifest.files[changed], sha256="f" * 64)
    files = {**manifest.files, changed: record}
    (bundle / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    with pytest.raises(EngineError) as error:
        find(bundle)
    expected = engine_key(Manifest.read(bundle), ORIN, SIZES)
    assert expected != key
    assert f"is not this bundle's: expected {expected}, found {key}. Fix: " in str(error.value)
    assert error.value.fix == f"himix-edge build {bundle} --target trt"


def test_another_file_of_the_bundle_does_not_matter(bundle: Path) -> None:
    put(bundle)
    manifest = Manifest.read(bundle)
    files = {**manifest.files, "tokenizer.json": manifest.files["vision.onnx"]}
    (bundle / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    assert find(bundle).key == engine_key(manifest, ORIN, SIZES)


@pytest.mark.parametrize(
    "wrong",
    [{"precision": "float32"}, {"profiles": "0" * 12}, {"vision": "a" * 64}],
    ids=["precision", "shapes", "graph"],
)
def test_a_wrong_key(bundle: Path, wrong: dict[str, Any]) -> None:
    key = put(bundle, **wrong)
    with pytest.raises(EngineError, match="is not this bundle's: expected TensorRT") as error:
        find(bundle)
    assert f"found {key}" in str(error.value)


def test_engines_moved_to_another_devices_place(bundle: Path) -> None:
    key = put(bundle, THOR)
    (bundle / "engines" / THOR.digest).rename(bundle / "engines" / ORIN.digest)
    with pytest.raises(EngineError) as error:
        find(bundle)
    assert f"found {key}" in str(error.value)
    assert f"expected {ORIN}" in str(error.value)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    path.write_bytes(b"x" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "decoder.plan is corrupt: expected 14 bytes, found 13 bytes"),
        (Path.unlink, "decoder.plan is corrupt: expected 14 bytes, found no such file"),
        (_flip, "decoder.plan is corrupt: expected sha256 "),
    ],
)
def test_a_damaged_engine(bundle: Path, damage: Callable[[Path], None], message: str) -> None:
    put(bundle)
    damage(find(bundle).decoder)
    with pytest.raises(EngineError) as error:
        find(bundle)
    assert message in str(error.value)
    assert error.value.fix == f"himix-edge build {bundle} --target trt"


@pytest.mark.parametrize(
    "record", ["", "{", "[]", "null", '{"key": {}}', "[" * 100_000, '{"key": 1, "files": {}}']
)
def test_a_damaged_record(bundle: Path, record: str) -> None:
    put(bundle)
    (find(bundle).folder / "engine.json").write_text(record)
    with pytest.raises(EngineError, match=r"is corrupt: expected a engine\.json of this version"):
        find(bundle)
    with pytest.raises(EngineError, match=r"no engine for this device: .* found none"):
        find(bundle, THOR)  # it is of no interest there


def test_a_record_without_the_engines_file(bundle: Path) -> None:
    key = put(bundle)
    path = find(bundle).folder / "engine.json"
    record = json.loads(path.read_text())
    del record["files"]["decoder.plan"]
    path.write_text(json.dumps(record))
    with pytest.raises(EngineError, match="record of it"):
        seal_engines(bundle, key)
    with pytest.raises(EngineError, match=r"expected a record of it in engine\.json, found none"):
        find(bundle)


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("10.16.1.11", "10.16.2.1", True),
        ("10.9.0", "10.16.1.11", True),
        ("10.16.1.11", "11.4.0.106", True),
        ("10.16.1.11", "10.9.0", False),
        ("11.4.0.106", "10.16.1.11", False),
    ],
)
def test_version_compatible_engines_run_in_later_versions(
    bundle: Path, built: str, here: str, fits: bool
) -> None:
    key = put(bundle, dataclasses.replace(ORIN, version=built), version_compatible=True)
    device = dataclasses.replace(ORIN, version=here)
    if fits:
        assert find(bundle, device).key == key
    else:
        with pytest.raises(EngineError, match="has no engine for this device"):
            find(bundle, device)
    with pytest.raises(EngineError, match="has no engine for this device"):
        find(bundle, dataclasses.replace(THOR, version=here))


def test_of_several_version_compatible_engines_the_newest(bundle: Path) -> None:
    for version in ("10.9.0", "10.15.1", "10.10.0"):
        put(bundle, dataclasses.replace(ORIN, version=version), version_compatible=True)
    assert find(bundle).key.device.version == "10.15.1"
    key = put(bundle)
    assert find(bundle).key == key


no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failure", [no_space, KeyboardInterrupt(), ValueError()], ids=repr)
@pytest.mark.parametrize("first", [True, False], ids=["first", "again"])
def test_a_failure_leaves_what_was(bundle: Path, failure: BaseException, first: bool) -> None:
    if not first:
        put(bundle)
    before = tree(bundle)
    key = engine_key(Manifest.read(bundle), ORIN, SIZES)

    def fail() -> None:
        with whole_engines(bundle, key) as folder:
            (folder / "vision.plan").write_text("half an eng")
            raise failure

    with pytest.raises((type(failure), OutputError)):
        fail()
    assert tree(bundle) == before


def test_a_disk_that_is_full_at_the_record(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = put(bundle)
    before = tree(bundle)

    def full(*_: object, **__: object) -> None:
        raise no_space

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left"), whole_engines(bundle, key) as folder:
        (folder / "vision.plan").write_bytes(b"whole")
    assert tree(bundle) == before
