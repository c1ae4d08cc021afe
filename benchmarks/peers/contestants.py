"""Who takes part: every peer's decoders and encoders, and HiMix's bundles, by quantization class.

A vanilla pair of a peer is its encoder in the fastest form that the class admits and its decoder,
through which all N + M tokens go. An environment is a folder of virtual environments' name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CLASSES = ("int4", "int8", "fp32")
IMAGE_TOKENS = {"tinyclip": 196, "siglip": 729}
TEXT_TOKENS = 64
HIMIX = "HiMix"
# llama.cpp's own encoders take no model of random weights without a converter for each; of its
# pairs, the encoder is whichever peer's is fastest.
MTMD = "llama.cpp's own encoder (mtmd) was not run: it needs a projector file that no tool of it "
MTMD += "makes of these weights; its decoder is paired with the fastest encoder of all peers"

Role = tuple[str, str, dict[str, Any]]  # module, class, options


@dataclass(frozen=True)
class Contestant:
    """One process.

    Attributes:
        name: unique, and what tables call it.
        peer: whose; HIMIX is ours.
        classes: the quantization classes in which it counts.
        environment: whose Python runs it; "" is this one.
        roles: what it does, and who does it; see `worker.py`.
        encoder: the name of the encoder that it is, or that its bundle has.
    """

    name: str
    peer: str
    classes: tuple[str, ...]
    environment: str
    roles: dict[str, Role]
    encoder: str = ""

    def python(self, environments: Path) -> str:
        """The interpreter."""
        if not self.environment:
            return sys.executable
        return str(environments / self.environment / "bin" / "python")


def decoders(models: Path) -> list[Contestant]:
    """The peers' decoders."""
    genai, openvino = ("on_genai", "Decoder"), ("on_openvino", "Decoder")
    llama, torch = ("on_llamacpp", "Decoder"), ("on_torch", "Decoder")
    coarse = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}  # activations to a scale; 32 by default
    rows: list[tuple[str, str, str, tuple[str, str], str, dict[str, Any]]] = [
        ("GenAI int4, block 32", "GenAI", "int4", genai, "genai-int4-32-fused", {}),
        ("GenAI int4, block 128", "GenAI", "int4", genai, "genai-int4-128", {}),
        ("OpenVINO int4", "OpenVINO", "int4", openvino, "openvino-int4", {}),
        ("OpenVINO int4, by 128", "OpenVINO", "int4", openvino, "openvino-int4", coarse),
        ("llama.cpp Q4_0", "llama.cpp", "int4", llama, "llama/q4_0.gguf", {}),
        ("GenAI int8", "GenAI", "int8", genai, "genai-int8-128", {}),
        ("OpenVINO int8", "OpenVINO", "int8", openvino, "openvino-int8", {}),
        ("OpenVINO int8, by 128", "OpenVINO", "int8", openvino, "openvino-int8", coarse),
        ("llama.cpp Q8_0", "llama.cpp", "int8", llama, "llama/q8_0.gguf", {}),
        ("GenAI fp32", "GenAI", "fp32", genai, "genai-fp32", {}),
        ("llama.cpp F16", "llama.cpp", "fp32", llama, "llama/f16.gguf", {}),
        ("transformers fp32", "transformers", "fp32", torch, "hf", {}),
    ]
    environment = {"GenAI": "genai", "OpenVINO": "openvino", "llama.cpp": "llamacpp"}
    return [
        Contestant(
            name,
            peer,
            (group,),
            environment.get(peer, "transformers"),
            {"answer": (*who, {"file" if who is llama else "folder": str(models / place)} | extra)},
        )
        for name, peer, group, who, place, extra in rows
    ]


def encoders(models: Path) -> list[Contestant]:
    """The peers' encoders in each form; one that isn't fp32 has no place in the fp32 class."""
    fp32 = {"INFERENCE_PRECISION_HINT": "f32"}
    ort, openvino = ("on_onnxruntime", "Encoder"), ("on_openvino", "Encoder")
    rows: list[tuple[str, str, bool, tuple[str, str], str, dict[str, str]]] = [
        ("ONNX Runtime fp32", "GenAI", True, ort, "/fp32.onnx", {}),
        ("ONNX Runtime int8", "GenAI", False, ort, "-onnxruntime/int8.onnx", {}),
        ("OpenVINO fp32", "OpenVINO", True, openvino, "/fp32.onnx", fp32),
        ("OpenVINO default", "OpenVINO", False, openvino, "/fp32.onnx", {}),
        ("OpenVINO int8 weights", "OpenVINO", False, openvino, "-openvino/int8-weights.xml", {}),
        ("OpenVINO int8 static", "OpenVINO", False, openvino, "-openvino/int8-static.xml", {}),
        ("torch fp32", "transformers", True, ("on_torch", "Encoder"), "/fp32.safetensors", {}),
    ]
    return [
        Contestant(
            f"{encoder}: {name}",
            peer,
            CLASSES if exact else ("int4", "int8"),
            {"GenAI": "genai", "OpenVINO": "openvino"}.get(peer, "transformers"),
            {"encode": (*who, {"file": f"{models}/{encoder}{file}"} | options)},
            encoder,
        )
        for encoder in IMAGE_TOKENS
        for name, peer, exact, who, file, options in rows
    ]


def himix(bundles: dict[str, Path], picture: Path) -> list[Contestant]:
    """HiMix's bundles, named "tinyclip-int4", "tinyclip-int4-small" and the like."""
    found = []
    for name, bundle in bundles.items():
        encoder, group, *_ = name.split("-")
        role: Role = ("on_himix", "Pair", {"bundle": str(bundle), "picture": str(picture)})
        roles = {"encode": role, "answer": role}
        found.append(Contestant(f"{HIMIX} {name}", HIMIX, (group,), "", roles, encoder))
    return found


def pair(decoder: Contestant, encoder: Contestant | None) -> Contestant:
    """Both in one process; the decoder alone where there's no encoder for it."""
    roles = dict(decoder.roles)
    name = decoder.name
    if encoder:
        roles |= encoder.roles
        name = f"{decoder.name} + {encoder.name}"
    return Contestant(name, decoder.peer, decoder.classes, decoder.environment, roles)
