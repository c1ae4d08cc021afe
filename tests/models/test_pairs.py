"""From names to a checkpoint: what is found, and what is said when it is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from himix_edge.config import HiMixConfig
from himix_edge.errors import CheckpointError, ConfigError, HimixError
from himix_edge.models.checkpoints import Checkpoint, read_checkpoint, save_checkpoint
from himix_edge.models.himix import HiMix
from himix_edge.models.pairs import (
    Pair,
    checkpoint_of_pair,
    chosen_checkpoint,
    random_pair,
    random_parts,
)
from himix_edge.models.standin import NOTICE
from himix_edge.models.weights import RandomWeight
from himix_edge.presets import DECODERS, ENCODERS
from himix_edge.trained import remember_checkpoint
from tests import tiny
from tests.models.reference import randomized
from tests.models.stock import DECODER, SIZE, VISION


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was trained on this machine, and there is no connection."""
    monkeypatch.setenv("HIMIX_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def pair(clip: Path, qwen2: Path) -> Pair:
    return Pair(str(clip), str(qwen2))


def save(folder: Path, config: HiMixConfig, seed: int = 0) -> HiMix:
    """A whole checkpoint of random weights."""
    model = HiMix(config)
    randomized(model, seed)
    save_checkpoint(
        folder,
        model,
        name=folder.name,
        notice="",
        tokenizer_json=tiny.tiny_tokenizer().to_str(),
        chat_template=tiny.CHAT_TEMPLATE,
        model_card="#\n",
    )
    return model


# configs


def test_presets_make_a_pair() -> None:
    pair = Pair("siglip-so400m-384", "qwen2-0.5b")
    assert pair.name == "siglip-so400m-384-qwen2-0.5b"
    config = pair.config()
    assert config.vision == ENCODERS["siglip-so400m-384"].vision
    assert config.preprocess == ENCODERS["siglip-so400m-384"].preprocess
    assert config.decoder == DECODERS["qwen2-0.5b"].decoder
    assert config.design == "himix"


def test_folders_make_a_pair(pair: Pair) -> None:
    assert pair.name == "clip-qwen2"
    config = pair.config()
    vision, decoder = config.vision, config.decoder
    assert {name: getattr(vision, name) for name in VISION} == VISION
    assert (vision.model_type, vision.feature_layer) == ("clip", -2)
    assert config.preprocess.image_size == SIZE
    assert (decoder.hidden_size, decoder.attention_bias) == (DECODER["hidden_size"], True)


def test_a_preset_and_a_folder_make_a_pair(clip: Path) -> None:
    config = Pair(str(clip), "llama-3.2-1b").config()
    assert config.vision.hidden_size == VISION["hidden_size"]
    assert config.decoder == DECODERS["llama-3.2-1b"].decoder


def test_a_folder_named_like_a_preset_is_a_folder(
    clip: Path, qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip.rename(clip.parent / "tinyclip-39m")
    monkeypatch.chdir(clip.parent)
    pair = Pair("tinyclip-39m", "qwen2")
    assert pair.config().vision.hidden_size == VISION["hidden_size"]
    weights = save(clip.parent / "all", pair.config()).state_dict()
    found = checkpoint_of_pair(pair, clip.parent / "all")  # no word of the hub
    assert torch.equal(found.weights["decoder.model.norm.weight"].read(),
                       weights["decoder.model.norm.weight"])  # fmt: skip
    assert qwen2.is_dir()


@pytest.mark.parametrize(
    ("encoder", "decoder", "message"),
    [
        ("tinyclip-39", "qwen2-0.5b", "no encoder is named 'tinyclip-39'.*'tinyclip-39m'"),
        ("siglip-so400m", "qwen2-0.5b", "'siglip-so400m-384'"),
        ("tinyclip-39m", "qwen-0.5b", "no decoder is named 'qwen-0.5b'.*'qwen2(.5)?-0.5b'"),
        ("tinyclip-39m", "gpt-oss", "no decoder is named 'gpt-oss'.*use one of: qwen2-0.5b, "),
        ("./nowhere", "qwen2-0.5b", "cannot find ./nowhere: expected a folder, or a hub id"),
        ("tinyclip-39m", "/no/where", "cannot find /no/where"),
        ("", "qwen2-0.5b", "cannot find : expected a folder"),
        ("owner/name", "qwen2-0.5b", "owner/name is not on this machine.*hf download owner/name"),
    ],
)
def test_names_of_nothing(encoder: str, decoder: str, message: str) -> None:
    with pytest.raises(HimixError, match=message) as error:
        Pair(encoder, decoder).config()
    assert "\n" not in str(error.value)


def test_an_export_may_download_what_it_was_told_and_nothing_else_may() -> None:
    pair = Pair("owner/name", "qwen2-0.5b")
    with pytest.raises(CheckpointError, match="owner/name is not on this machine"):
        pair.config()
    for random_weights in (False, True):
        with pytest.raises(CheckpointError, match="cannot download owner/name"):
            chosen_checkpoint("owner/name", None, None, random_weights=random_weights)


# checkpoints


def test_nothing_was_trained(pair: Pair) -> None:
    with pytest.raises(CheckpointError, match=r"projections for .*clip and .*qwen2") as error:
        checkpoint_of_pair(pair, None)
    for way in ("train one", "--checkpoint FOLDER", "--random-weights"):
        assert way in str(error.value)


def test_what_was_trained_here_is_found(pair: Pair, tmp_path: Path) -> None:
    config = pair.config()
    other = dataclasses.replace(config.decoder, num_hidden_layers=2)
    models = {}
    for seed, (name, saved) in enumerate(
        [("old", config), ("new", config), ("other", dataclasses.replace(config, decoder=other))]
    ):
        models[name] = save(tmp_path / name, saved, seed)
        remember_checkpoint(tmp_path / name)
    (tmp_path / "junk").mkdir()
    remember_checkpoint(tmp_path / "junk")
    found = checkpoint_of_pair(pair, None)
    assert found.name == "new"
    name = "injection.layers.0.k_proj.weight"
    assert torch.equal(found.weights[name].read(), models["new"].state_dict()[name])


def test_training_may_choose_the_layer_the_ends_and_the_context(pair: Pair, tmp_path: Path) -> None:
    config = pair.config()
    chosen = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, feature_layer=-3),
        decoder=dataclasses.replace(
            config.decoder, eos_token_ids=(0,), max_position_embeddings=100
        ),
    )
    save(tmp_path / "trained", chosen)
    remember_checkpoint(tmp_path / "trained")
    assert checkpoint_of_pair(pair, None).config == chosen


