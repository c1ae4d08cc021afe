"""Writing weights: one file, or as many shards as it takes and their index."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from himix_edge.models.weights import INDEX, SINGLE_FILE, Weights

MAX_SHARD_BYTES = 2_000_000_000


def write_weights(
    folder: Path, weights: Weights, progress: Callable[[float], None] = lambda _: None
) -> list[str]:
    """Writes weights as Hugging Face lays them out, in the types they come in, one after another.

    No more than one shard of them is in memory.

    Args:
        folder: empty of weights.
        progress: called with the part of the weights, 0..1, that is written.

    Returns:
        what is wrong with them, in words: if anything is, not all of them are there.

    Raises:
        CheckpointError: a weight that can't be read.
        OSError: the folder can't be written.
    """
    shards: list[list[str]] = []  # the names of the tensors in each
    held: dict[str, Tensor] = {}
    problems: list[str] = []

    def flush() -> None:
        write_tensors(folder / f"shard-{len(shards)}", held, {"format": "pt"})
        shards.append(list(held))
        held.clear()

    for done, (name, weight) in enumerate(weights.items(), start=1):
        tensor = weight.read().cpu().contiguous()
        if not tensor.isfinite().all():
            problems.append(f"{name} is not finite")
        if held and sum(map(_bytes, held.values())) + _bytes(tensor) > MAX_SHARD_BYTES:
            flush()
        held[name] = tensor
        progress(done / len(weights))
    flush()
    _name_shards(folder, shards)
    return problems


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: it can't be written.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # what safetensors makes of an OSError
        found = re.search(r"os error (\d+)", str(error))
        raise OSError(int(found[1]) if found else errno.EIO, str(error)) from error


def _name_shards(folder: Path, shards: list[list[str]]) -> None:
    """Gives the shards their names, now that their number is known, and writes the index."""
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
    (folder / INDEX).write_text(index + "\n", encoding="utf-8")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
