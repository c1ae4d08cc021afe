"""Folders that look like a model and are none that can be read here, refused by what they are.

adapter_config.json, adapter_model.*    an adapter (LoRA) of PEFT
non_lora_trainables.bin                 one of LLaVA's own training
mm_projector.bin                        a LLaVA's projector alone, as its pretraining leaves it
mm_vision_tower, LlavaLlamaForCausalLM  a whole model in LLaVA's own layout
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from himix_edge.errors import CheckpointError
from himix_edge.models.hub import CONFIG, json_object

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
PROJECTOR = "mm_projector"
EXAMPLE = "llava-hf/llava-1.5-7b-hf"
SCRIPT = (
    "convert_llava_weights_to_hf.py of transformers' repository (src/transformers/models/llava)"
)
# What LLaVA's own code names its classes and its model_types.
OWN_CLASS = re.compile(r"Llava\w*ForCausalLM")
OWN_TYPE = re.compile(r"llava_(llama|mpt|mistral|mixtral|qwen|qwen_moe|gemma)")


def refuse_other_kinds(folder: Path) -> None:
    """Lets every folder pass but those of the kinds above.

    Raises:
        CheckpointError: one of these; it says which, and what to do with it.
    """
    config = json_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if (folder / ADAPTER_CONFIG).is_file() or any((folder / n).is_file() for n in ADAPTER_FILES):
        raise _adapter(folder, config)
    signs = list(_signs_of_own_layout(config))
    projectors = sorted(path.name for path in folder.glob(f"{PROJECTOR}*"))
    if projectors and not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} has a LLaVA's projector alone, without encoder and decoder",
            expected=f"a whole model, such as {EXAMPLE}",
            found=", ".join([*projectors, *signs]),
            fix="name the folder or hub id of the whole model; one of your own training is made "
            f"whole by LLaVA's code, and brought into transformers' layout by {SCRIPT}",
        )
    if signs:
        raise CheckpointError(
            f"{folder} is in the layout of LLaVA's own code",
            expected=f"transformers' layout, whose hub ids end in -hf, such as {EXAMPLE}",
            found=", ".join(signs),
            fix=f"name {_hf_id(config)}; or bring this one into that layout with {SCRIPT}",
        )


def is_own_layout(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of LLaVA's own code."""
    return next(_signs_of_own_layout(config), None) is not None


def _signs_of_own_layout(config: Mapping[str, Any]) -> Iterator[str]:
    if "text_config" in config:  # as transformers has it, and TinyLLaVA
        return
    architectures = config.get("architectures")
    for name in architectures if isinstance(architectures, list) else ():
        if isinstance(name, str) and OWN_CLASS.fullmatch(name):
            yield name
    kind = config.get("model_type")
    if isinstance(kind, str) and OWN_TYPE.fullmatch(kind):
        yield f"model_type {kind}"
    yield from (name for name in ("mm_vision_tower", "mm_projector_type") if name in config)


def _hf_id(config: Mapping[str, Any]) -> str:
    """The same model in transformers' layout, as far as a config tells which that is."""
    kind = str(config.get("model_type")) + str(config.get("architectures"))
    if "qwen" in kind.lower():
        small = config.get("hidden_size") == 896
        return f"llava-hf/llava-onevision-qwen2-{'0.5b' if small else '7b'}-ov-hf"
    if config.get("hidden_size") == 5120:
        return "llava-hf/llava-1.5-13b-hf"
    return f"the same model's, such as {EXAMPLE}"


def _adapter(folder: Path, config: Mapping[str, Any]) -> CheckpointError:
    path = folder / ADAPTER_CONFIG
    adapter = json_object(path) if path.is_file() else {}
    base = adapter.get("base_model_name_or_path")
    kind = adapter.get("peft_type")
    name = kind if isinstance(kind, str) and kind not in ("LORA", "") else "LoRA"
    own_code = is_own_layout(config) or (folder / "non_lora_trainables.bin").is_file()
    fix = (
        "merge it into its base with LLaVA's scripts/merge_lora_weights.py, and bring the whole "
        f"into transformers' layout with {SCRIPT}"
        if own_code
        else _merge_command(folder, adapter, str(base or "BASE"))
    )
    return CheckpointError(
        f"{folder} is an adapter ({name}), no whole model",
        expected="the weights of a whole model",
        found=f"changes to those of {base}" if isinstance(base, str) and base else "changes alone",
        fix=fix,
    )


def _merge_command(folder: Path, adapter: Mapping[str, Any], base: str) -> str:
    language = adapter.get("task_type") == "CAUSAL_LM" and "llava" not in base.lower()
    model = "AutoModelForCausalLM" if language else "AutoModelForImageTextToText"
    texts = "AutoTokenizer" if language else "AutoProcessor"
    merged = str(folder.with_name(f"{folder.resolve().name}-merged"))
    base, source, target = (json.dumps(text) for text in (base, str(folder), merged))
    script = (
        f"from transformers import {model}, {texts}; from peft import PeftModel; "
        f"whole = {model}.from_pretrained({base}); "
        f"PeftModel.from_pretrained(whole, {source}).merge_and_unload().save_pretrained({target}); "
        f"{texts}.from_pretrained({base}).save_pretrained({target})"
    )
    return (
        f"pip install peft, and name {merged} once you merged it into its base with: "
        f"python -c {shlex.quote(script)}"
    )
