"""Folders that transformers itself wrote, read by us: the same numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from himix_edge import presets
from himix_edge.config import RopeScaling, VisionConfig
from himix_edge.models.decoder import Decoder
from himix_edge.models.huggingface import (
    DecoderSource,
    EncoderSource,
    decoder_from_folder,
    encoder_from_folder,
)
from himix_edge.models.vision import VisionEncoder
from himix_edge.models.weights import Weights, misfits
from tests import tiny, tolerances
from tests.models.reference import random_ids, random_tensor
from tests.models.stock import (
    DECODERS,
    ENCODERS,
    LLAMA3,
    SIZE,
    VISION,
    edit,
    write_decoder,
    write_encoder,
)


def loaded(module: nn.Module, weights: Weights, prefix: str) -> Any:
    """Our module with all the weights and no other, read one by one."""
    expected = {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
    assert not list(misfits(expected, weights))
    read = {name.removeprefix(prefix): weight.read() for name, weight in weights.items()}
    module.load_state_dict(read, strict=True)
    return module.eval().requires_grad_(False)


def our_features(source: EncoderSource, pixels: Tensor) -> Tensor:
    features: Tensor = loaded(VisionEncoder(source.vision), source.weights, "vision.")(pixels)
    return features


def our_logits(source: DecoderSource, ids: Tensor) -> Tensor:
    ours = loaded(Decoder(source.decoder), source.weights, "decoder.")
    hidden, _ = ours(ids, torch.arange(ids.shape[1]).expand(ids.shape))
    logits: Tensor = ours.logits(hidden)
    return logits


def vision(folder: Path) -> VisionConfig:
    return encoder_from_folder(folder).vision


# encoders


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_gives_transformers_features(tmp_path: Path, kind: str, sharded: bool) -> None:
    write_encoder(tmp_path, kind, **({"max_shard_size": "10KB"} if sharded else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    siglip = kind.startswith("Siglip")
    stock_class: Any = SiglipVisionModel if siglip else CLIPVisionModel
    stock = stock_class.from_pretrained(tmp_path).eval().requires_grad_(False)
    pixels = random_tensor(2, 3, SIZE, SIZE)
    hidden_states = stock(pixels, output_hidden_states=True).hidden_states

    for layer in (-1, -2, -3):
        source = encoder_from_folder(tmp_path, layer)
        assert source.vision.feature_layer == layer
        features = our_features(source, pixels)
        assert features.shape == (2, source.vision.num_image_tokens, 24) == (2, 16, 24)
        expected = hidden_states[layer] if siglip else hidden_states[layer][:, 1:]
        assert expected.std() > 0.5  # or else any tolerance would do
        torch.testing.assert_close(features, expected, rtol=0, atol=tolerances.VISION_FEATURES)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoders_config_is_read_with_its_defaults(tmp_path: Path, kind: str) -> None:
    write_encoder(tmp_path, kind)
    source = encoder_from_folder(tmp_path)
    assert source.name == tmp_path.name
    assert source.vision.model_type == ("clip" if kind.startswith("CLIP") else "siglip")
    assert source.vision.feature_layer == -2
    assert source.vision.layer_norm_eps == 0.01
    assert source.vision.hidden_act == {
        "CLIPModel": "gelu",
        "SiglipModel": "gelu_pytorch_tanh",
        "SiglipVisionModel": "gelu_pytorch_tanh",
    }.get(kind, "quick_gelu")


def test_fields_left_out_of_a_composite_are_the_defaults_of_its_class(tmp_path: Path) -> None:
    """As in the hub's files of SigLIP, which say little."""
    write_encoder(tmp_path, "SiglipModel")
    said = {"hidden_size": 1152, "patch_size": 14, "image_size": SIZE, "num_hidden_layers": 27}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "siglip", "text_config": {}, "vision_config": said})
    )
    vision = encoder_from_folder(tmp_path).vision
    stock = SiglipVisionConfig()
    assert (vision.hidden_size, vision.num_hidden_layers) == (1152, 27)
    assert vision.intermediate_size == stock.intermediate_size == 3072
    assert vision.num_attention_heads == stock.num_attention_heads == 12
    assert vision.layer_norm_eps == stock.layer_norm_eps == 1e-6
    assert vision.hidden_act == stock.hidden_act == "gelu_pytorch_tanh"