def test_a_checkpoint_of_another_pair_is_refused(pair: Pair, tmp_path: Path) -> None:
    config = pair.config()
    decoder = dataclasses.replace(config.decoder, intermediate_size=88, rope_theta=5e5)
    vision = dataclasses.replace(config.vision, patch_size=10, hidden_act="gelu")
    save(tmp_path / "other", dataclasses.replace(config, vision=vision, decoder=decoder))
    with pytest.raises(CheckpointError, match="is a checkpoint of another pair") as error:
        checkpoint_of_pair(pair, tmp_path / "other")
    size = config.vision.patch_size
    expected = f"vision.patch_size {size}, decoder.intermediate_size 80, decoder.rope_theta "
    assert (error.value.expected or "").startswith(expected)
    assert error.value.found == "10, 88, 500000.0"


def test_a_checkpoint_may_have_another_activation_than_the_preset(
    pair: Pair, tmp_path: Path
) -> None:
    config = pair.config()
    vision = dataclasses.replace(config.vision, hidden_act="gelu")
    save(tmp_path / "mine", dataclasses.replace(config, vision=vision))
    assert checkpoint_of_pair(pair, tmp_path / "mine").config.vision.hidden_act == "gelu"


# what a command line chooses


def test_the_demo_model_without_any_names() -> None:
    chosen = chosen_checkpoint(None, None, None, random_weights=False)
    assert chosen.name == "himix-shapes-demo"


def test_a_checkpoint_without_names(pair: Pair, tmp_path: Path) -> None:
    save(tmp_path / "mine", pair.config())
    assert chosen_checkpoint(None, None, tmp_path / "mine", random_weights=False).name == "mine"


def test_a_checkpoint_and_its_pair(pair: Pair, tmp_path: Path) -> None:
    save(tmp_path / "mine", pair.config())
    chosen = chosen_checkpoint(pair.encoder, pair.decoder, tmp_path / "mine", random_weights=False)
    assert chosen.name == "mine"
    assert chosen.config == read_checkpoint(tmp_path / "mine").config


