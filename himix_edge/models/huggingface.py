"""Encoders and decoders from folders as transformers' `save_pretrained` and its hub have them.

    config.json              CLIP and SigLIP (whole, or their vision model alone); Qwen2 and Llama
    *.safetensors            one file, or an index and its shards
    preprocessor_config.json, or processor_config.json    of an encoder
    generation_config.json, tokenizer.json, a chat template    of a decoder

Nothing is guessed: a setting that changes what the model computes, and that we don't have, is
refused by its name. No weight is read here, save two that may be the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from himix_edge.config import DecoderConfig, PreprocessConfig, VisionConfig
from himix_edge.errors import CheckpointError, ConfigError
from himix_edge.models.folder_kind import refuse_other_kinds
from himix_edge.models.hub import CONFIG, folder_from_source, json_object, name_of
from himix_edge.models.preprocessor import preprocess_from_json
from himix_edge.models.stated_ids import with_stated_ids
from himix_edge.models.tokenizer_files import PROCESSOR_CONFIG, chat_template_of, tokenizer_of
from himix_edge.models.weights import StoredWeight, stored_weights
from himix_edge.plain import dataclass_from_dict

__all__ = [
    "CONFIG",
    "DecoderSource",
    "EncoderSource",
    "decoder_from_folder",
    "encoder_from_folder",
    "folder_from_source",
]

PREPROCESSOR_CONFIG = "preprocessor_config.json"

ENCODERS: dict[str, type[PreTrainedConfig]] = {
    "clip": CLIPVisionConfig,
    "clip_vision_model": CLIPVisionConfig,
    "siglip": SiglipVisionConfig,
    "siglip_vision_model": SiglipVisionConfig,
}
DECODERS: dict[str, type[PreTrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config}
VISION_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")

# What a whole CLIP or SigLIP has beside its vision model.
TEXT_SIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
# What a vision model has beyond its layers, which X_v has no use for, and an old file's buffer.
VISION_REST = ("post_layernorm.", "head.", "embeddings.position_ids")

EMBEDDING, HEAD = "decoder.model.embed_tokens.weight", "decoder.lm_head.weight"


@dataclass(frozen=True)
class EncoderSource:
    """A pretrained vision encoder, not yet read.

    Attributes:
        name: hub id or folder name, for people.
        weights: those up to the feature layer, under HiMix's names, "vision.model....".
    """

    name: str
    vision: VisionConfig
    preprocess: PreprocessConfig
    weights: dict[str, StoredWeight]


@dataclass(frozen=True)
class DecoderSource:
    """A pretrained language decoder, not yet read.

    Attributes:
        name: hub id or folder name, for people.
        weights: under HiMix's names, "decoder.model....", "decoder.lm_head.weight".
    """

    name: str
    decoder: DecoderConfig
    weights: dict[str, StoredWeight]


def encoder_from_folder(folder: Path, feature_layer: int = -2) -> EncoderSource:
    """Opens a folder of CLIPModel, CLIPVisionModel, SiglipModel or SiglipVisionModel.

    Args:
        feature_layer: whose hidden state are the features, as in `VisionConfig`.

    Raises:
        CheckpointError: a file that is missing or corrupt, or a model that we don't have.
    """
    refuse_other_kinds(folder)
    path = folder / CONFIG
    data = json_object(path)
    with refusing(path):
        # Of a whole CLIP or SigLIP its vision part; CLIP's first files have it under two names.
        if own := data.get("vision_config_dict") or data.get("vision_config"):
            data = {"model_type": data.get("model_type"), **own}
        vision = vision_config(data, feature_layer)
    preprocess = preprocess_of(folder, vision)
    weights = vision_weights(stored_weights(folder), vision)
    return EncoderSource(name_of(folder), vision, preprocess, weights)


def decoder_from_folder(folder: Path) -> DecoderSource:
    """Opens a folder of Qwen2ForCausalLM or LlamaForCausalLM, with its tokenizer.

    Raises:
        CheckpointError: a file that is missing or corrupt, or a model that we don't have.
    """
    refuse_other_kinds(folder)
    path = folder / CONFIG
    data = json_object(path)
    with refusing(path):
        config = decoder_config(data)
    config = with_stated_ids(folder, config, data)
    config, weights = decoder_weights(stored_weights(folder), config)
    tokenizer_of(folder)
    chat_template_of(folder)
    return DecoderSource(name_of(folder), config, weights)


def vision_config(
    data: Mapping[str, Any], feature_layer: int, skipped_patches: int = 0
) -> VisionConfig:
    """What Hugging Face's config of a vision model says.

    Args:
        data: a `config.json`, or the `vision_config` in one.
        feature_layer, skipped_patches: as in `VisionConfig`.

    Raises:
        ConfigError: an encoder that we don't have. Transformers' own checks raise what they raise.
    """
    config: Any = _known_class(data, ENCODERS).from_dict(dict(data))  # with defaults left out there
    if config.num_channels != 3:
        raise ConfigError("num_channels is invalid", expected="3", found=str(config.num_channels))
    if config.hidden_act not in VISION_ACTIVATIONS:
        raise ConfigError(
            "hidden_act is unknown",
            expected=f"one of {', '.join(VISION_ACTIVATIONS)}",
            found=str(config.hidden_act),
        )
    fields = (
        "image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "hidden_act", "layer_norm_eps",
    )  # fmt: skip
    return dataclass_from_dict(
        VisionConfig,
        {name: getattr(config, name) for name in fields}
        | {"model_type": config.model_type.removesuffix("_vision_model")}
        | {"feature_layer": feature_layer, "skipped_patches": skipped_patches},
    )


def preprocess_of(folder: Path, vision: VisionConfig) -> PreprocessConfig:
    """What the image processor in a folder does; its settings have two places, by age.

    Raises:
        CheckpointError: no settings, some that the runtime does not have, or another image size.
    """
    path = folder / PROCESSOR_CONFIG
    settings = json_object(path).get("image_processor") if path.is_file() else None
    if not isinstance(settings, dict):
        path = folder / PREPROCESSOR_CONFIG
        settings = json_object(path)
    with refusing(path):
        preprocess = preprocess_from_json(settings, vision.model_type)
        if preprocess.image_size != vision.image_size:
            raise ConfigError(
                "its size is not the encoder's",
                expected=str(vision.image_size),
                found=str(preprocess.image_size),
            )
    return preprocess


def vision_weights(
    stored: Mapping[str, StoredWeight], config: VisionConfig
) -> dict[str, StoredWeight]:
    """Those of the layers we run. One that is unknown stays, for the check of the whole to name."""
    above = range(config.num_hidden_layers + 1 + config.feature_layer, config.num_hidden_layers)
    left_out = (*VISION_REST, *(f"encoder.layers.{i}." for i in above))
    weights = {}
    for name, weight in stored.items():
        own = name.removeprefix("vision_model.")  # a vision model alone has no prefix, or has it
        if not name.startswith(TEXT_SIDE) and not own.startswith(left_out):
            weights[f"vision.model.{own}"] = weight
    return weights


def decoder_config(data: Mapping[str, Any]) -> DecoderConfig:
    """What Hugging Face's config of a decoder says, but for the ids: see `stated_ids`.

    Args:
        data: a `config.json`, or the `text_config` in one.

    Raises:
        ConfigError: a decoder that we don't have. Transformers' own checks raise what they raise.
    """
    config: Any = _known_class(data, DECODERS).from_dict(dict(data))
    rope = dict(config.rope_parameters)
    if unsupported := ", ".join(_unsupported(config, rope)):
        raise ConfigError("it has what himix-edge has not", found=unsupported)
    fields = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
        "rms_norm_eps", "tie_word_embeddings",
    )  # fmt: skip
    head_dim = getattr(config, "head_dim", None)
    return dataclass_from_dict(
        DecoderConfig,
        {name: getattr(config, name) for name in fields}
        | {
            "head_dim": head_dim or config.hidden_size // config.num_attention_heads,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": _rope_scaling(rope),
            "attention_bias": config.model_type == "qwen2",
        },
    )


def decoder_weights(
    stored: Mapping[str, StoredWeight], config: DecoderConfig
) -> tuple[DecoderConfig, dict[str, StoredWeight]]:
    """Under HiMix's names; and the config, in which the embeddings are tied if the weights are."""
    weights = {
        f"decoder.{name}": weight
        for name, weight in stored.items()
        if not name.endswith(".rotary_emb.inv_freq")  # a buffer in old files
    }
    if config.tie_word_embeddings and EMBEDDING in weights and HEAD in weights:
        if torch.equal(weights[EMBEDDING].read(), weights[HEAD].read()):
            del weights[HEAD]
        else:  # as transformers does: what is stored outweighs what the config says
            config = dataclasses.replace(config, tie_word_embeddings=False)
    return config, weights


