"""Environments and models of the peers. What fails is noted, and the rest goes on without it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.contestants import HERE
from himix_edge.files import whole_file, whole_folder
from himix_edge.presets import DECODERS, ENCODERS, preset

FAILURES = (
    "failures.json"  # what has failed, with its error; in the environments' and models' folders
)
ENVIRONMENTS = ("genai", "openvino", "transformers", "llamacpp")
PRESETS = {"tinyclip": "tinyclip-39m", "siglip": "siglip-so400m-384"}
DECODER = "qwen2-0.5b"
GENAI = {  # the builder's options; what it computes of the head is the last token's logits alone
    "genai-int4-32-fused": ("int4", "block_size=32", "accuracy_level=4", "fuse_mlp_gate_up=true"),
    "genai-int4-128": ("int4", "block_size=128", "accuracy_level=4", "fuse_mlp_gate_up=true"),
    "genai-int8-128": ("int8", "block_size=128", "accuracy_level=4", "fuse_mlp_gate_up=true"),
    "genai-fp32": ("fp32",),
}
OPENVINO = {  # of optimum-intel's export
    "openvino-int4": ["--weight-format", "int4", "--group-size", "128", "--ratio", "1.0", "--sym"],
    "openvino-int8": ["--weight-format", "int8"],
}
ERROR_TAIL = 1500  # characters

OUTPUT = "{output}"  # in a command: the folder that it fills
SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
)

Say = Callable[[str], None]
Command = list[str | Path]


class StepError(Exception):
    """A command that failed, with the last lines that it wrote."""


def setup(environments: Path, say: Say) -> int:
    """A virtual environment for each peer; returns how many failed."""
    failures: dict[str, str] = {}
    for name in ENVIRONMENTS:
        say(f"installing {name}")
        pip = str(environments / name / "bin" / "pip")
        wanted = HERE / "requirements" / f"{name}.txt"
        try:
            run([sys.executable, "-m", "venv", environments / name])
            run([pip, "install", "-q", "-r", wanted], CMAKE_ARGS="-DGGML_NATIVE=ON")
            if name == "openvino":  # optimum's torchvision does not fit torch for the CPU
                run([pip, "uninstall", "-q", "-y", "torchvision"])
        except StepError as error:
            failures[f"setup of {name}"] = str(error)
    return note(environments, failures, say)


def make(environments: Path, models: Path, say: Say) -> int:
    """All models that aren't there yet; returns how many failed."""
    failures: dict[str, str] = {}
    models.mkdir(parents=True, exist_ok=True)
    for name, (command, *arguments) in recipes(environments, models).items():
        if (models / name).exists():
            continue
        say(f"making {name}")
        try:
            with whole_folder(models / name) as partial:
                run([command, *(str(one).replace(OUTPUT, str(partial)) for one in arguments)])
        except StepError as error:
            failures[f"making {name}"] = str(error)
    return note(models, failures, say)


def recipes(environments: Path, models: Path) -> dict[str, Command]:
    """By folder, in an order in which each finds what it is made of: the command that fills it."""
    genai, openvino, llama = (
        environments / name / "bin" / "python" for name in ("genai", "openvino", "llamacpp")
    )
    hf, weights, forms = models / "hf", HERE / "make_weights.py", HERE / "make_encoders.py"
    made: dict[str, Command] = {
        "hf": [genai, weights, "decoder", OUTPUT, json.dumps(decoder_config())],
        "llama": [llama, HERE / "make_gguf.py", hf, OUTPUT],
    }
    for name in PRESETS:
        file, config = models / name / "fp32.onnx", json.dumps(encoder_config(name))
        made[name] = [genai, weights, "encoder", f"{OUTPUT}/fp32.onnx", config]
        made[f"{name}-onnxruntime"] = [genai, forms, "onnxruntime", file, OUTPUT]
        made[f"{name}-openvino"] = [openvino, forms, "openvino", file, OUTPUT]
    for name, (precision, *extra) in GENAI.items():
        builder: Command = [genai, "-m", "onnxruntime_genai.models.builder", "-i", hf, "-o", OUTPUT]
        target: Command = ["-p", precision, "-e", "cpu", "-c", models / "cache"]
        options = ["--extra_options", "prune_lm_head=true", "hf_token=false", *extra]
        made[name] = [*builder, *target, *options]
    for name, how in OPENVINO.items():
        export: Command = [openvino.with_name("optimum-cli"), "export", "openvino", "-m", hf]
        made[name] = [*export, "--task", "text-generation-with-past", *how, OUTPUT]
    return made


def decoder_config() -> dict[str, Any]:
    """The preset in the words of transformers."""
    decoder = preset("decoder", DECODERS, DECODER).decoder
    end, begin = decoder.eos_token_ids
    ids = {"eos_token_id": end, "bos_token_id": begin}
    return {name: getattr(decoder, name) for name in SAME_NAMES} | ids


def encoder_config(name: str) -> dict[str, Any]:
    """The layers up to the one whose features are taken, and the width of the decoder."""
    vision = preset("encoder", ENCODERS, PRESETS[name]).vision
    config = dataclasses.asdict(vision)
    taken = config.pop("feature_layer")
    return config | {
        "num_hidden_layers": vision.num_hidden_layers + 1 + taken,
        "kind": config.pop("model_type"),
        "width": preset("decoder", DECODERS, DECODER).decoder.hidden_size,
    }


def run(command: Command, **variables: str) -> None:
    """Runs a command to its end.

    Raises:
        StepError: it failed, or there is no such program.
    """
    try:
        done = subprocess.run(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | variables,
            check=False,
        )
    except OSError as error:
        raise StepError(str(error)) from error
    if done.returncode:
        raise StepError(done.stdout.strip()[-ERROR_TAIL:])


def note(folder: Path, failures: dict[str, str], say: Say) -> int:
    """Writes down what failed, for the results."""
    for what, error in failures.items():
        say(f"{what} failed: {error}")
    with whole_file(folder / FAILURES) as file:
        file.write_text(json.dumps(failures, indent=1) + "\n")
    return len(failures)


def noted(folder: Path) -> dict[str, str]:
    """What `note` wrote; nothing where it never ran."""
    file = folder / FAILURES
    return dict(json.loads(file.read_text())) if file.exists() else {}
