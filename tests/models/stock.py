"""Tiny models of the true architectures, in folders that transformers itself writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests import tiny
from tests.models.reference import randomized

SIZE = 30  # with patches of 7: four whole ones, and two pixels over
VISION: dict[str, Any] = {
    "image_size": SIZE,
    "patch_size": 7,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "layer_norm_eps": 0.01,
}
TEXT: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "CLIPModel": lambda: CLIPModel(
        CLIPConfig(vision_config={**VISION, "hidden_act": "gelu"}, text_config=TEXT)
    ),
    "CLIPVisionModel": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "CLIPVisionModelWithProjection": lambda: CLIPVisionModelWithProjection(
        CLIPVisionConfig(**VISION)
    ),
    "SiglipModel": lambda: SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)),
    "SiglipVisionModel": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
}
DECODER: dict[str, Any] = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 7,
    "bos_token_id": 1,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DECODERS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER, tie_word_embeddings=True)),
    "qwen2-untied": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            **{**DECODER, "rms_norm_eps": 0.01},
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=False)),
    "llama3": lambda: LlamaForCausalLM(
        LlamaConfig(
            **DECODER,
            head_dim=16,
            tie_word_embeddings=True,
            rope_parameters={**LLAMA3, "rope_theta": 500.0},
        )
    ),
    "smollm2": lambda: LlamaForCausalLM(
        LlamaConfig(
            **{**DECODER, "hidden_size": 60, "num_attention_heads": 15, "num_key_value_heads": 5},
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        )
    ),
}


def write_encoder(folder: Path, kind: str, **options: Any) -> Any:
    model = randomized(ENCODERS[kind]())
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    processor(kind).save_pretrained(folder)
    return model


def processor(kind: str) -> Any:
    if kind.startswith("CLIP"):
        return CLIPImageProcessorPil(
            size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
        )
    return SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})


def write_decoder(folder: Path, kind: str, **options: Any) -> Any:
    model: Any = randomized(DECODERS[kind]())
    if model.config.tie_word_embeddings:
        model.tie_weights()
    model.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return model


def tokenizer() -> Any:
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(
        tokenizer_object=tiny.tiny_tokenizer(), eos_token=tiny.END, chat_template=tiny.CHAT_TEMPLATE
    )


def edit(path: Path, **changes: Any) -> None:
    """Sets (or with ... as the value removes) keys of a JSON file."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))
