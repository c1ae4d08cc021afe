"""What a long run leaves on disk to go on from: tensors, notes, and whose they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from himix_edge.errors import TrainingError
from himix_edge.files import whole_file
from himix_edge.models.shards import write_tensors

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
        write_tensors(temporary, dict(tensors), metadata)


def load_state(path: Path, run: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fills the tensors from a state, one after another, and returns its notes.

    Raises:
        TrainingError: it is another run's, or corrupt.
    """
    remedy = f"delete {path} to begin anew, or choose another folder"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            expected, found = facts(run), facts(json.loads(metadata["run"]))
            if expected != found:
                raise TrainingError(
                    f"{path} is the state of another run",
                    expected=_some(expected - found),
                    found=_some(found - expected),
                    fix=remedy,
                )
            notes: dict[str, Any] = json.loads(metadata["notes"])
            for name, tensor in tensors.items():
                stored = file.get_tensor(name)
                if stored.shape != tensor.shape:
                    raise ValueError(f"{name} is {list(stored.shape)}, not {list(tensor.shape)}")
                with torch.no_grad():
                    tensor.copy_(stored)
    except (SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(f"{path} is corrupt", found=str(error), fix=remedy) from error
    return notes


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