@pytest.mark.parametrize("plain", [{}, None])
def test_clips_first_files_have_two_vision_configs(tmp_path: Path, plain: object) -> None:
    write_encoder(tmp_path, "CLIPModel")
    before = vision(tmp_path)
    older = {**VISION, "num_hidden_layers": 3}
    edit(tmp_path / "config.json", vision_config_dict=older, vision_config=plain)
    stock: Any = AutoConfig.from_pretrained(tmp_path)
    assert stock.vision_config.num_hidden_layers == vision(tmp_path).num_hidden_layers == 3
    assert stock.vision_config.hidden_act == vision(tmp_path).hidden_act == "quick_gelu"
    edit(tmp_path / "config.json", vision_config_dict=None, vision_config=VISION)
    assert vision(tmp_path) == dataclasses.replace(before, hidden_act="quick_gelu")


def test_old_names_and_buffers(tmp_path: Path) -> None:
    """Before version 5, vision models had a prefix of their own, and position_ids."""
    write_encoder(tmp_path, "CLIPVisionModel")
    path = tmp_path / "model.safetensors"
    features = our_features(encoder_from_folder(tmp_path), random_tensor(1, 3, SIZE, SIZE))
    old = {f"vision_model.{name}": tensor for name, tensor in load_file(path).items()}
    old["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(old, path)
    again = our_features(encoder_from_folder(tmp_path), random_tensor(1, 3, SIZE, SIZE))
    assert torch.equal(again, features)


def test_what_is_left_out_of_an_encoder_and_what_is_not(tmp_path: Path) -> None:
    write_encoder(tmp_path, "SiglipModel")
    path = tmp_path / "model.safetensors"
    stored = {**load_file(path), "vision_model.adapter.weight": torch.zeros(1)}
    save_file({**stored, "stranger": torch.zeros(1)}, path)
    names = set(encoder_from_folder(tmp_path).weights)
    expected = {f"vision.{name}" for name in VisionEncoder(vision(tmp_path)).state_dict()}
    assert names - expected == {"vision.model.adapter.weight", "vision.model.stranger"}
    assert expected <= names
    assert not any("layers.3." in name for name in names)


def test_missing_and_misshapen_weights_are_left_to_the_caller_to_name(clip: Path) -> None:
    path = clip / "model.safetensors"
    stored = load_file(path)
    del stored["pre_layrnorm.bias"]
    stored["embeddings.class_embedding"] = torch.zeros(23)
    save_file(stored, path)
    source = encoder_from_folder(clip)
    expected = {
        f"vision.{name}": weight
        for name, weight in VisionEncoder(source.vision).state_dict().items()
    }
    assert list(misfits(expected, source.weights)) == [
        "vision.model.embeddings.class_embedding is [23], not [24]",
        "vision.model.pre_layrnorm.bias is missing",
    ]


def test_the_hubs_siglip_is_the_preset(tmp_path: Path) -> None:
    write_encoder(tmp_path, "SiglipModel")
    own = {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "patch_size": 14,
           "num_attention_heads": 16, "num_hidden_layers": 27}  # fmt: skip
    siglip = {"model_type": "siglip_vision_model", **own}
    config = {"model_type": "siglip", "text_config": {}, "vision_config": siglip}
    (tmp_path / "config.json").write_text(json.dumps(config))
    edit(tmp_path / "preprocessor_config.json", size={"height": 384, "width": 384})
    source = encoder_from_folder(tmp_path)
    assert source.vision == presets.ENCODERS["siglip-so400m-384"].vision
    assert source.preprocess == presets.ENCODERS["siglip-so400m-384"].preprocess


# decoders


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_gives_transformers_logits(tmp_path: Path, kind: str, sharded: bool) -> None:
    write_decoder(tmp_path, kind, **({"max_shard_size": "50KB"} if sharded else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    stock_class: Any = Qwen2ForCausalLM if kind.startswith("qwen2") else LlamaForCausalLM
    stock = stock_class.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = random_ids(2, 150, tiny.VOCAB_SIZE)
    with torch.no_grad():
        expected = stock(ids).logits
    assert expected.std() > 0.5  # or else any tolerance would do
    logits = our_logits(decoder_from_folder(tmp_path), ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerances.MODEL_LOGITS)


def test_rope_scaling_matters(llama3: Path) -> None:
    """So that the parity above is no matter of chance."""
    ids = random_ids(1, 150, tiny.VOCAB_SIZE)
    scaled = our_logits(decoder_from_folder(llama3), ids)
    edit(llama3 / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    plain = our_logits(decoder_from_folder(llama3), ids)
    assert (scaled - plain).abs().max() > 0.1


def test_both_spellings_of_rope(llama3: Path) -> None:
    new = decoder_from_folder(llama3).decoder
    assert new.rope_theta == 500.0
    assert new.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    path = llama3 / "config.json"
    edit(path, rope_parameters=..., rope_theta=500.0, rope_scaling=LLAMA3)
    assert decoder_from_folder(llama3).decoder == new
    older = {key.replace("rope_type", "type"): value for key, value in LLAMA3.items()}
    edit(path, rope_scaling=older)
    assert decoder_from_folder(llama3).decoder == new
    edit(path, rope_scaling=None)
    assert decoder_from_folder(llama3).decoder.rope_scaling is None
    assert decoder_from_folder(llama3).decoder.rope_theta == 500.0


def test_a_decoders_config(tmp_path: Path) -> None:
    write_decoder(tmp_path, "smollm2")
    source = decoder_from_folder(tmp_path)
    assert source.name == tmp_path.name
    decoder = source.decoder
    assert (decoder.num_attention_heads, decoder.num_key_value_heads) == (15, 5)
    assert (decoder.head_dim, decoder.rope_theta) == (4, 1e5)
    assert (decoder.attention_bias, decoder.tie_word_embeddings) == (False, True)
    assert decoder.eos_token_ids == (7,)


@pytest.mark.parametrize(
    ("preset", "config", "ends"),
    [
        (
            "qwen2-0.5b",
            {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
             "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
             "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
             "rope_theta": 1e6, "sliding_window": 32768, "use_sliding_window": False,
             "tie_word_embeddings": True, "vocab_size": 151936, "eos_token_id": 151645},
            [151645, 151643],
        ),
        (
            "llama-3.2-1b",
            {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
             "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 16,
             "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling":
             {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
             "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
             "vocab_size": 128256, "eos_token_id": [128001, 128008, 128009]},
            [128001, 128008, 128009],
        ),
        (
            "tinyllama-1.1b",
            {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
             "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 22,
             "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling":
             None, "tie_word_embeddings": False, "vocab_size": 32000, "eos_token_id": 2},
            2,
        ),
    ],
    ids=["qwen2", "llama-3.2", "tinyllama"],
)  # fmt: skip
def test_the_hubs_decoders_are_the_presets(
    tmp_path: Path, preset: str, config: dict[str, Any], ends: Any
) -> None:
    """In the spelling of their time, and with what they state alone."""
    write_decoder(tmp_path, "qwen2")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert decoder_from_folder(tmp_path).decoder == presets.DECODERS[preset].decoder


def test_a_tied_head_that_is_stored_as_well_is_dropped(qwen2: Path) -> None:
    path = qwen2 / "model.safetensors"
    stored = load_file(path)
    before = our_logits(decoder_from_folder(qwen2), ids := random_ids(1, 9, tiny.VOCAB_SIZE))
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, path)
    source = decoder_from_folder(qwen2)
    assert source.decoder.tie_word_embeddings
    assert torch.equal(our_logits(source, ids), before)


def test_a_head_that_is_not_really_tied_is_kept(qwen2: Path) -> None:
    path = qwen2 / "model.safetensors"
    stored = load_file(path)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].flip(0)
    save_file(stored, path)
    source = decoder_from_folder(qwen2)
    assert not source.decoder.tie_word_embeddings
    ids = random_ids(1, 9, tiny.VOCAB_SIZE)
    with torch.no_grad():
        stock: Any = Qwen2ForCausalLM.from_pretrained(qwen2)
        expected = stock.eval()(ids).logits
    torch.testing.assert_close(
        our_logits(source, ids), expected, rtol=0, atol=tolerances.MODEL_LOGITS
    )


def test_an_untied_head_that_is_missing_is_named_by_the_check(tmp_path: Path) -> None:
    write_decoder(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    del stored["lm_head.weight"]
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)  # in old files
    save_file(stored, path)
    source = decoder_from_folder(tmp_path)
    expected = {f"decoder.{k}": v for k, v in Decoder(source.decoder).state_dict().items()}
    assert list(misfits(expected, source.weights)) == ["decoder.lm_head.weight is missing"]


def test_a_sliding_window_that_is_not_in_use_is_no_matter(qwen2: Path) -> None:
    """As in the hub's Qwen2, whose window begins above its last layer or is switched off."""
    edit(qwen2 / "config.json", layer_types=..., sliding_window=8, use_sliding_window=False)
    decoder_from_folder(qwen2)
    edit(qwen2 / "config.json", use_sliding_window=True, max_window_layers=3)
    decoder_from_folder(qwen2)
