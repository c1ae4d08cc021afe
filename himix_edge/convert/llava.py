"""transformers' `LlavaForConditionalGeneration` and `LlavaOnevisionForConditionalGeneration`.

Of LLaVA-OneVision the base tile, the image as a whole: its N tokens, then `image_newline`, then the
text. Here that vector is the first token of the text: the prompts' text begins with the image's own
token, whose row of the embedding, which no text ever uses, it replaces. So that token must not be
said: the row would be another token's, and where the embedding is the head as well its logit means
nothing. The converted model suppresses it; the teacher has the head as it came (`head_rows`).
Every other token may be said, as in transformers: <video>, and the rows that no text comes to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlavaConfig, LlavaOnevisionConfig, PreTrainedConfig

from himix_edge.config import DecoderConfig, HiMixConfig, VisionConfig
from himix_edge.contract import ImagePlace
from himix_edge.convert.layout import feature_layer, licence_of, token_text, vanilla_weights
from himix_edge.convert.prompt import place_image, prefix_ids_of
from himix_edge.convert.teacher import TeacherSource
from himix_edge.errors import CheckpointError, ConfigError
from himix_edge.models.chat_files import ChatFiles, read_chat_files
from himix_edge.models.hub import json_object, name_of
from himix_edge.models.huggingface import (
    CONFIG,
    DECODERS,
    EMBEDDING,
    HEAD,
    decoder_config,
    known_kind,
    preprocess_of,
    refusing,
    vision_config,
)
from himix_edge.models.stated_ids import with_stated_ids
from himix_edge.models.tokenizer_files import PROCESSOR_PLACES
from himix_edge.models.weights import RowOf, RowWeight, Weight, ZeroWeight, stored_weights

ONEVISION = "llava_onevision"
CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llava": LlavaConfig,
    ONEVISION: LlavaOnevisionConfig,
}
TOWERS = ("clip_vision_model", "siglip_vision_model")
CONNECTOR = "injection.connector."
NEWLINE = "image_newline"
# What names begin with in a file, old or new, without the "model." before new ones; and ours.
PLACES = {
    "vision_tower.": "vision.",
    "language_model.lm_head.": "decoder.lm_head.",
    "language_model.model.": "decoder.model.",
    "language_model.": "decoder.model.",
    "lm_head.": "decoder.lm_head.",
    "multi_modal_projector.linear_1.": f"{CONNECTOR}0.",
    "multi_modal_projector.linear_2.": f"{CONNECTOR}2.",
}
ONEVISION_NOTICE = (
    "It sees the picture as a whole, at one size, and not the enlarged parts that LLaVA-OneVision "
    "also looks at: small print may escape it."
)


def llava_source(folder: Path) -> TeacherSource:
    """Opens a folder of either class, as `save_pretrained` writes it or as older ones are.

    Raises:
        CheckpointError: a file that is missing or corrupt, or a model that we don't have.
    """
    path = folder / CONFIG
    data = json_object(path)
    family = str(data["model_type"])
    with refusing(path):
        known_kind(data.get("vision_config") or {"model_type": TOWERS[0]}, TOWERS, "vision_config")
        known_kind(data.get("text_config") or {"model_type": "llama"}, DECODERS, "text_config")
        config: Any = CONFIGS[family].from_dict(data)  # with the defaults that a file leaves out
        vision = _vision(config)
        decoder = decoder_config(_text(config, data))
        if not 0 <= config.image_token_index < decoder.vocab_size:
            raise ConfigError(
                "image_token_index is invalid",
                expected=f"0 to {decoder.vocab_size - 1}",
                found=str(config.image_token_index),
            )
    decoder = with_stated_ids(folder, decoder, data, data.get("text_config") or {})
    preprocess = preprocess_of(folder, vision)
    decoder, weights, head_rows = _weights(folder, config, vision, decoder)
    files = _chat_files(folder, config.image_token_index, decoder, family == ONEVISION)
    return TeacherSource(
        name=name_of(folder),
        family=family,
        licence=licence_of(folder),
        notice=ONEVISION_NOTICE if family == ONEVISION else "",
        config=HiMixConfig(vision, decoder, preprocess, design="vanilla"),
        weights=weights,
        prefix_ids=prefix_ids_of(files),
        tokenizer_json=files.tokenizer_json,
        chat_template=files.chat_template,
        chat=files.chat,
        head_rows=head_rows,
    )


def _vision(config: Any) -> VisionConfig:
    if config.projector_hidden_act != "gelu":
        raise ConfigError(
            "projector_hidden_act is unknown", expected="gelu", found=config.projector_hidden_act
        )
    tower = config.vision_config
    is_clip = tower.model_type == TOWERS[0]
    whole = config.vision_feature_select_strategy == "full"
    if whole and is_clip:
        raise ConfigError(
            "vision_feature_select_strategy is invalid",
            expected="'default' with CLIP, whose first feature is no patch",
            found="'full'",
        )
    layer = feature_layer(config.vision_feature_layer, tower.num_hidden_layers)
    return vision_config(tower.to_dict(), layer, skipped_patches=0 if whole or is_clip else 1)


def _text(config: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's part, with what is said of the whole and holds for it."""
    text: dict[str, Any] = config.text_config.to_dict()
    # Some files say it in one place alone; where a head of its own is stored, that decides.
    text["tie_word_embeddings"] |= config.tie_word_embeddings
    if quantization := data.get("quantization_config"):
        text["quantization_config"] = quantization
    return text


def _weights(
    folder: Path, config: Any, vision: VisionConfig, decoder: DecoderConfig
) -> tuple[DecoderConfig, dict[str, Weight], dict[int, Weight]]:
    """Under the names of our vanilla model; the config of the decoder that they make; and the
    source's own rows of the head for tokens that this decoder suppresses.
    """
    decoder, weights = vanilla_weights(stored_weights(folder), PLACES, vision, decoder)
    if not config.multimodal_projector_bias:
        zeros = ZeroWeight((decoder.hidden_size,))
        weights |= {f"{CONNECTOR}{i}.bias": zeros for i in (0, 2)}
    head_rows: dict[int, Weight] = {}
    if config.model_type == ONEVISION:
        if NEWLINE not in weights:
            raise CheckpointError(f"the weights of {folder} are incomplete", expected=NEWLINE)
        newline = weights.pop(NEWLINE)
        head, image = weights.get(HEAD, weights.get(EMBEDDING)), config.image_token_index
        if head is not None:
            head_rows = {image: RowOf(head, image)}
        if EMBEDDING in weights:
            weights[EMBEDDING] = RowWeight(weights[EMBEDDING], image, newline)
        ids = tuple(dict.fromkeys((*decoder.suppressed_token_ids, image)))
        decoder = dataclasses.replace(decoder, suppressed_token_ids=ids)
    return decoder, weights, head_rows


def _chat_files(
    folder: Path, image_id: int, decoder: DecoderConfig, opens_with_image: bool
) -> ChatFiles:
    files = read_chat_files(folder, decoder.vocab_size, PROCESSOR_PLACES)
    image = token_text(files.tokenizer_json, image_id)
    if image is None:
        raise CheckpointError(
            f"the tokenizer of {folder} lacks the image's token",
            expected=f"an added token {image_id}: image_token_index of {CONFIG}",
        )
    opening_ids = (image_id,) if opens_with_image else ()
    return place_image(files, ImagePlace(image, image_id, prefix_ids=(), opening_ids=opening_ids))
