"""Checkpoints: what is saved comes back, and nothing broken is loaded."""

from __future__ import annotations

import hashlib
import json
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from himix_edge.config import DecoderConfig, HiMixConfig, PreprocessConfig, VisionConfig
from himix_edge.errors import CheckpointError, OutputError
from himix_edge.models import shards as models_shards
from himix_edge.models.checkpoints import (
    Checkpoint,
    checkpoint_config,
    is_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from himix_edge.models.himix import HiMix
from himix_edge.models.huggingface import decoder_from_folder, encoder_from_folder
from himix_edge.models.weights import INDEX, SINGLE_FILE
from tests.models.reference import random_ids, random_tensor, randomized
from tests.models.stock import SIZE, edit, write_decoder, write_encoder

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


@pytest.fixture
def shards(tmp_path: Path, model: HiMix, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint in many files of weights."""
    monkeypatch.setattr(models_shards, "MAX_SHARD_BYTES", 20_000)
    return save(tmp_path / "shards", model)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces (or with None removes) tensors of a checkpoint, and forgets what its files were."""
    weights = {**load_file(folder / SINGLE_FILE), **changes}
    save_file({k: v for k, v in weights.items() if v is not None}, folder / SINGLE_FILE)
    edit(folder / "config.json", files=...)


def same(loaded: HiMix, model: HiMix) -> None:
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_comes_back_as_it_was_saved(folder: Path, model: HiMix) -> None:
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.name, checkpoint.notice) == ("tiny", "knows nothing")
    assert checkpoint.config == CONFIG
    assert checkpoint.tokenizer_json == "{}"
    assert checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.model_card == "# tiny\n"
    assert checkpoint_config(folder) == CONFIG
    loaded = checkpoint.model()
    assert not loaded.training
    same(loaded, model)


def test_its_files_are_recorded(folder: Path, shards: Path) -> None:
    for place, least in ((folder, 1), (shards, 4)):
        stated = json.loads((place / "config.json").read_text())["files"]
        found = {path.name for path in place.glob("model*")}
        assert stated.keys() == found
        assert len(found) >= least
        for name, record in stated.items():
            raw = (place / name).read_bytes()
            expected = {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
            assert record == expected


def test_many_files_of_weights_are_one_model(shards: Path, model: HiMix) -> None:
    assert (shards / INDEX).is_file()
    assert not (shards / SINGLE_FILE).exists()
    for path in shards.glob("model-*.safetensors"):
        tensors = load_file(path).values()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= 20_000
    same(read_checkpoint(shards).model(), model)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def test_the_file_with_a_changed_byte_is_named(folder: Path, shards: Path) -> None:
    second = sorted(shards.glob("model-*.safetensors"))[1]
    for place, damaged in ((folder, folder / SINGLE_FILE), (shards, second)):
        flip(damaged)
        checkpoint = read_checkpoint(place)  # the weights are not looked at yet
        with pytest.raises(CheckpointError, match=r"is damaged.*sha256 .*copy that file") as error:
            checkpoint.model()
        assert error.value.failed == f"{damaged} is damaged"


def test_truncated_and_missing_shards_are_all_named(shards: Path) -> None:
    first, second, third = sorted(shards.glob("model-*.safetensors"))[:3]
    for path in (first, third):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"shards is damaged") as error:
        read_checkpoint(shards)
    assert f"copy {first.name}, {third.name} again" in str(error.value)
    second.unlink()
    (shards / INDEX).unlink()
    with pytest.raises(CheckpointError, match="is not a checkpoint") as error:
        read_checkpoint(shards)
    assert error.value.found == f"no {second.name}, no {INDEX}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_widened(tmp_path: Path, model: HiMix, dtype: torch.dtype) -> None:
    folder = save(tmp_path / "narrow", model, dtype)
    assert all(tensor.dtype == dtype for tensor in load_file(folder / SINGLE_FILE).values())
    for name, tensor in read_checkpoint(folder).model().state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].to(dtype).float()), name


