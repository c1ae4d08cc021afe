"""Weights: where they are found, when they are read, and everything that may be wrong with them."""

from __future__ import annotations

import gc
import json
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from himix_edge.errors import CheckpointError
from himix_edge.models.himix import HiMix, hollow_model, model_from_weights
from himix_edge.models.weights import (
    INDEX,
    PICKLED_FILE,
    PICKLED_INDEX,
    SINGLE_FILE,
    HeldWeight,
    RandomWeight,
    RowOf,
    RowWeight,
    StackedWeight,
    Weight,
    ZeroWeight,
    held_weights,
    misfits,
    random_weights,
    renamed,
    stored_weights,
)
from tests.models.reference import random_tensor
from tests.tiny import tiny_config

TENSORS = {
    "a.weight": random_tensor(3, 4),
    "a.bias": random_tensor(3, seed=1).half(),
    "b.weight": random_tensor(2, 3, 4, seed=2).bfloat16(),
}
SHARD = "model-0000{}-of-00003.safetensors"


def write_shards(folder: Path) -> dict[str, str]:
    """A shard for each tensor, and the index, whose map is returned."""
    places = {name: SHARD.format(i) for i, name in enumerate(TENSORS, start=1)}
    for name, shard in places.items():
        save_file({name: TENSORS[name]}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


@pytest.fixture(params=["one file", "shards"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "shards":
        write_shards(tmp_path)
    else:
        save_file(TENSORS, tmp_path / SINGLE_FILE)
    return tmp_path


# stored


def test_all_tensors_are_found_by_name(folder: Path) -> None:
    found = stored_weights(folder)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].shape == tuple(tensor.shape)
        read = found[name].read()
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        assert found[name].problem() is None


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    found = stored_weights(tmp_path)
    others = {name: tensor + 1 for name, tensor in TENSORS.items()}
    save_file(others, tmp_path / SINGLE_FILE)
    assert torch.equal(found["a.weight"].read(), others["a.weight"])
    (tmp_path / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read .*{SINGLE_FILE}.*copy that file"):
        found["a.weight"].read()


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    for i in (1, 3):
        (tmp_path / SHARD.format(i)).unlink()
    with pytest.raises(
        CheckpointError, match="is incomplete: expected 3 files of weights"
    ) as error:
        stored_weights(tmp_path)
    assert error.value.found == f"no {SHARD.format(1)}, no {SHARD.format(3)}"


def test_an_index_of_other_shards(tmp_path: Path) -> None:
    places = write_shards(tmp_path)
    more = {**places, "c.weight": SHARD.format(1), "d.weight": SHARD.format(2)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": more}))
    with pytest.raises(CheckpointError, match="is not that of its shards") as error:
        stored_weights(tmp_path)
    assert error.value.found == "no c.weight, no d.weight in them"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": []}', "\x00\xff", "[" * 100_000],
)  # fmt: skip
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=rf"cannot read .*{INDEX}.*weight_map"):
        stored_weights(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "C:x", "a\0",
     3, None, ["x"], {}],
)  # fmt: skip
@pytest.mark.parametrize("index", [INDEX, PICKLED_INDEX])
def test_shards_are_named_within_the_folder(tmp_path: Path, name: Any, index: str) -> None:
    save_file(TENSORS, tmp_path / "elsewhere.safetensors")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    save_file(TENSORS, folder / "sub" / "x.safetensors")
    (folder / index).write_text(json.dumps({"weight_map": {"a.weight": name}}))
    with pytest.raises(CheckpointError, match=f"cannot use .*{index}: expected names of files in"):
        stored_weights(folder)


def test_shards_may_be_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "0123"
    folder.mkdir(parents=True)
    write_shards(folder)
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(tmp_path / "blobs" / str(i))
        path.symlink_to(Path("../../blobs") / str(i))
    assert stored_weights(folder).keys() == TENSORS.keys()


def test_one_file_outweighs_an_index_that_an_older_save_left(tmp_path: Path) -> None:
    """What a second, smaller `save_pretrained` into one folder leaves: no shards, their index."""
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"old": SHARD.format(1)}}))
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    assert stored_weights(tmp_path).keys() == TENSORS.keys()


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no weights: expected model\.safetensors.*neither"
    ):
        stored_weights(tmp_path)
    (tmp_path / "other.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"neither|found other\.bin"):
        stored_weights(tmp_path)


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """The same tensors as torch.save writes them."""
    torch.save(TENSORS, tmp_path / PICKLED_FILE)
    return tmp_path


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight.read() for name, weight in stored_weights(folder).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def test_pickled_tensors_are_read(pickled: Path) -> None:
    assert_same(read(pickled), TENSORS)
    weights = stored_weights(pickled)
    assert {name: weight.shape for name, weight in weights.items()} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }


def test_pickled_shards_are_read(tmp_path: Path) -> None:
    names = list(TENSORS)
    shards = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for shard in set(shards.values()):
        own = {name: TENSORS[name] for name in names if shards[name] == shard}
        torch.save(own, tmp_path / shard)
    (tmp_path / PICKLED_INDEX).write_text(json.dumps({"weight_map": shards}))
    assert_same(read(tmp_path), TENSORS)
    (tmp_path / shards[names[0]]).unlink()
    with pytest.raises(CheckpointError, match=f"incomplete.*no {shards[names[0]]}"):
        stored_weights(tmp_path)


