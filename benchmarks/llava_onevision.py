"""A LLaVA-OneVision-0.5B of true size and random weights, in the folder that transformers writes.

    python -m benchmarks.llava_onevision build/llava-onevision
    himix-edge scene --count 73 -o build/pictures
    himix-edge convert build/llava-onevision --calibration build/pictures -o build/c --judge 2
    himix-edge export --checkpoint build/c -o build/bundle
    himix-edge bench build/bundle --vs vanilla

Time and memory don't depend on the values of weights. It needs 2 GB of disk. The tokenizer knows
bytes; the prompts are of LLaVA-OneVision's form.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from himix_edge.config import DecoderConfig
from himix_edge.files import whole_folder
from himix_edge.models.shards import write_weights
from himix_edge.models.standin import byte_tokenizer
from himix_edge.models.weights import RandomWeight, Weight
from himix_edge.presets import DECODERS

VOCAB_SIZE, IMAGE_ID = 152_000, 151_646
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = {"<|im_start|>": 151_644, "<|im_end|>": 151_645, "<image>": IMAGE_ID}


@dataclass(frozen=True)
class HalfWeight:
    """A random weight, stored as the published model stores its own."""

    weight: RandomWeight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self) -> Tensor:
        return self.weight.read().to(torch.float16)

    def problem(self) -> None:
        """Never any."""


def config() -> LlavaOnevisionConfig:
    """llava-hf/llava-onevision-qwen2-0.5b-ov-hf's."""
    decoder: DecoderConfig = DECODERS["qwen2-0.5b"].decoder
    text = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=decoder.num_hidden_layers,
        num_attention_heads=decoder.num_attention_heads,
        num_key_value_heads=decoder.num_key_value_heads,
        max_position_embeddings=decoder.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=151_643,
        eos_token_id=SPECIAL["<|im_end|>"],
    )
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        architectures=["LlavaOnevisionForConditionalGeneration"],
    )


def weights_of(model: torch.nn.Module) -> dict[str, Weight]:
    """By the names of the published files, the tied head left out."""
    return {
        name: HalfWeight(RandomWeight(name, tuple(tensor.shape)))
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }


def tokenizer() -> str:
    """A `tokenizer.json` of bytes, with the control tokens of the prompts."""
    data = json.loads(byte_tokenizer(VOCAB_SIZE))
    vocabulary = data["model"]["vocab"]
    for content, i in SPECIAL.items():
        del vocabulary[f"<{i}>"]
        vocabulary[content] = i
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        data["added_tokens"].append({"id": i, "content": content, "special": True, **flags})
    return json.dumps(data)


def write(folder: Path) -> None:
    """The whole folder, or none."""
    said = config()
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(said)
    size = {"height": 384, "width": 384}
    mean = [0.5, 0.5, 0.5]
    preprocessor = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": size,
        "image_mean": mean,
        "image_std": mean,
        "resample": 3,
    }
    with whole_folder(folder) as temporary:
        said.save_pretrained(temporary)
        write_weights(temporary, weights_of(model))
        (temporary / "tokenizer.json").write_text(tokenizer(), encoding="utf-8")
        (temporary / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        path = temporary / "preprocessor_config.json"
        path.write_text(json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("folder", type=Path)
    write(arguments.parse_args().folder)
