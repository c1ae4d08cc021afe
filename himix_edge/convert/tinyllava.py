"""TinyLLaVA Factory's layout: its own config and names around transformers' modules.

Its prompts are in its code, and so is what becomes of an image before the encoder.
Reference: github.com/TinyLLaVA/TinyLLaVA_Factory, `modeling_tinyllava.py` and `data/template`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from himix_edge.config import HiMixConfig, PreprocessConfig, VisionConfig
from himix_edge.contract import ImagePlace
from himix_edge.convert.layout import feature_layer, licence_of, vanilla_weights
from himix_edge.convert.prompt import place_image, prefix_ids_of
from himix_edge.convert.teacher import TeacherSource
from himix_edge.errors import CheckpointError, ConfigError
from himix_edge.models.chat_files import read_tokenizer
from himix_edge.models.hub import json_object, name_of
from himix_edge.models.huggingface import (
    CONFIG,
    DECODERS,
    decoder_config,
    known_kind,
    refusing,
    vision_config,
)
from himix_edge.models.preprocessor import preprocess_from_json
from himix_edge.models.stated_ids import with_stated_ids
from himix_edge.models.weights import stored_weights
from himix_edge.plain import shown
from himix_edge.tokenizer_json import panics_as_exceptions, read_tokenizer_json

FAMILY = "tinyllava"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
IMAGE = "<image>"
PLACES = {
    "vision_tower._vision_tower.": "vision.",
    "language_model.": "decoder.",
    "connector._connector.": "injection.connector.",
}


def tinyllava_source(folder: Path) -> TeacherSource:
    """Opens a folder of TinyLlavaForConditionalGeneration.

    Raises:
        CheckpointError: a file that is missing or corrupt, or a model that we don't have.
    """
    path = folder / CONFIG
    data = json_object(path)
    with refusing(path):
        _require(data, "connector_type", "mlp2x_gelu")
        vision = _vision(data)
        preprocess = _preprocess(data, vision)
        text = data.get("text_config") or {}
        kind = known_kind(text, DECODERS, "text_config")
        end = _answer_end(kind, str(data.get("llm_model_name_or_path")))
    with refusing(path):
        decoder = decoder_config(text)
    files = read_tokenizer(folder, decoder.vocab_size)
    try:
        tokenizer = read_tokenizer_json(files.tokenizer_json).tokenizer
        with panics_as_exceptions():
            ends: list[int] = tokenizer.encode(end, add_special_tokens=False).ids
    except Exception as error:  # of words that it lacks, `tokenizers` raises bare Exceptions
        raise CheckpointError(
            f"cannot use the tokenizer of {folder}",
            expected=f"one that can encode {end!r}",
            found=str(error),
        ) from error
    ends = ends if len(ends) == 1 else []
    decoder = with_stated_ids(folder, decoder, data, text)
    # Its own code ends an answer there as well, whatever else is stated.
    all_ends = tuple(dict.fromkeys((*ends, *decoder.eos_token_ids)))
    decoder = dataclasses.replace(decoder, eos_token_ids=all_ends)
    decoder, weights = vanilla_weights(stored_weights(folder), PLACES, vision, decoder)
    files = dataclasses.replace(files, chat_template=_template(end))
    files = place_image(files, ImagePlace(IMAGE, None, prefix_ids=()))
    return TeacherSource(
        name=name_of(folder),
        family=FAMILY,
        licence=licence_of(folder),
        notice="",
        config=HiMixConfig(vision, decoder, preprocess, design="vanilla"),
        weights=weights,
        prefix_ids=prefix_ids_of(files),
        tokenizer_json=files.tokenizer_json,
        chat_template=files.chat_template,
        chat=files.chat,
    )


def _vision(data: Mapping[str, Any]) -> VisionConfig:
    """Its "patch" drops CLIP's class token, and of SigLIP, which has none, the first patch."""
    _require(data, "vision_feature_select_strategy", "patch")
    _require(data, "vision_model_name_or_path2", "")  # a second encoder
    vision = data.get("vision_config") or {}
    layer = data.get("vision_feature_layer", -2)
    is_clip = str(vision.get("model_type")).startswith("clip")
    found = vision_config(vision, -1, skipped_patches=0 if is_clip else 1)
    layer = feature_layer(layer, found.num_hidden_layers)
    return vision_config(vision, layer, skipped_patches=found.skipped_patches)


def _preprocess(data: Mapping[str, Any], vision: VisionConfig) -> PreprocessConfig:
    """The encoder's own processor, at its size."""
    _require(data, "image_aspect_ratio", "square")
    size = vision.image_size
    square = {"height": size, "width": size}
    crops = {"size": {"shortest_edge": size}, "crop_size": square}
    settings = crops if vision.model_type == "clip" else {"size": square}
    return preprocess_from_json(settings, vision.model_type)


def _require(data: Mapping[str, Any], name: str, value: str) -> None:
    if (found := data.get(name, value)) != value:
        raise ConfigError(f"{name} is unknown", expected=repr(value), found=shown(found))


def _answer_end(kind: str, base: str) -> str:
    """What its templates write after an answer: each decoder has its own."""
    if kind == "llama":
        return "</s>"
    return "<|im_end|>" if "instruct" in base.lower() else "<|endoftext|>"


def _template(end: str) -> str:
    """`data/template/base.py` with its formatters, as Jinja; one image, in the first question."""
    image = "{{ '" + IMAGE + "\\n' }}"
    question = "{{ 'USER: ' }}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    question += image + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ ' ASSISTANT:' }}"
    answer = "{{ ' ' + message['content'][0]['text'] + " + json.dumps(end) + " }}"
    return (
        "{{ " + json.dumps(f"{SYSTEM} ") + " }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}" + question + ""
        "{% elif message['role'] == 'assistant' %}" + answer + ""
        "{% else %}{{ raise_exception('the system prompt is fixed') }}{% endif %}{% endfor %}"
    )
