"""From a source to a folder."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils._paths import filter_repo_objects

from himix_edge.errors import CheckpointError
from himix_edge.models.hub import name_of, provenance_of
from himix_edge.models.huggingface import (
    decoder_from_folder,
    folder_from_source,
)
from tests.reliability.table import tried

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is resolved or downloaded but what a test lets."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.setattr(huggingface_hub.HfApi, "resolve_revision", None)


def resolve_to_commit(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The hub's answer to every revision; returns what it was asked."""
    asked: list[tuple[Any, ...]] = []

    def resolve(_: Any, repository: str, *, revision: Any, local_files_only: bool) -> Any:
        asked.append((repository, revision, local_files_only))
        return SimpleNamespace(resolved=COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "resolve_revision", resolve)
    return asked


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder_from_source(str(tmp_path), fetch=True) == tmp_path
    (tmp_path / "owner" / "name@x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert folder_from_source("owner/name@x", fetch=True) == Path("owner/name@x")


@pytest.mark.parametrize(
    "source",
    [
        "nothing",
        "./owner/name",
        "/a/b",
        "a/b/c",
        "",
        "a b/c",
        "~/x",
        "../a",
        "a/..",
        "a/b/",
        "a/b@",
    ],
)
def test_neither_a_folder_nor_an_id(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"expected a folder, or a hub id.*no such folder"):
        folder_from_source(source, fetch=True)


@pytest.mark.parametrize("source", ["models/modle", "models/modle@main"])
def test_a_misspelled_path_is_not_somebodys_repository(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"but a folder models\. Fix: check the path"):
        folder_from_source(source, fetch=True)


REPOSITORY = {
    "config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt",
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "optimizer.bin",
    "consolidated.safetensors", "onnx/config.json", "README.md", "original/model.safetensors",
    "modeling.py", "LICENSE.py", "training_args.bin", "model.pkl",
}  # fmt: skip


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("revision", [None, "main", "refs/pr/3"])
def test_what_of_a_repository_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pickled: bool, revision: str | None
) -> None:
    """One commit of it; pickled weights where there are no others."""
    repository = {name for name in REPOSITORY if not (pickled and name.endswith(".safetensors"))}
    commits = []

    def download(source: str, *, revision: str, local_files_only: bool, **patterns: Any) -> str:
        assert (source, local_files_only) == ("owner/name", False)
        commits.append(revision)
        for name in filter_repo_objects(sorted(repository), **patterns):
            (tmp_path / name).touch()
        return str(tmp_path)

    asked = resolve_to_commit(monkeypatch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = f"owner/name@{revision}" if revision else "owner/name"
    assert folder_from_source(source, fetch=True) == tmp_path
    assert asked == [("owner/name", revision, False)]
    assert set(commits) == {COMMIT}
    texts = {
        "README.md", "chat_template.jinja", "config.json", "merges.txt",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer.model",
    }  # fmt: skip
    weights = {"model.safetensors", "model-00001-of-00002.safetensors"}
    if pickled:
        weights = {"pytorch_model.bin", "pytorch_model-00001-of-00002.bin"}
    assert {path.name for path in tmp_path.iterdir()} == texts | weights


def test_a_commit_needs_no_resolving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").touch()
    seen = []

    def download(_: str, *, revision: str, **__: Any) -> str:
        seen.append(revision)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert folder_from_source(f"owner/name@{COMMIT}", fetch=True) == tmp_path
    assert seen == [COMMIT]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub's cache, and no connection: every attempt at one fails the test."""
    monkeypatch.undo()
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(socket, "getaddrinfo", None)
    return cache


@tried(
    "Network",
    "a hub id where nothing is to be fetched: in a checkpoint's own config.json, or to `flops`",
    "the hub's cache is all that is looked at",
)
def test_what_the_user_did_not_name_is_not_fetched(cached: Path) -> None:
    message = r"owner/name.* is not on this machine.*hf download owner/name"
    for source, at in (("owner/name", ""), ("owner/name@v1", " --revision v1"),
                       (f"owner/name@{COMMIT}", f" --revision {COMMIT}")):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"{message}{at}$"):
            folder_from_source(source)
    repository = cached / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for source in ("owner/name", "owner/name@main", f"owner/name@{COMMIT}"):
        assert folder_from_source(source) == snapshot
    assert provenance_of(snapshot) == f"owner/name at commit {COMMIT}"
    assert provenance_of(cached) == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, r"licence has to be accepted.*huggingface\.co/owner/name.*hf auth login"),
        (RepositoryNotFoundError, "neither a folder here nor a public repository.*check the name"),
        (RevisionNotFoundError, "no revision v1 of owner/name.*name a branch, a tag or a commit"),
        (OSError, r"found OSError: no room.*hf download owner/name --revision v1 --local-dir FOLD"),
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

    resolve_to_commit(monkeypatch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        CheckpointError, match=f"cannot download owner/name@v1.*{message}"
    ) as caught:
        folder_from_source("owner/name@v1", fetch=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["owner/name", f"owner/name@{COMMIT}"])
def test_without_a_connection(source: str, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not cached.exists()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"cannot download owner/name.*--local-dir FOLDER"):
        folder_from_source(source, fetch=True)


def test_a_model_in_the_hubs_cache_is_called_by_its_id(qwen2: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--a-name" / "snapshots" / "0123abc"
    shutil.copytree(qwen2, snapshot)
    assert name_of(snapshot) == decoder_from_folder(snapshot).name == "owner/a-name"
    assert name_of(qwen2) == "qwen2"
