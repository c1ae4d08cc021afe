"""Weights by name, each read when it is asked for: a model never has to be in memory whole."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from himix_edge.errors import CheckpointError
from himix_edge.models.checkpoint_files import plain_name, read_bytes

SINGLE_FILE = "model.safetensors"
SHARDS = "model-*-of-*.safetensors"
INDEX = "model.safetensors.index.json"  # as Hugging Face names it: {"weight_map": {tensor: shard}}
PICKLED_FILE, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class Weight(Protocol):
    """One tensor that is not read yet."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> Tensor:
        """The tensor, in the type it is stored in.

        Raises:
            CheckpointError: it can't be read, or is not floating point.
        """
        ...

    def problem(self) -> str | None:
        """What is wrong with its values, in words; reads it."""
        ...


Weights: TypeAlias = Mapping[str, Weight]
TensorsOf: TypeAlias = Callable[[Path], Iterator[tuple[str, "StoredWeight"]]]


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of a safetensors file."""

    path: Path
    key: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        tensor = self._stored()
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{self.key} in {self.path} can't be used",
                expected="floating point",
                found=str(tensor.dtype),
            )
        return tensor

    def problem(self) -> str | None:
        try:
            tensor = self._stored()
        except CheckpointError as error:
            return f"can't be read: {error.found}"
        if not tensor.is_floating_point():
            return f"is {tensor.dtype}, not floating point"
        return None if bool(tensor.isfinite().all()) else "is not finite"

    def _stored(self) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(self.key)
                return tensor
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.path, error) from error


@dataclass(frozen=True)
class PickledWeight(StoredWeight):
    """A tensor of a file of `torch.save`, mapped anew at each reading and let go after it."""

    def _stored(self) -> Tensor:
        tensors = unpickled(self.path)
        if self.key not in tensors:
            raise _not_tensors_alone(self.path, f"no {self.key}: it was changed meanwhile")
        return tensors[self.key].clone()


@dataclass(frozen=True)
class HeldWeight:
    """A tensor that is in memory anyway."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self) -> Tensor:
        return self.tensor

    def problem(self) -> str | None:
        return None if bool(self.tensor.isfinite().all()) else "is not finite"


@dataclass(frozen=True)
class RowOf:
    """One row of a matrix, as a vector."""

    matrix: Weight
    row: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape[1:]

    def read(self) -> Tensor:
        return self.matrix.read()[self.row].clone()

    def problem(self) -> str | None:
        return self.matrix.problem()


