"""Folders of Hugging Face that are not what we can use: one error, which says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from himix_edge.errors import CheckpointError
from himix_edge.models.huggingface import decoder_from_folder, encoder_from_folder
from tests.models.stock import LLAMA3, edit, write_decoder


@pytest.mark.parametrize(
    ("kind", "changes", "found"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"attention_bias": True, "mlp_bias": True}, "attention_bias, mlp_bias"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, r"quantized weights \(gptq\)"),
        (
            "qwen2",
            {"layer_types": ..., "use_sliding_window": True, "sliding_window": 8,
             "max_window_layers": 1},
            "a sliding window",
        ),
        (
            "llama",
            {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type linear",
        ),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
             "original_max_position_embeddings": 64}},
            "rope_type yarn",
        ),
    ],
)  # fmt: skip
def test_settings_that_we_lack_are_refused_by_name(
    tmp_path: Path, kind: str, changes: dict[str, Any], found: str
) -> None:
    write_decoder(tmp_path, kind)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(
        CheckpointError,
        match=rf"config\.json: found it has what himix-edge has not: found {found}$",
    ):
        decoder_from_folder(tmp_path)


@pytest.mark.parametrize("opened", [encoder_from_folder, decoder_from_folder])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"cannot read .*config\.json: expected JSON"),
        ("\x00\xff", r"cannot read .*config\.json: expected JSON"),
        ("[]", r"cannot read .*config\.json: expected a JSON object, found list"),
        ("{}", "model_type is unknown: expected one of .*, found None"),
        ('{"model_type": "bert"}', "model_type is unknown: expected one of .*, found 'bert'"),
        ('{"model_type": ["clip"]}', "model_type is unknown"),
        (None, r"is incomplete: expected config\.json, found no such file"),
    ],
)
def test_configs_that_are_none(
    tmp_path: Path, opened: Callable[[Path], object], text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path)


def test_the_types_that_we_know_are_named(clip: Path, qwen2: Path) -> None:
    with pytest.raises(CheckpointError, match="one of llama, qwen2, found 'clip_vision_model'"):
        decoder_from_folder(clip)
    with pytest.raises(
        CheckpointError,
        match="one of clip, clip_vision_model, siglip, siglip_vision_model, found 'qwen2'",
    ):
        encoder_from_folder(qwen2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "24"}, "hidden_size"),
        ({"hidden_size": 25}, "hidden size|hidden_size"),
        ({"hidden_size": -24}, "hidden_size|hidden size"),
        ({"image_size": [30, 30]}, r"image_size is invalid: expected int, found \[30, 30\]"),
        ({"patch_size": 0}, "patch_size is invalid"),
        ({"num_hidden_layers": 1}, "feature_layer is invalid: expected -1 to -1, found -2"),
        ({"num_channels": 1}, "num_channels is invalid: expected 3, found 1"),
        ({"hidden_act": "relu"}, "hidden_act is unknown: expected one of gelu.*, found relu"),
        ({"vision_config": 5}, "vision_config|mapping"),
    ],
)
def test_impossible_encoder_configs(clip: Path, changes: dict[str, Any], message: str) -> None:
    edit(clip / "config.json", **changes)
    with pytest.raises(CheckpointError, match=rf"cannot use .*config\.json.*({message})") as caught:
        encoder_from_folder(clip)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_attention_heads is invalid"),
        ({"rope_parameters": 3}, "rope|int"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is invalid"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor"),
        (
            {"rope_parameters": {**LLAMA3, "rope_theta": 1e4, "high_freq_factor": 0.5}},
            "high_freq_factor is invalid",
        ),
    ],
)
def test_impossible_decoder_configs(qwen2: Path, changes: dict[str, Any], message: str) -> None:
    edit(qwen2 / "config.json", **changes)
    with pytest.raises(CheckpointError, match=rf"cannot use .*config\.json.*({message})") as caught:
        decoder_from_folder(qwen2)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_of_weights(clip: Path) -> None:
    path = clip / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        encoder_from_folder(clip)


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    write_decoder(tmp_path, "qwen2", max_shard_size="50KB")
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    for name in shards[:2]:
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"is incomplete.*no {shards[0]}, no {shards[1]}"):
        decoder_from_folder(tmp_path)


def test_pickled_weights_that_are_none(clip: Path) -> None:
    (clip / "model.safetensors").rename(clip / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"cannot read .*pytorch_model\.bin.*safetensors"):
        encoder_from_folder(clip)
