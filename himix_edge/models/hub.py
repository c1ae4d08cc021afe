"""From what a user calls a model, a folder or a hub id, to a folder here and its JSON files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from himix_edge.errors import CheckpointError

CONFIG = "config.json"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name
# Of the repository's top folder, what is read here; pickled weights where there are no others.
FILES = [
    "*.json", "*.jinja", "README.md", "LICENSE*", "model.safetensors", "model-*.safetensors",
    "tokenizer.model", "merges.txt",
]  # fmt: skip
PICKLED_FILES = ["pytorch_model.bin", "pytorch_model-*.bin"]


def folder_from_source(source: str) -> Path:
    """The folder itself, or else the hub's repository of that id, downloaded where it is not yet.

    Downloads go to the cache of `huggingface_hub`, which shows its own progress on a terminal.

    Args:
        source: a local folder, or an id such as "Qwen/Qwen2-0.5B-Instruct".

    Raises:
        CheckpointError: neither a folder nor an id; no such repository, one that needs a
            licence to be accepted, or no connection.
    """
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"cannot find {source}",
            expected="a folder, or a hub id like Qwen/Qwen2-0.5B-Instruct",
            found="a file" if folder.is_file() else "no such folder",
            fix="check the path",
        )
    try:
        folder = _downloaded(source, FILES)
        whole = any(folder.glob("*.safetensors"))
        return folder if whole else _downloaded(source, [*FILES, *PICKLED_FILES])
    except GatedRepoError as error:
        raise CheckpointError(
            f"cannot download {source}",
            found="a repository whose licence has to be accepted first",
            fix=f"accept it at https://huggingface.co/{source}, then log in with: hf auth login",
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"cannot download {source}",
            found="neither a folder here nor a public repository on the hub",
            fix="check the name; for a private repository log in with: hf auth login",
        ) from error
    except Exception as error:  # from no connection to a full disk, each of its own type
        reason = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            f"cannot download {source}",
            found=f"{type(error).__name__}: {reason}",
            fix=f"download it where there is a connection, with: hf download {source} "
            "--local-dir FOLDER, and name that folder instead",
        ) from error


def _downloaded(source: str, files: list[str]) -> Path:
    return Path(
        huggingface_hub.snapshot_download(source, allow_patterns=files, ignore_patterns=["*/*"])
    )


def name_of(folder: Path) -> str:
    """What to call the model in a folder: its hub id if it is in the hub's cache, else its name."""
    folder = folder.resolve()
    repository = folder.parent.parent.name  # models--OWNER--NAME/snapshots/COMMIT
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        CheckpointError: no such file, or no JSON object in it.
    """
    try:
        data = json.loads(path.read_bytes())
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
