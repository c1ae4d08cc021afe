"""From a source to a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils._paths import filter_repo_objects

from himix_edge.errors import CheckpointError
from himix_edge.models.hub import name_of
from himix_edge.models.huggingface import (
    decoder_from_folder,
    folder_from_source,
)


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # not to be called
    assert folder_from_source(str(tmp_path)) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert folder_from_source("owner/name") == Path("owner/name")


@pytest.mark.parametrize("source", ["nothing", "./owner/name", "/a/b", "a/b/c", "", "a b/c", "~/x"])
def test_neither_a_folder_nor_an_id(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(CheckpointError, match=r"expected a folder, or a hub id.*no such folder"):
        folder_from_source(source)


REPOSITORY = {
    "config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt",
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "optimizer.bin",
    "consolidated.safetensors", "onnx/config.json", "README.md", "original/model.safetensors",
    "modeling.py",
}  # fmt: skip


@pytest.mark.parametrize("pickled", [False, True])
def test_what_of_a_repository_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pickled: bool
) -> None:
    """Pickled weights where there are no others."""
    repository = {name for name in REPOSITORY if not (pickled and name.endswith(".safetensors"))}

    def download(source: str, **patterns: Any) -> str:
        assert source == "owner/name"
        for name in filter_repo_objects(sorted(repository), **patterns):
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert folder_from_source("owner/name") == tmp_path
    texts = {
        "README.md", "chat_template.jinja", "config.json", "merges.txt",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer.model",
    }  # fmt: skip
    weights = {"model.safetensors", "model-00001-of-00002.safetensors"}
    if pickled:
        weights = {"pytorch_model.bin", "pytorch_model-00001-of-00002.bin"}
    assert {path.name for path in tmp_path.iterdir()} == texts | weights


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, r"licence has to be accepted.*huggingface\.co/owner/name.*hf auth login"),
        (RepositoryNotFoundError, "neither a folder here nor a public repository.*check the name"),
        (OSError, r"found OSError: no room.*hf download owner/name --local-dir FOLDER"),
    ],
)
def test_downloads_that_fail(
    error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        if error is OSError:
            raise OSError("no room\nat all")
        request = SimpleNamespace(url="", method="GET", headers={})
        response: Any = SimpleNamespace(headers={}, request=request, status_code=403)
        raise error("no", response=response)  # type: ignore[call-arg]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=f"cannot download owner/name.*{message}") as caught:
        folder_from_source("owner/name")
    assert "\n" not in str(caught.value)


def test_without_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"cannot download owner/name.*--local-dir FOLDER"):
        folder_from_source("owner/name")


def test_a_model_in_the_hubs_cache_is_called_by_its_id(qwen2: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--a-name" / "snapshots" / "0123abc"
    shutil.copytree(qwen2, snapshot)
    assert name_of(snapshot) == decoder_from_folder(snapshot).name == "owner/a-name"
    assert name_of(qwen2) == "qwen2"
