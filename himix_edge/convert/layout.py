"""What the folders of all families have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from himix_edge.config import DecoderConfig, VisionConfig
from himix_edge.contract import MODEL_CARD
from himix_edge.errors import ConfigError
from himix_edge.models.huggingface import decoder_weights, vision_weights
from himix_edge.models.weights import StoredWeight, Weight
from himix_edge.plain import shown

FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
FIELD = re.compile(r"""^(license|license_name)\s*:\s*['"]?(.*?)['"]?\s*$""", re.MULTILINE)


def feature_layer(stated: Any, num_hidden_layers: int) -> int:
    """Counted from the end, whichever way a config counts it.

    Raises:
        ConfigError: several layers.
    """
    layers = stated if isinstance(stated, list) else [stated]
    if len(layers) != 1 or not isinstance(layers[0], int):
        raise ConfigError(
            "vision_feature_layer is unknown", expected="one layer", found=shown(stated)
        )
    return layers[0] if layers[0] < 0 else layers[0] - num_hidden_layers - 1


def vanilla_weights(
    stored: Mapping[str, StoredWeight],
    places: Mapping[str, str],
    vision: VisionConfig,
    decoder: DecoderConfig,
) -> tuple[DecoderConfig, dict[str, Weight]]:
    """Under the names of our vanilla model; and the config of the decoder that they make.

    One that is unknown stays, for the check of the whole to name.

    Args:
        places: what names begin with in the family's files, without the "model." that may stand
            before it, and where those belong with us: "vision.", "decoder." and further.
    """
    parts: dict[str, dict[str, StoredWeight]] = {"vision": {}, "decoder": {}, "": {}}
    for name, weight in stored.items():
        own = name.removeprefix("model.")
        old = next((old for old in places if own.startswith(old)), None)
        placed = own if old is None else places[old] + own.removeprefix(old)
        part, _, rest = placed.partition(".")
        parts[part if part in parts else ""][rest if part in parts else placed] = weight
    decoder, language = decoder_weights(parts["decoder"], decoder)
    return decoder, {**parts[""], **vision_weights(parts["vision"], vision), **language}


def token_text(tokenizer_json: str, token: int) -> str | None:
    """How an added token is written."""
    added = json.loads(tokenizer_json)["added_tokens"]
    return next((str(item["content"]) for item in added if item["id"] == token), None)


def licence_of(folder: Path) -> str:
    """What the model card states, or the first line of a LICENSE file; "" if there is neither."""
    if front := FRONT_MATTER.search(_text(folder / MODEL_CARD)):
        stated: dict[str, str] = dict(FIELD.findall(front[1]))
        own_name = stated.get("license_name") if stated.get("license") == "other" else None
        if found := own_name or stated.get("license"):
            return found
    texts = (_text(path) for path in sorted(folder.glob("LICEN[SC]E*")))
    lines = (line.strip() for text in texts for line in text.splitlines())
    return next((line for line in lines if line), "")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
