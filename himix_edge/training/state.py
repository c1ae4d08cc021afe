"""What a long run leaves on disk to go on from: tensors, notes, and whose they are."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from himix_edge.errors import TrainingError
from himix_edge.files import whole_file
from himix_edge.models.shards import write_tensors
from himix_edge.remedies import output_error

NAMED_DIFFERENCES = 3


def save_state(
    path: Path, run: Mapping[str, Any], tensors: Mapping[str, Tensor], notes: Mapping[str, Any]
) -> None:
    """Writes a state; the one before it stays until the new one is whole.

    Args:
        run: all that decides the run, as plain data.
        notes: how far it has come, as plain data.

    Raises:
        OutputError: it can't be written.
    """
    with whole_file(path) as temporary:
        metadata = {"run": json.dumps(run), "notes": json.dumps(notes)}
        metadata["sha256"] = _digest(metadata, sorted(tensors.items()))
        write_tensors(temporary, dict(tensors), metadata)


def load_state(
    path: Path, run: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any] | None:
    """Fills the tensors from a state, and returns its notes; None where there is none.

    A state that was cut or changed on the disk is moved aside, with a warning, and counts as none.

    Raises:
        TrainingError: it is another run's, or no state.
        OutputError: it can't be moved aside.
    """
    if not path.exists():
        return None
    remedy = f"delete {path} to begin anew, or choose another folder"
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            metadata = dict(file.metadata() or {})
            if not {"run", "notes"} <= metadata.keys():
                raise TrainingError(f"{path} is no state of a run", fix="choose another folder")
            sealed = metadata.pop("sha256", None)  # version 0.1 wrote none
            read = ((name, file.get_tensor(name)) for name in names)
            if sealed and sealed != _digest(metadata, read):
                _set_aside(path, "its content has changed")
                return None
            expected, found = facts(run), facts(json.loads(metadata["run"]))
            if expected == found:
                expected = {f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()}
                found = {f"{name} {file.get_slice(name).get_shape()}" for name in names}
            if expected != found:
                raise TrainingError(
                    f"{path} is the state of another run",
                    expected=_some(expected - found),
                    found=_some(found - expected),
                    fix=remedy,
                )
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(file.get_tensor(name))
    except (SafetensorError, ValueError) as error:
        _set_aside(path, str(error))
        return None
    notes: dict[str, Any] = json.loads(metadata["notes"])
    return notes


def damaged(name: str) -> str:
    """The name that a damaged file is moved to: nothing of it is lost."""
    return f"{name}.damaged"


def _set_aside(path: Path, reason: str) -> None:
    aside = path.with_name(damaged(path.name))
    try:
        path.replace(aside)
    except OSError as error:
        raise output_error(f"cannot move the damaged {path} aside", error) from error
    print(
        f"Warning: {path} is damaged ({reason}). It is now {aside.name}; its phase begins anew.",
        file=sys.stderr,
    )


def _digest(metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The sha256 of a state's notes and tensors, which come sorted by name."""
    digest = hashlib.sha256(json.dumps(dict(sorted(metadata.items()))).encode())
    for name, tensor in tensors:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def facts(run: Mapping[str, Any], where: str = "") -> set[str]:
    """All that decides a run, one fact each: "seed 0", "config.decoder.hidden_size 192"."""
    found: set[str] = set()
    for key, value in run.items():
        if isinstance(value, Mapping):
            found |= facts(value, f"{where}{key}.")
        else:
            found.add(f"{where}{key} {json.dumps(value)}")
    return found


def _some(differences: set[str]) -> str:
    """The first few, and how many more there are."""
    named = sorted(differences)[:NAMED_DIFFERENCES]
    more = len(differences) - len(named)
    return ", ".join([*named, *([f"and {more} more"] if more else [])]) or "nothing more"