@dataclass(frozen=True)
class StackedWeight:
    """Several weights as one, along their first dimension."""

    parts: tuple[Weight, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def read(self) -> Tensor:
        return torch.cat([part.read() for part in self.parts])

    def problem(self) -> str | None:
        return next((found for part in self.parts if (found := part.problem())), None)


@dataclass(frozen=True)
class RowWeight:
    """A matrix [R, C] with one row replaced by a vector [C].

    Attributes:
        row: its number, below R.
    """

    matrix: Weight
    row: int
    vector: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    def read(self) -> Tensor:
        tensor = self.matrix.read().clone()
        tensor[self.row] = self.vector.read()
        return tensor

    def problem(self) -> str | None:
        if self.vector.shape != self.shape[1:]:
            return f"has rows of {list(self.shape[1:])}, not {list(self.vector.shape)}"
        return self.matrix.problem() or self.vector.problem()


@dataclass(frozen=True)
class ZeroWeight:
    """A bias that a model has none of."""

    shape: tuple[int, ...]

    def read(self) -> Tensor:
        return torch.zeros(self.shape)

    def problem(self) -> None:
        """Never any."""


@dataclass(frozen=True)
class RandomWeight:
    """A tensor drawn from its name and a seed: the same whenever it is read, on any machine.

    Matrices keep the scale of what runs through them, norms are one, biases are small: the
    numbers in the model stay of order one, whatever its depth.
    """

    name: str
    shape: tuple[int, ...]
    seed: int = 0

    def read(self) -> Tensor:
        if len(self.shape) == 1 and self.name.endswith("weight"):
            return torch.ones(self.shape)
        digest = hashlib.sha256(f"{self.seed} {self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        fan_in = math.prod(self.shape[1:]) if len(self.shape) > 1 else 2500  # biases: 0.02
        return torch.randn(self.shape, generator=generator).mul_(fan_in**-0.5)

    def problem(self) -> None:
        """Never any."""


def random_weights(expected: Mapping[str, Tensor], seed: int = 0) -> dict[str, Weight]:
    """Random weights for a model whose `state_dict` is given; meta tensors will do."""
    return {
        name: RandomWeight(name, tuple(tensor.shape), seed) for name, tensor in expected.items()
    }


def held_weights(model: nn.Module) -> dict[str, Weight]:
    """The weights of a model in memory."""
    return {name: HeldWeight(tensor) for name, tensor in model.state_dict().items()}


def stored_weights(folder: Path) -> dict[str, StoredWeight]:
    """All tensors of a folder with one `model.safetensors`, or with an index and its shards.

    One file outweighs an index, as in transformers, whose `save_pretrained` leaves an old index be.
    Where there is no safetensors file, the same of `pytorch_model.bin`.

    Raises:
        CheckpointError: none there, shards that are missing (all of them), or a corrupt file.
    """
    for single, index, tensors_of in (
        (SINGLE_FILE, INDEX, _tensors_of),
        (PICKLED_FILE, PICKLED_INDEX, _pickled_tensors_of),
    ):
        if (folder / single).is_file():
            return dict(tensors_of(folder / single))
        if (folder / index).is_file():
            return _sharded(folder, index, tensors_of)
    other = sorted(path.name for path in folder.glob("*.bin"))
    raise CheckpointError(
        f"{folder} has no weights",
        expected=f"{SINGLE_FILE}, or {INDEX} and its shards",
        found=", ".join(other) or "neither",
        fix="save it again with save_pretrained(folder)",
    )


def _sharded(folder: Path, index: str, tensors_of: TensorsOf) -> dict[str, StoredWeight]:
    try:
        shards: dict[str, str] = json.loads(read_bytes(folder / index))["weight_map"]
        paths = sorted({folder / plain_name(folder / index, name) for name in shards.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read {folder / index}", expected='{"weight_map": ...}', found=repr(error)
        ) from error
    if missing := [path.name for path in paths if not path.is_file()]:
        raise CheckpointError(
            f"{folder} is incomplete",
            expected=f"{len(paths)} files of weights",
            found=f"no {', no '.join(missing)}",
            fix="copy or download those again; the others may stay",
        )
    found = {name: weight for path in paths for name, weight in tensors_of(path)}
    if lost := sorted(shards.keys() - found.keys()):
        raise CheckpointError(
            f"{folder / index} is not that of its shards", found=f"no {', no '.join(lost)} in them"
        )
    return found


def _tensors_of(path: Path) -> Iterator[tuple[str, StoredWeight]]:
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                yield key, StoredWeight(path, key, tuple(file.get_slice(key).get_shape()))
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _pickled_tensors_of(path: Path) -> Iterator[tuple[str, StoredWeight]]:
    for key, tensor in unpickled(path).items():
        yield key, PickledWeight(path, key, tuple(tensor.shape))


def unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`, on disk until they are looked at.

    Raises:
        CheckpointError: anything but plain tensors by name: code of any kind, a file from before
            torch 1.6, one that is damaged.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise _not_tensors_alone(path, "objects that are no tensors, which are not read") from error
    except Exception as error:  # torch raises what its parts raise
        reason = next(iter(str(error).splitlines()), "")
        raise _not_tensors_alone(path, f"{type(error).__name__}: {reason}") from error
    if not isinstance(found, dict):
        raise _not_tensors_alone(path, type(found).__name__)
    for key, value in found.items():
        plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        if not isinstance(key, str) or not plain or value.is_quantized:
            raise _not_tensors_alone(path, f"{type(value).__name__} under {key!r:.40}")
    return {key: value.detach() for key, value in found.items()}


def _not_tensors_alone(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"cannot read {path}",
        expected="tensors by name, and nothing else, as torch.save writes them",
        found=found,
        fix="copy it again, if it came from elsewhere; or save it as safetensors, where it was "
        "made, with save_pretrained(folder)",
    )


def renamed(weights: Mapping[str, StoredWeight], old: str, new: str) -> dict[str, StoredWeight]:
    """Those whose name begins with `old`, under names that begin with `new` instead."""
    return {
        new + name.removeprefix(old): weight
        for name, weight in weights.items()
        if name.startswith(old)
    }


def misfits(expected: Mapping[str, Tensor], found: Weights) -> Iterator[str]:
    """Every way in which the weights found are not the ones expected, in words.

    Reads them all, one at a time.

    Args:
        expected: a model's `state_dict`; meta tensors will do.
    """
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing"
        elif name not in expected:
            yield f"{name} is unknown"
        elif (shape := found[name].shape) != tuple(expected[name].shape):
            yield f"{name} is {list(shape)}, not {list(expected[name].shape)}"
        elif problem := found[name].problem():
            yield f"{name} {problem}"


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot read {path}",
        expected="a whole safetensors file",
        found=str(error),
        fix="copy that file again; the others may stay",
    )
