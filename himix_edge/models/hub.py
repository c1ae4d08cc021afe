"""From what a user calls a model, a folder or a hub id, to a folder here and its JSON files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from himix_edge.errors import CheckpointError
from himix_edge.models.checkpoint_files import read_bytes

CONFIG = "config.json"
HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
COMMIT = re.compile("[0-9a-f]{40}")
# Of the repository's top folder, what is read here; pickled weights where there are no others.
FILES = [
    "*.json", "*.jinja", "README.md", "LICENSE*", "model.safetensors", "model-*.safetensors",
    "tokenizer.model", "merges.txt",
]  # fmt: skip
PICKLED_FILES = ["pytorch_model.bin", "pytorch_model-*.bin"]
NEVER = ["*/*", "*.py"]
NOT_CACHED = (LocalEntryNotFoundError, RevisionResolutionError)


def folder_from_source(source: str, *, fetch: bool = False) -> Path:
    """The folder itself, or else the hub's repository of that id.

    A repository is one commit of it, in the cache of `huggingface_hub`: the commit that a branch or
    a tag stands for is found first, and every file is of that one. Downloading shows its progress
    on a terminal.

    Args:
        source: a local folder; or an id such as "Qwen/Qwen2-0.5B-Instruct", and perhaps
            "@REVISION", a branch, a tag or a commit.
        fetch: whether what is not in the cache may be downloaded. Only what the user named
            himself, to a command that is there to fetch it, is worth a connection.

    Raises:
        CheckpointError: neither a folder nor an id; no such repository, one that needs a
            licence to be accepted, or no connection.
    """
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        return folder
    named = HUB_ID.fullmatch(source)
    # A path that is misspelled below a folder that is there is not somebody's repository.
    beside = Path(source.partition("/")[0])
    if not named or beside.is_dir():
        found = "a file" if folder.is_file() else "no such folder"
        raise CheckpointError(
            f"cannot find {source}",
            expected="a folder, or a hub id like Qwen/Qwen2-0.5B-Instruct",
            found=f"{found}, but a folder {beside}" if named else found,
            fix="check the path, or run this from another folder if a hub id is meant"
            if named
            else "check the path",
        )
    repository, revision = named["id"], named["revision"]
    try:
        return _snapshot(repository, revision, local_files_only=not fetch)
    except GatedRepoError as error:
        raise CheckpointError(
            f"cannot download {source}",
            found="a repository whose licence has to be accepted first",
            fix=f"accept it at https://huggingface.co/{repository}, "
            "then log in with: hf auth login",
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"cannot download {source}",
            found=f"no revision {revision} of {repository}",
            fix="name a branch, a tag or a commit that the repository has",
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"cannot download {source}",
            found="neither a folder here nor a public repository on the hub",
            fix="check the name; for a private repository log in with: hf auth login",
        ) from error
    except Exception as error:  # from no connection to a full disk, each of its own type
        at = f" --revision {revision}" if revision else ""
        if not fetch and isinstance(error, NOT_CACHED):
            raise CheckpointError(
                f"{source} is not on this machine",
                expected="a folder, or a repository in the hub's cache",
                found="neither, and only what you name to export or convert is downloaded",
                fix=f"download it with: hf download {repository}{at}",
            ) from error
        reason = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"cannot download {source}",
            found=f"{type(error).__name__}: {reason}",
            fix=f"download it where there is a connection, with: hf download {repository}{at} "
            "--local-dir FOLDER, and name that folder instead",
        ) from error


def _snapshot(repository: str, revision: str | None, *, local_files_only: bool) -> Path:
    """One commit of a repository, which all of its files are of."""
    commit = revision
    if not (revision and COMMIT.fullmatch(revision)):
        commit = (
            huggingface_hub.HfApi()
            .resolve_revision(repository, revision=revision, local_files_only=local_files_only)
            .resolved
        )

    def downloaded(files: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=commit,
                allow_patterns=files,
                ignore_patterns=NEVER,
                local_files_only=local_files_only,
            )
        )

    folder = downloaded(FILES)
    whole = any(folder.glob("*.safetensors"))
    return folder if whole else downloaded([*FILES, *PICKLED_FILES])


def provenance_of(folder: Path) -> str:
    """What a model's card says of a folder: its hub id and its commit; "" outside of the cache."""
    folder = folder.resolve()
    return f"{name_of(folder)} at commit {folder.name}" if _in_cache(folder) else ""


def name_of(folder: Path) -> str:
    """What to call the model in a folder: its hub id if it is in the hub's cache, else its name."""
    folder = folder.resolve()
    if _in_cache(folder):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def _in_cache(folder: Path) -> bool:
    """Whether it is models--OWNER--NAME/snapshots/COMMIT."""
    repository = folder.parent.parent.name
    return folder.parent.name == "snapshots" and repository.startswith("models--")


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        CheckpointError: no such file, or no JSON object in it.
    """
    try:
        data = json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} is incomplete",
            expected=path.name,
            found="no such file",
            fix="copy or download it again",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read {path}", expected="JSON", found=f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"cannot read {path}", expected="a JSON object", found=type(data).__name__
        )
    return data