def _unsupported(config: Any, rope: Mapping[str, Any]) -> Iterator[str]:
    """Settings that change what a decoder computes, and that ours does not have."""
    if config.hidden_act != "silu":
        yield f"hidden_act {config.hidden_act}"
    if config.model_type == "llama":
        for name in ("attention_bias", "mlp_bias"):
            if getattr(config, name):
                yield name
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        yield "a sliding window"
    if (kind := rope.get("rope_type")) not in ("default", "llama3"):
        yield f"rope_type {kind}"
    if (share := rope.get("partial_rotary_factor") or 1) != 1:
        yield f"partial_rotary_factor {share}"
    if quantization := getattr(config, "quantization_config", None):
        yield f"quantized weights ({dict(quantization).get('quant_method')})"


def _rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    if rope["rope_type"] == "default":
        return None
    fields = (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    )  # fmt: skip
    return {name: rope[name] for name in fields}


def known_kind(data: Mapping[str, Any], known: Iterable[str], part: str = "") -> str:
    """The `model_type` of a config, or of the part of one.

    Raises:
        ConfigError: none, or one that is not among those known.
    """
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(
            f"the model_type of its {part} is unknown" if part else "its model_type is unknown",
            expected=f"one of {', '.join(known)}",
            found=repr(kind),
        )
    return kind


def _known_class(
    data: Mapping[str, Any], known: Mapping[str, type[PreTrainedConfig]]
) -> type[PreTrainedConfig]:
    return known[known_kind(data, known)]


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file's content, as one error that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # transformers' configs check themselves, each in its own way
        line = " ".join(str(error).split())
        found = line if isinstance(error, ConfigError) else f"{type(error).__name__}: {line}"
        raise CheckpointError(f"cannot use {path}", found=found) from error
