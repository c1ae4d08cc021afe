"""Adapters, projectors and LLaVA's own layout, wherever a model is asked for."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from himix_edge.convert.source import teacher_from_folder
from himix_edge.errors import CheckpointError
from himix_edge.models.checkpoints import read_checkpoint
from himix_edge.models.folder_kind import refuse_other_kinds
from himix_edge.models.huggingface import decoder_from_folder, encoder_from_folder
from tests.models.stock import edit, write_decoder, write_encoder

OWN: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "hidden_size": 64,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu",
}  # fmt: skip
LORA = {"peft_type": "LORA", "base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}
READERS: dict[str, Callable[[Path], object]] = {
    "convert": teacher_from_folder,
    "checkpoint": read_checkpoint,
    "decoder": decoder_from_folder,
    "encoder": encoder_from_folder,
}


def folder(place: Path, **files: Any) -> Path:
    """Files by name, with __ for dots: JSON, or tensors where there is only a name."""
    place.mkdir()
    for name, content in files.items():
        path = place / name.replace("__", ".")
        if content is not None:
            path.write_text(json.dumps(content))
        elif path.suffix == ".bin":
            torch.save({"x": torch.ones(2)}, path)
        else:
            save_file({"x": torch.ones(2)}, path)
    return place


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "own layout": (
        {"config__json": OWN, "model__safetensors": None},
        r"in the layout of LLaVA's own code.*LlavaLlamaForCausalLM.*mm_vision_tower.*such as "
        r"llava-hf/llava-1\.5-7b-hf; or .*convert_llava_weights_to_hf",
    ),
    "its first model_type": (
        {"config__json": {**OWN, "model_type": "llava", "architectures": None}},
        r"own code.*found mm_vision_tower",
    ),
    "13b": (
        {"config__json": {**OWN, "model_type": "llava", "hidden_size": 5120}},
        r"name llava-hf/llava-1\.5-13b-hf; or",
    ),
    "onevision": (
        {"config__json": {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen",
                          "hidden_size": 896}, "model__safetensors": None},
        r"LlavaQwenForCausalLM, model_type llava_qwen.*llava-onevision-qwen2-0\.5b-ov-hf",
    ),
    "mistral": (
        {"config__json": {"architectures": ["LlavaMistralForCausalLM"]}},
        "found LlavaMistralForCausalLM",
    ),
    "adapter": (
        {"adapter_config__json": LORA, "adapter_model__safetensors": None},
        r"is an adapter \(LoRA\).*changes to those of llava-hf/llava-1\.5-7b-hf.*pip install peft",
    ),
    "adapter in a .bin": (
        {"adapter_config__json": {"peft_type": "IA3"}, "adapter_model__bin": None},
        r"is an adapter \(IA3\).*found changes alone",
    ),
    "adapter with a config": (
        {"adapter_config__json": LORA, "config__json": {"model_type": "qwen2"}},
        r"is an adapter \(LoRA\)",
    ),
    "LLaVA's adapter": (
        {"config__json": OWN, "adapter_config__json": LORA, "non_lora_trainables__bin": None},
        r"is an adapter \(LoRA\).*merge_lora_weights\.py.*convert_llava_weights_to_hf",
    ),
    "projector": (
        {"mm_projector__bin": None},
        r"LLaVA's projector alone.*found mm_projector\.bin\. .*whole model",
    ),
    "pretraining": (
        {"config__json": OWN, "mm_projector__bin": None, "trainer_state__json": {}},
        r"LLaVA's projector alone.*mm_projector\.bin, LlavaLlamaForCausalLM",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", CASES)
def test_each_is_named(tmp_path: Path, case: str, reader: str) -> None:
    files, message = CASES[case]
    place = folder(tmp_path / "it", **files)
    with pytest.raises(CheckpointError, match=message) as error:
        READERS[reader](place)
    assert "\n" not in str(error.value)
    assert str(place) in error.value.failed


def test_the_command_line_says_so(tmp_path: Path, himix: Any) -> None:
    place = folder(tmp_path / "own", config__json=OWN)
    (tmp_path / "pictures").mkdir()
    options = ("--calibration", tmp_path / "pictures", "-o", tmp_path / "out")
    for command in (
        ("convert", place, *options),
        ("export", "--from", place, *options),
        ("export", "--checkpoint", place),
        ("export", "--encoder", place, "--decoder", "qwen2-0.5b"),
        ("export", "--encoder", "tinyclip-39m", "--decoder", place),
    ):
        done = himix(*command)
        assert done.code == 1
        [line] = [line for line in done.err.splitlines() if line.startswith("Error: ")]
        assert "in the layout of LLaVA's own code" in line


def test_models_pass(tmp_path: Path) -> None:
    write_decoder(tmp_path / "decoder", "llama")
    write_encoder(tmp_path / "encoder", "CLIPModel")
    for place in (tmp_path / "decoder", tmp_path / "encoder", tmp_path):
        refuse_other_kinds(place)
    with pytest.raises(CheckpointError, match=r"no HiMix checkpoint.*decoder of model_type 'llama'"
                       r".*name it with --decoder .*/decoder, beside an --encoder"):  # fmt: skip
        read_checkpoint(tmp_path / "decoder")
    with pytest.raises(CheckpointError, match=r"no HiMix checkpoint.*vision encoder.*'clip'"):
        read_checkpoint(tmp_path / "encoder")
    edit(tmp_path / "decoder" / "config.json", model_type="llava_onevision")
    with pytest.raises(CheckpointError, match=r"'llava_onevision'.*himix-edge convert .*/decoder"):
        read_checkpoint(tmp_path / "decoder")


def test_the_command_to_merge_names_every_place(tmp_path: Path) -> None:
    """Quoted for a shell, and for Python within it."""
    place = folder(
        tmp_path / 'it\'s "mine"',
        adapter_config__json={**LORA, "base_model_name_or_path": "a \"b\" 'c'"},
    )
    with pytest.raises(CheckpointError) as error:
        refuse_other_kinds(place)
    _, command = str(error.value).split("with: ")
    python, option, script = shlex.split(command)
    assert (python, option) == ("python", "-c")
    compile(script, "advice", "exec")
    for text in (str(place), f"{place}-merged", "a \"b\" 'c'"):
        assert json.dumps(text) in script
    shutil.rmtree(place)


def test_an_adapter_of_a_decoder_is_merged_as_one(tmp_path: Path) -> None:
    adapter = {**LORA, "base_model_name_or_path": "Qwen/Qwen2-0.5B", "task_type": "CAUSAL_LM"}
    place = folder(tmp_path / "it", adapter_config__json=adapter)
    with pytest.raises(CheckpointError, match=r"AutoModelForCausalLM, AutoTokenizer"):
        decoder_from_folder(place)