def test_every_load_gives_the_same_model(folder: Path) -> None:
    one, two = read_checkpoint(folder).model(), read_checkpoint(folder).model()
    pixels, ids = torch.zeros(1, 3, 28, 28), torch.tensor([[1, 2, 3]])
    assert torch.equal(one(pixels, ids), two(pixels, ids))


def test_all_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / SINGLE_FILE).unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors, no tokenizer\.json"):
        read_checkpoint(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        read_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"name": "x"}', "\x00\xff"])
def test_bad_config(folder: Path, text: str) -> None:
    assert is_checkpoint(folder)
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert not is_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"cannot (use|read) .*config\.json"):
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


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "not recorded"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "header", "text", "pickle"])
def test_files_that_are_no_safetensors(folder: Path, damage: str, recorded: bool) -> None:
    path = folder / SINGLE_FILE
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
    if not recorded:
        edit(folder / "config.json", files={})
    saying = "is damaged" if recorded and damage != "header" else "cannot read"
    with pytest.raises(CheckpointError, match=rf"{saying}.*model\.safetensors"):
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


# checkpoints whose encoder and decoder are Hugging Face folders


class Frozen:
    """A model of stock parts, and the checkpoint folder that holds its projections alone."""

    def __init__(self, folder: Path, encoder: str, decoder: str) -> None:
        self.folder = folder / "projections"
        self.encoder, self.decoder = folder / "encoder", folder / "decoder"
        stock_encoder = write_encoder(self.encoder, encoder)
        stock_decoder = write_decoder(self.decoder, decoder)
        source = encoder_from_folder(self.encoder)
        config = HiMixConfig(
            source.vision, decoder_from_folder(self.decoder).decoder, source.preprocess
        )
        self.model = HiMix(config)
        randomized(self.model, seed=9)
        left_out = self.model.vision.model.load_state_dict(stock_encoder.state_dict(), strict=False)
        assert left_out.missing_keys == []
        self.model.decoder.load_state_dict(
            {k: v for k, v in stock_decoder.state_dict().items() if self.has(f"decoder.{k}")}
        )
        save(self.folder, self.model)
        self.strip("vision.", "decoder.")
        for name in ("tokenizer.json", "chat_template.jinja"):
            (self.folder / name).unlink()
        edit(self.folder / "config.json", encoder=str(self.encoder), decoder=str(self.decoder))

    def has(self, name: str) -> bool:
        return name in self.model.state_dict()

    def strip(self, *prefixes: str) -> None:
        names = [name for name in load_file(self.folder / SINGLE_FILE) if name.startswith(prefixes)]
        rewrite(self.folder, **dict.fromkeys(names))

    def logits(self, model: HiMix) -> torch.Tensor:
        logits: torch.Tensor = model(random_tensor(2, 3, SIZE, SIZE), random_ids(2, 5, 300))
        return logits


@pytest.fixture(params=[("CLIPVisionModel", "qwen2"), ("SiglipVisionModel", "llama3")], ids=str)
def frozen(request: pytest.FixtureRequest, tmp_path: Path) -> Frozen:
    return Frozen(tmp_path, *request.param)


@pytest.fixture
def clip_qwen2(tmp_path: Path) -> Frozen:
    return Frozen(tmp_path, "CLIPVisionModel", "qwen2")


def test_what_projections_lack_comes_from_the_folders_they_name(frozen: Frozen) -> None:
    checkpoint = read_checkpoint(frozen.folder)
    assert all(name.startswith("injection.") for name in load_file(frozen.folder / SINGLE_FILE))
    loaded = checkpoint.model()
    same(loaded, frozen.model)
    assert torch.equal(frozen.logits(loaded), frozen.logits(frozen.model))
    stock = AutoTokenizer.from_pretrained(frozen.decoder)
    ours = Tokenizer.from_str(checkpoint.tokenizer_json)
    assert ours.encode("How many? <|end|>").ids == stock("How many? <|end|>").input_ids
    assert max(ours.get_vocab().values()) < frozen.model.config.decoder.vocab_size
    assert checkpoint.chat_template == (frozen.decoder / "chat_template.jinja").read_text()
    assert checkpoint.model_card == "# tiny\n"


