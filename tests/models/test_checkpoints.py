"""Checkpoints: what is saved comes back, and nothing broken is loaded."""

from __future__ import annotations

import json
import pickle
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from himix_edge.config import DecoderConfig, HiMixConfig, PreprocessConfig, VisionConfig
from himix_edge.errors import CheckpointError, OutputError
from himix_edge.models.checkpoints import WEIGHTS, read_checkpoint, save_checkpoint
from himix_edge.models.himix import HiMix

CONFIG = HiMixConfig(
    VisionConfig(28, 14, 32, 64, 1, 4),
    DecoderConfig(48, 32, 64, 1, 4, 2, 8, 64),
    PreprocessConfig(28),
)
EMBEDDING = "decoder.model.embed_tokens.weight"


def save(folder: Path, model: HiMix, dtype: torch.dtype = torch.float32) -> Path:
    save_checkpoint(
        folder,
        model,
        name="tiny",
        notice="knows nothing",
        tokenizer_json="{}",
        chat_template="{{ messages }}",
        model_card="# tiny\n",
        dtype=dtype,
    )
    return folder


@pytest.fixture(scope="module")
def model() -> HiMix:
    torch.manual_seed(0)
    return HiMix(CONFIG)


@pytest.fixture
def folder(tmp_path: Path, model: HiMix) -> Path:
    return save(tmp_path / "checkpoint", model)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces (or with None removes) tensors of a checkpoint."""
    weights = {**load_file(folder / WEIGHTS), **changes}
    save_file({k: v for k, v in weights.items() if v is not None}, folder / WEIGHTS)


def test_comes_back_as_it_was_saved(folder: Path, model: HiMix) -> None:
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.name, checkpoint.notice) == ("tiny", "knows nothing")
    assert checkpoint.config == CONFIG
    assert checkpoint.tokenizer.read_text() == "{}"
    assert checkpoint.chat_template.read_text() == "{{ messages }}"
    assert checkpoint.model_card.read_text() == "# tiny\n"
    loaded = checkpoint.model()
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_widened(tmp_path: Path, model: HiMix, dtype: torch.dtype) -> None:
    folder = save(tmp_path / "narrow", model, dtype)
    assert all(tensor.dtype == dtype for tensor in load_file(folder / WEIGHTS).values())
    for name, tensor in read_checkpoint(folder).model().state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].to(dtype).float()), name


def test_every_load_gives_the_same_model(folder: Path) -> None:
    one, two = read_checkpoint(folder).model(), read_checkpoint(folder).model()
    pixels, ids = torch.zeros(1, 3, 28, 28), torch.tensor([[1, 2, 3]])
    assert torch.equal(one(pixels, ids), two(pixels, ids))


def test_all_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors, no tokenizer\.json"):
        read_checkpoint(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        read_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"name": "x"}', "\x00\xff"])
def test_bad_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"cannot use .*config\.json"):
        read_checkpoint(folder)


def test_unknown_config_key_names_the_closest(folder: Path) -> None:
    header = json.loads((folder / "config.json").read_text())
    header["config"]["decoder"]["rope_thetta"] = 1.0
    (folder / "config.json").write_text(json.dumps(header))
    with pytest.raises(CheckpointError, match=r"rope_thetta.*rope_theta"):
        read_checkpoint(folder)


def test_all_misfits_are_named_at_once(folder: Path) -> None:
    infinite = torch.zeros(48, 32)
    infinite[3, 4] = torch.inf
    rewrite(
        folder,
        **{
            EMBEDDING: infinite,
            "decoder.model.norm.weight": None,
            "injection.layers.0.k_proj.weight": torch.zeros(16, 31),
            "injection.layers.0.v_proj.weight": torch.zeros(16, 32, dtype=torch.int32),
            "stranger": torch.zeros(1),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder).model()
    assert caught.value.found == (
        f"{EMBEDDING} is not finite; decoder.model.norm.weight is missing; "
        "injection.layers.0.k_proj.weight is [16, 31], not [16, 32]; "
        "injection.layers.0.v_proj.weight is torch.int32, not floating point; stranger is unknown"
    )


@pytest.mark.parametrize("damage", ["empty", "truncated", "header", "text", "pickle"])
def test_files_that_are_no_safetensors(folder: Path, damage: str) -> None:
    path = folder / WEIGHTS
    whole = path.read_bytes()
    pickled = pickle.dumps({EMBEDDING: [0.0]})
    path.write_bytes(
        {
            "empty": b"",
            "truncated": whole[:-1],
            "header": b"\xff" * 8 + whole[8:],
            "text": b"weights",
            "pickle": pickled,
        }[damage]
    )
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        read_checkpoint(folder).model()


def test_weights_that_overflow_are_not_saved(tmp_path: Path) -> None:
    model = HiMix(CONFIG)
    with torch.no_grad():
        model.decoder.model.norm.weight.fill_(1e5)  # past fp16's 65504
    with pytest.raises(CheckpointError, match=r"decoder\.model\.norm\.weight is not finite"):
        save(tmp_path / "narrow", model, torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, model: HiMix) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # less than the weights
    try:
        with pytest.raises(OutputError, match=r"cannot write .*File too large"):
            save(tmp_path / "checkpoint", model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_an_older_checkpoint_is_replaced_and_no_other_folder(tmp_path: Path, model: HiMix) -> None:
    folder = save(tmp_path / "checkpoint", model)
    save(folder, model)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"a")
    with pytest.raises(OutputError, match="another folder"):
        save(photos, model)
    assert (photos / "a.png").read_bytes() == b"a"
    with pytest.raises(OutputError, match="found a file"):
        save(photos / "a.png", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "photos"]
