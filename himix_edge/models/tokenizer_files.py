"""Tokenizer and chat template in a Hugging Face folder, wherever its age has put them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from himix_edge.contract import CHAT_TEMPLATE, TOKENIZER
from himix_edge.errors import CheckpointError
from himix_edge.models.hub import CONFIG, json_object

SENTENCEPIECE, BYTE_LEVEL = "tokenizer.model", ("vocab.json", "merges.txt")
TOKENIZER_CONFIG = "tokenizer_config.json"
PROCESSOR_CONFIG = "processor_config.json"
CHAT_TEMPLATE_JSON = "chat_template.json"
# A processor's template, of text and images, may stand beside a tokenizer's, of text alone.
TOKENIZER_PLACES = (TOKENIZER_CONFIG, CHAT_TEMPLATE_JSON)
PROCESSOR_PLACES = (CHAT_TEMPLATE_JSON, PROCESSOR_CONFIG, TOKENIZER_CONFIG)


def tokenizer_of(folder: Path) -> Path:
    """The path of a folder's `tokenizer.json`.

    Raises:
        CheckpointError: none there; it says how to make one.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        found = [name for name in (SENTENCEPIECE, *BYTE_LEVEL) if (folder / name).is_file()]
        slow = _slow_class(folder, found)
        place = json.dumps(str(folder))
        script = (
            f"from transformers import {slow}; "
            f"{slow}.from_pretrained({place}).save_pretrained({place})"
        )
        raise CheckpointError(
            f"{folder} has no tokenizer that a device can read",
            expected=TOKENIZER,
            found=" ".join(found) or "none",
            fix=f"convert it with: python -c {shlex.quote(script)}"
            if slow
            else f"copy the model's {TOKENIZER} there, or its {SENTENCEPIECE}",
        )
    return path


def _slow_class(folder: Path, found: Sequence[str]) -> str | None:
    """The class of transformers that makes a tokenizer.json of the files found; None if none does.

    Where the folder names no class, transformers' own guess leaves out what Llama's puts before a
    text, and has none for byte-level files.
    """
    if SENTENCEPIECE not in found and not set(BYTE_LEVEL) <= set(found):
        return None
    for name in (TOKENIZER_CONFIG, CONFIG):
        data = json_object(folder / name) if (folder / name).is_file() else {}
        if isinstance(data.get("tokenizer_class"), str):
            return "AutoTokenizer"
    if SENTENCEPIECE in found:
        return "LlamaTokenizer"
    text = data.get("text_config")
    kinds = (data.get("model_type"), text.get("model_type") if isinstance(text, dict) else None)
    return "Qwen2Tokenizer" if "qwen2" in kinds else "GPT2Tokenizer"


def chat_template_of(folder: Path, places: Sequence[str] = TOKENIZER_PLACES) -> str:
    """As transformers looks for it: a file of its own, else within a JSON file.

    Args:
        places: those JSON files, the first that has one counts.

    Raises:
        CheckpointError: none there, or a file that can't be read.
    """
    path = folder / CHAT_TEMPLATE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {path}", found=str(error)) from error
    for name in places:
        if (folder / name).is_file():
            template = json_object(folder / name).get("chat_template")
            if isinstance(template, list):  # several, by name
                named = {
                    item.get("name"): item.get("template")
                    for item in template
                    if isinstance(item, dict)
                }
                template = named
            if isinstance(template, dict):
                template = template.get("default")
            if isinstance(template, str):
                return template
    raise CheckpointError(
        f"{folder} has no chat template",
        expected=f"{CHAT_TEMPLATE}, or a chat_template in {TOKENIZER_CONFIG}",
        fix=f"write the Jinja template of the model's prompts to {path}",
    )


def special_token(folder: Path, name: str) -> str:
    """What the tokenizer's config calls "bos_token" or "eos_token"; "" if nothing.

    Raises:
        CheckpointError: a file that can't be read.
    """
    path = folder / TOKENIZER_CONFIG
    found = json_object(path).get(name) if path.is_file() else None
    text = found.get("content") if isinstance(found, dict) else found
    return text if isinstance(text, str) else ""