def test_random_weights_of_a_pair() -> None:
    chosen = chosen_checkpoint("tinyclip-39m", "smollm2-360m", None, random_weights=True)
    assert chosen.name == "tinyclip-39m-smollm2-360m-random"
    assert chosen.config == Pair("tinyclip-39m", "smollm2-360m").config()
    assert all(isinstance(weight, RandomWeight) for weight in chosen.weights.values())
    assert chosen.notice == NOTICE


def random_names(checkpoint: Checkpoint) -> set[str]:
    """What is drawn at random, by the first part of its name."""
    drawn = [n for n, weight in checkpoint.weights.items() if isinstance(weight, RandomWeight)]
    return {name.split(".")[0] for name in drawn}


def test_random_projections_between_an_encoder_and_a_decoder(pair: Pair) -> None:
    chosen = chosen_checkpoint(pair.encoder, pair.decoder, None, random_weights=True)
    assert chosen.name == "clip-qwen2-random"
    assert chosen.config == pair.config()
    assert random_names(chosen) == {"injection"}
    chosen.check()
    stock = AutoModelForCausalLM.from_pretrained(pair.decoder).state_dict()
    model = chosen.model().state_dict()
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert torch.equal(model[f"decoder.{name}"], stock[name])
    assert chosen.chat_template == (Path(pair.decoder) / "chat_template.jinja").read_text()
    ids = Tokenizer.from_str(chosen.tokenizer_json).encode("How many? <|end|>").ids
    assert ids == AutoTokenizer.from_pretrained(pair.decoder)("How many? <|end|>").input_ids
    assert "reads text as its decoder does" in chosen.notice
    assert random_parts(pair) == (
        f"random weights in the projections; the encoder is {pair.encoder}; "
        f"the decoder is {pair.decoder}"
    )


def test_a_decoder_keeps_its_weights_beside_a_preset_and_an_encoder_likewise(pair: Pair) -> None:
    one, other = Pair("tinyclip-39m", pair.decoder), Pair(pair.encoder, "smollm2-360m")
    assert random_names(random_pair(one)) == {"injection", "vision"}
    assert random_names(random_pair(other)) == {"injection", "decoder"}
    assert random_pair(other).notice == NOTICE
    assert random_parts(one) == (
        f"random weights in the projections and the encoder (tinyclip-39m); "
        f"the decoder is {pair.decoder}"
    )


def test_a_decoder_without_a_tokenizer_is_refused(pair: Pair) -> None:
    (Path(pair.decoder) / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"qwen2.*tokenizer"):
        random_pair(pair)


def test_a_float_that_went_through_float32_is_the_same(pair: Pair, tmp_path: Path) -> None:
    config = pair.config()
    for eps, same in ((9.999999974752427e-07, True), (1.01e-6, False)):
        decoder = dataclasses.replace(config.decoder, rms_norm_eps=eps)
        save(tmp_path / "mine", dataclasses.replace(config, decoder=decoder))
        if same:
            found = checkpoint_of_pair(pair, tmp_path / "mine")
            assert found.config.decoder.rms_norm_eps == eps
        else:
            with pytest.raises(CheckpointError, match=r"another pair.*decoder\.rms_norm_eps"):
                checkpoint_of_pair(pair, tmp_path / "mine")


def test_a_decoder_is_no_checkpoint(pair: Pair) -> None:
    with pytest.raises(CheckpointError, match=r"no HiMix checkpoint.*--decoder .*--random-weights"):
        chosen_checkpoint(None, None, Path(pair.decoder), random_weights=False)


def test_the_default_decoder() -> None:
    chosen = chosen_checkpoint("tinyclip-39m", None, None, random_weights=True)
    assert chosen.name == "tinyclip-39m-qwen2-0.5b-random"
    assert chosen.config.decoder == DECODERS["qwen2-0.5b"].decoder
    shape = chosen.weights["decoder.model.embed_tokens.weight"].shape
    assert shape == (151936, 896)


def test_options_that_do_not_go_together(pair: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    for decoder, random in ((pair.decoder, False), (None, True), (pair.decoder, True)):
        with pytest.raises(ConfigError, match=r"the encoder is missing.*add --encoder"):
            chosen_checkpoint(None, decoder, None, random_weights=random)
    with pytest.raises(ConfigError, match="leave out --checkpoint or --random-weights"):
        chosen_checkpoint(pair.encoder, pair.decoder, folder, random_weights=True)
    with pytest.raises(CheckpointError, match=r"gone is not a checkpoint.*no such folder"):
        chosen_checkpoint(pair.encoder, pair.decoder, folder, random_weights=False)
