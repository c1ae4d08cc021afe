"""Bundles without a model, and devices without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto

from himix_edge.contract import (
    CHAT_TEMPLATE,
    DECODER_GRAPH,
    ENGINES,
    MANIFEST,
    SCHEMA_VERSION,
    TOKENIZER,
    VISION_GRAPH,
    Chat,
    FileRecord,
    Manifest,
)
from himix_edge.engines.gpu import gpu_here
from himix_edge.engines.store import EngineDevice
from himix_edge.engines.trt import engine_device
from tests.engines.fake_builder import Script, fake_cuda, fake_tensorrt, script
from tests.tiny import tiny_config

Bundle = Callable[..., Path]


def make_bundle(folder: Path, **changes: Any) -> Path:
    """A bundle of the native dialect; `changes` are fields of its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for graph in (VISION_GRAPH, DECODER_GRAPH):
        (folder / graph).write_bytes(ModelProto(doc_string=graph).SerializeToString())
        (folder / f"{graph}.data").write_text(f"the weights of {graph}" * 10)
    for name in (TOKENIZER, CHAT_TEMPLATE):
        (folder / name).write_text("{}")
    files = sorted(path for path in folder.iterdir() if path.name not in (MANIFEST, ENGINES))
    fields: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": "tiny",
        "notice": "",
        "dialect": "native",
        "dtype": "float16",
        "config": tiny_config(),
        "chat": Chat(),
        "files": {path.name: FileRecord.of(path) for path in files},
        "tools": {},
        "parity": {},
        "cache_slots": 64,
    }
    manifest = Manifest(**{**fields, **changes})
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def portable_bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "portable", dialect="portable", cache_slots=None)


Device = Callable[..., EngineDevice]


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Makes this machine a device with TensorRT of some version, and a GPU."""

    def change(version: str = "10.16.1.11", **gpu: Any) -> EngineDevice:
        monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(version))
        for name, module in fake_cuda(**gpu).items():
            monkeypatch.setitem(sys.modules, name, module)
        return engine_device(gpu_here())

    return change


@pytest.fixture
def orin(become: Device) -> EngineDevice:
    """A Jetson Orin with JetPack 7.2."""
    return become()


@pytest.fixture
def builder(become: Device) -> Script:
    """What TensorRT's builder will do on it."""
    become()
    return script