def test_safetensors_are_preferred(pickled: Path) -> None:
    (pickled / PICKLED_FILE).write_bytes(b"nobody looks at this")
    save_file(TENSORS, pickled / SINGLE_FILE)
    assert_same(read(pickled), TENSORS)


class Malicious:
    """Runs code when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_a_pickle_with_code_runs_none(tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / PICKLED_FILE
    torch.save({"x": torch.ones(2), "y": Malicious(mark)}, path)
    with pytest.raises(CheckpointError, match=r"cannot read .*objects that are no tensors.*safet"):
        stored_weights(tmp_path)
    path.write_bytes(pickle.dumps(Malicious(mark)))
    with pytest.raises(CheckpointError, match=r"cannot read .*pytorch_model\.bin.*safetensors"):
        stored_weights(tmp_path)
    assert not mark.exists()
    torch.save({"y": Malicious(mark)}, path)
    torch.load(path, weights_only=False)  # what the mark is for
    assert mark.exists()


def odd_files() -> dict[str, Callable[[Path], object]]:
    old: dict[str, Any] = {"_use_new_zipfile_serialization": False}
    return {
        "old": lambda path: torch.save(TENSORS, path, **old),
        "empty": lambda path: path.write_bytes(b""),
        "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
        "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
        "cut early": lambda path: path.write_bytes(path.read_bytes()[:60]),
        "a list": lambda path: torch.save([torch.ones(2)], path),
        "nested": lambda path: torch.save({"state_dict": TENSORS}, path),
        "a number": lambda path: torch.save({"x": 3}, path),
        "no names": lambda path: torch.save({3: torch.ones(2)}, path),
        "sparse": lambda path: torch.save({"x": torch.eye(3).to_sparse()}, path),
        "meta": lambda path: torch.save({"x": torch.ones(3, device="meta")}, path),
        "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "x").touch()),
    }


@pytest.mark.parametrize("kind", odd_files())
def test_what_torch_refuses_is_one_line(pickled: Path, kind: str) -> None:
    odd_files()[kind](pickled / PICKLED_FILE)
    with pytest.raises(CheckpointError) as error:
        stored_weights(pickled)
    line = str(error.value)
    assert "\n" not in line
    assert "weights_only" not in line  # torch's own advice is to trust the file
    assert "save_pretrained(folder)" in line


def test_only_one_pickled_tensor_is_held(tmp_path: Path) -> None:
    """Two of 64 MB, one after the other: the mapping goes with what was read from it."""
    torch.save({name: torch.ones(16 << 20) for name in "ab"}, tmp_path / PICKLED_FILE)
    weights = stored_weights(tmp_path)
    before = resident()
    for name in "abab":
        assert weights[name].read().shape == (16 << 20,)
    assert resident() - before < 32 << 20


def resident() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * int(resource.getpagesize())


def test_one_row_of_a_matrix() -> None:
    matrix = random_tensor(4, 3)
    row = RowOf(HeldWeight(matrix), 2)
    assert row.shape == (3,)
    assert torch.equal(row.read(), matrix[2])
    assert row.problem() is None
    matrix[1, 1] = torch.nan
    assert row.problem() == "is not finite"


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"cannot read .*{path.name}"):
        stored_weights(folder)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int32)}, tmp_path / SINGLE_FILE)
    weight = stored_weights(tmp_path)["a"]
    with pytest.raises(CheckpointError, match=r"a in .*floating point, found torch\.int32"):
        weight.read()
    problem = weight.problem()
    assert problem is not None
    assert "torch.int32" in problem


def test_renamed_takes_those_of_the_prefix(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    found = renamed(stored_weights(tmp_path), "a.", "decoder.")
    assert found.keys() == {"decoder.weight", "decoder.bias"}
    assert torch.equal(found["decoder.weight"].read(), TENSORS["a.weight"])


# random


GOLDEN = [-0.2055286, -0.0727911, -0.0106732]  # of seed 0, the name "a.weight" and [64, 32]


def test_random_weights_are_the_same_whenever_and_wherever_they_are_read() -> None:
    weight = RandomWeight("a.weight", (64, 32))
    first = weight.read()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(weight.read(), first)
    assert torch.equal(RandomWeight("a.weight", (64, 32)).read(), first)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers are used up
    expected = torch.tensor(GOLDEN)
    torch.testing.assert_close(first.flatten()[:3], expected, rtol=0, atol=1e-6)


def test_random_weights_differ_by_name_and_seed() -> None:
    tensors = [
        RandomWeight(name, (64, 32), seed).read()
        for name, seed in (("a.weight", 0), ("b.weight", 0), ("a.weight", 1))
    ]
    for i, one in enumerate(tensors):
        for other in tensors[:i]:
            correlation = torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]
            assert correlation.abs() < 0.1


@pytest.mark.parametrize(
    ("name", "shape", "deviation"),
    [
        ("q_proj.weight", (300, 100), 0.1),
        ("patch_embedding.weight", (64, 4, 5, 5), 0.1),
        ("embed_tokens.weight", (500, 400), 0.05),
        ("q_proj.bias", (5000,), 0.02),
        ("class_embedding", (5000,), 0.02),
    ],
)
def test_random_matrices_keep_the_scale_of_what_runs_through_them(
    name: str, shape: tuple[int, ...], deviation: float
) -> None:
    drawn = RandomWeight(name, shape).read()
    assert drawn.shape == shape
    assert drawn.dtype == torch.float32
    assert drawn.std().item() == pytest.approx(deviation, rel=0.05)
    assert abs(drawn.mean().item()) < 0.1 * deviation


def test_random_norms_are_one() -> None:
    assert torch.equal(RandomWeight("layers.0.norm.weight", (7,)).read(), torch.ones(7))


def test_a_deep_random_model_keeps_its_numbers_of_order_one() -> None:
    config = tiny_config(num_hidden_layers=24, attention_bias=True)
    model = model_from_weights(config, random_weights(hollow_model(config).state_dict()))
    pixels, ids = random_tensor(1, 3, 28, 28), torch.arange(8)[None]
    features, logits = model.vision(pixels), model(pixels, ids)
    for numbers in (features, logits, *model.encode(pixels)[-1]):
        assert 0.1 < numbers.std() < 10


def test_random_weights_of_a_model_without_memory() -> None:
    with torch.device("meta"):
        expected = HiMix(tiny_config()).state_dict()
    weights = random_weights(expected, seed=3)
    assert list(misfits(expected, weights)) == []
    norm = weights["decoder.model.norm.weight"]
    assert torch.equal(norm.read(), torch.ones(32))
    name = "injection.layers.1.k_proj.weight"
    assert torch.equal(weights[name].read(), RandomWeight(name, (32, 32), 3).read())


# held, stacked


def test_held_weights_are_the_model_s_own_memory() -> None:
    model = nn.Linear(3, 2)
    held = held_weights(model)
    assert held.keys() == {"weight", "bias"}
    assert held["weight"].shape == (2, 3)
    assert held["weight"].read().data_ptr() == model.weight.data_ptr()
    assert held["weight"].problem() is None
    assert HeldWeight(torch.tensor([1.0, torch.nan])).problem() == "is not finite"


def test_stacked_weights_stand_below_each_other() -> None:
    parts = [random_tensor(2, 4), random_tensor(3, 4, seed=1)]
    stacked = StackedWeight(tuple(HeldWeight(part) for part in parts))
    assert stacked.shape == (5, 4)
    assert torch.equal(stacked.read()[:2], parts[0])
    assert torch.equal(stacked.read()[2:], parts[1])
    assert stacked.problem() is None
    parts[1][0, 0] = torch.inf
    assert stacked.problem() == "is not finite"


# what is wrong


def test_misfits_are_all_named(tmp_path: Path) -> None:
    expected = {name: torch.empty(2, 3, device="meta") for name in "abcdefg"}
    nan, infinite = torch.zeros(2, 3), torch.zeros(2, 3)
    nan[1, 2], infinite[0, 0] = torch.nan, -torch.inf
    tensors: dict[str, Tensor] = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros(3, 2),
        "c": torch.zeros(2, 3, dtype=torch.int8),
        "d": nan.half(),
        "e": infinite.bfloat16(),
        "g": torch.zeros(6),
        "z": torch.zeros(1),
    }
    save_file(tensors, tmp_path / SINGLE_FILE)
    found = list(misfits(expected, stored_weights(tmp_path)))
    assert found == [
        "b is [3, 2], not [2, 3]",
        "c is torch.int8, not floating point",
        "d is not finite",
        "e is not finite",
        "f is missing",
        "g is [6], not [2, 3]",
        "z is unknown",
    ]


def test_no_misfits() -> None:
    weights: dict[str, Weight] = {"a": HeldWeight(torch.zeros(2, 3))}
    assert list(misfits({"a": torch.empty(2, 3, device="meta")}, weights)) == []


# made of others


def test_a_row_of_a_matrix_is_replaced() -> None:
    matrix, vector = random_tensor(3, 4), random_tensor(4, seed=1).half()
    weight = RowWeight(HeldWeight(matrix), 1, HeldWeight(vector))
    assert weight.shape == (3, 4)
    assert torch.equal(weight.read(), torch.stack((matrix[0], vector.float(), matrix[2])))
    assert torch.equal(matrix, random_tensor(3, 4))  # as it was
    assert weight.problem() is None
    assert RowWeight(HeldWeight(matrix), 1, HeldWeight(vector[:3])).problem() == (
        "has rows of [4], not [3]"
    )
    vector[0] = torch.inf
    assert weight.problem() == "is not finite"


def test_a_bias_of_zeros() -> None:
    weight = ZeroWeight((5,))
    assert weight.shape == (5,)
    assert torch.equal(weight.read(), torch.zeros(5))
