"""Tiny LLaVA models of every family, in folders that transformers itself writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests import tiny
from tests.models.reference import randomized

SIZE, PATCH = 28, 7  # 16 patches
VOCAB_SIZE = 600
IMAGE = "<image>"
VISION: dict[str, Any] = {
    "image_size": SIZE,
    "patch_size": PATCH,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,  # heads of 16
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
SYSTEM = "There is a picture. Describe it."
# As LLaVA-OneVision's, with a system prompt; its answers, too, follow "assistant\n".
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>' }}"
    "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As LLaVA-1.5's, with Vicuna's kind of system prompt.
VICUNA = (
    "{{ '" + SYSTEM + " ' }}{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] != 'assistant' %}{{ content['text'] + ' ' }}{% else %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def write_tiny_llava(folder: Path, family: str = "llava_onevision", **changes: Any) -> Path:
    """Writes a model with random weights.

    Args:
        family: "llava" (CLIP and Llama), "llava_siglip" (SigLIP and Qwen2), "llava_onevision"
            (SigLIP and Qwen2) or "tinyllava" (SigLIP and Llama).
        changes: fields of the family's config.
    """
    write_llava(folder, family, **changes)
    return folder


def write_llava(folder: Path, family: str, **changes: Any) -> Any:
    """Writes the folder, and returns transformers' model."""
    if family == "tinyllava":
        return write_tinyllava(folder, **changes)
    model = llava_model(family, **changes)
    model.save_pretrained(folder)
    processor(family).save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    return model


def llava_model(family: str, **changes: Any) -> Any:
    config = CONFIGS[family](**changes)
    onevision = family == "llava_onevision"
    kind = LlavaOnevisionForConditionalGeneration if onevision else LlavaForConditionalGeneration
    return strengthened(kind(config))


def strengthened(model: Any) -> Any:
    """Random weights under which all that was said counts: the attention is far from even."""
    randomized(model)
    for name, weight in model.named_parameters():
        if "language_model" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.mul_(2)
    model.tie_weights()
    return model


def _llava(**changes: Any) -> LlavaConfig:
    options: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(**VISION),
        "text_config": LlamaConfig(**TEXT),
        "image_token_index": image_id("llava"),
        "image_seq_length": 16,
    }
    return LlavaConfig(**{**options, **changes})


def _llava_siglip(**changes: Any) -> LlavaConfig:
    options: dict[str, Any] = {
        "vision_config": SiglipVisionConfig(**VISION, vision_use_head=False),
        "text_config": Qwen2Config(**TEXT, tie_word_embeddings=False),
        "image_token_index": image_id("llava_siglip"),
        "vision_feature_select_strategy": "full",
        "image_seq_length": 16,
    }
    return LlavaConfig(**{**options, **changes})


def _onevision(**changes: Any) -> LlavaOnevisionConfig:
    options: dict[str, Any] = {
        "vision_config": SiglipVisionConfig(**VISION, vision_use_head=False),
        "text_config": Qwen2Config(**TEXT, tie_word_embeddings=True),
        "image_token_index": image_id("llava_onevision"),
        "video_token_index": image_id("llava_onevision") + 1,
        "image_grid_pinpoints": [[SIZE, SIZE], [SIZE, 2 * SIZE], [2 * SIZE, SIZE]],
        "vision_feature_layer": -1,
        "tie_word_embeddings": True,
    }
    return LlavaOnevisionConfig(**{**options, **changes})


CONFIGS: dict[str, Callable[..., Any]] = {
    "llava": _llava,
    "llava_siglip": _llava_siglip,
    "llava_onevision": _onevision,
}


def write_tinyllava(folder: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """TinyLLaVA Factory's layout: its names over transformers' modules, its own config.

    Returns:
        the encoder, the decoder (transformers'), and the connector.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vision: Any = randomized(SiglipVisionModel(SiglipVisionConfig(**VISION)))
    language: Any = randomized(LlamaForCausalLM(LlamaConfig(**TEXT)))
    for name, weight in language.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.mul_(2)
    width, size = VISION["hidden_size"], TEXT["hidden_size"]
    connector = randomized(nn.Sequential(nn.Linear(width, size), nn.GELU(), nn.Linear(size, size)))
    tensors = {
        f"{place}.{name}": tensor.contiguous()
        for place, module in (
            ("vision_tower._vision_tower.vision_model", vision),
            ("language_model", language),
            ("connector._connector", connector),
        )
        for name, tensor in module.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "tinyllava",
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "llm_model_name_or_path": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "vision_model_name_or_path": "google/siglip-so400m-patch14-384",
        "connector_type": "mlp2x_gelu",
        "text_config": language.config.to_dict(),
        "vision_config": vision.config.to_dict(),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "image_aspect_ratio": "square",
        "image_token_index": -200,
    }
    changed = {k: v for k, v in {**config, **changes}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(changed, indent=2))
    metaspace_tokenizer().save(str(folder / "tokenizer.json"))
    return vision, language, connector


def processor(family: str) -> Any:
    square = {"height": SIZE, "width": SIZE}
    if family == "llava":
        return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=square)
    if family == "llava_onevision":
        half = [0.5, 0.5, 0.5]
        return LlavaOnevisionImageProcessorPil(
            size=square,
            image_mean=half,
            image_std=half,
            image_grid_pinpoints=[[SIZE, SIZE], [SIZE, 2 * SIZE], [2 * SIZE, SIZE]],
        )
    return SiglipImageProcessorPil(size=square)


def tokenizer(family: str) -> Any:
    tokenizer_class: Any = PreTrainedTokenizerFast
    if family == "llava":
        return tokenizer_class(
            tokenizer_object=metaspace_tokenizer([IMAGE]),
            bos_token="<s>",
            eos_token="</s>",
            chat_template=VICUNA,
        )
    return tokenizer_class(
        tokenizer_object=bytelevel_tokenizer(), eos_token=tiny.END, chat_template=CHATML
    )


def image_id(family: str) -> int:
    found = metaspace_tokenizer([IMAGE]) if family == "llava" else bytelevel_tokenizer()
    token = found.token_to_id(IMAGE)
    assert token is not None
    return int(token)


def bytelevel_tokenizer() -> Tokenizer:
    """Qwen2's kind."""
    made = tiny.tiny_tokenizer()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", IMAGE, "<video>"])
    return made


def metaspace_tokenizer(special: list[str] | None = None, scheme: str = "legacy") -> Tokenizer:
    """Llama's kind: words begin with "▁", unknown characters are bytes, "<s>" opens a text.

    Args:
        scheme: "legacy" puts a "▁" before every piece of text between special tokens, as Llama's
            first files do; "first" before the first alone, as later ones.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    trained.train_from_iterator((*tiny.CORPUS, SYSTEM, "USER: ASSISTANT: A chat between"), trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    made = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if scheme == "legacy":
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>", *(special or [])])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made