def test_weights_of_its_own_outweigh_those_it_names(clip_qwen2: Frozen) -> None:
    folder, model = clip_qwen2.folder, clip_qwen2.model
    randomized(model.decoder, seed=4)  # fine-tuned
    tuned = {f"decoder.{name}": tensor for name, tensor in model.decoder.state_dict().items()}
    rewrite(folder, **tuned)
    checkpoint = read_checkpoint(folder)
    same(checkpoint.model(), model)
    assert checkpoint.chat_template == (clip_qwen2.decoder / "chat_template.jinja").read_text()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("mine")
    shutil.rmtree(clip_qwen2.decoder)  # nothing of it is needed any more
    checkpoint = read_checkpoint(folder)
    same(checkpoint.model(), model)
    assert (checkpoint.tokenizer_json, checkpoint.chat_template) == ("{}", "mine")


def test_folders_may_be_named_by_the_caller(clip_qwen2: Frozen, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    edit(clip_qwen2.folder / "config.json", encoder=gone, decoder=gone)
    with pytest.raises(CheckpointError, match=f"cannot find {gone}"):
        read_checkpoint(clip_qwen2.folder)
    encoder, decoder = str(clip_qwen2.encoder), str(clip_qwen2.decoder)
    with pytest.raises(CheckpointError, match=f"cannot find {gone}"):
        read_checkpoint(clip_qwen2.folder, encoder=encoder)
    same(read_checkpoint(clip_qwen2.folder, encoder, decoder).model(), clip_qwen2.model)


def test_projections_alone_that_name_no_folders(clip_qwen2: Frozen) -> None:
    edit(clip_qwen2.folder / "config.json", encoder=None, decoder=None)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, no chat_template\.jinja"):
        read_checkpoint(clip_qwen2.folder)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (clip_qwen2.folder / name).write_text("{}")
    checkpoint = read_checkpoint(clip_qwen2.folder)
    with pytest.raises(
        CheckpointError, match=r"decoder\.model\.norm\.weight is missing; "
    ) as error:
        checkpoint.check()
    assert "vision.model.embeddings.class_embedding is missing; " in str(error.value)
    assert "injection" not in str(error.value)


def test_everything_wrong_on_both_sides_is_one_error(clip_qwen2: Frozen) -> None:
    def change(path: Path, **changes: Any) -> None:
        weights = {**load_file(path), **changes}
        kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
        save_file(kept, path, metadata={"format": "pt"})

    nan = torch.full((48,), torch.nan)
    change(clip_qwen2.decoder / SINGLE_FILE, **{"model.norm.weight": nan})
    [norm] = [k for k in load_file(clip_qwen2.encoder / SINGLE_FILE) if "pre_layrnorm.bias" in k]
    change(clip_qwen2.encoder / SINGLE_FILE, **{norm: None})
    first, second = (f"injection.layers.{i}.k_proj.weight" for i in (0, 1))
    rewrite(clip_qwen2.folder, **{first: torch.zeros(3, 4), second: None, "more": nan})
    with pytest.raises(CheckpointError, match="don't fit its config") as error:
        read_checkpoint(clip_qwen2.folder).model()
    assert error.value.found == (
        f"decoder.model.norm.weight is not finite; {first} is [3, 4], not [24, 24]; "
        f"{second} is missing; more is unknown; vision.model.pre_layrnorm.bias is missing"
    )


def test_nothing_is_read_that_is_not_asked_for(folder: Path) -> None:
    checkpoint: Checkpoint = read_checkpoint(folder)
    (folder / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read .*{SINGLE_FILE}"):
        checkpoint.weights[EMBEDDING].read()
