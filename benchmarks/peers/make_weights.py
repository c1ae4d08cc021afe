"""Random weights at true size: a Hugging Face folder of the decoder, an ONNX file of each encoder.

    python make_weights.py decoder FOLDER CONFIG_JSON
    python make_weights.py encoder FILE CONFIG_JSON

Runs in GenAI's environment, which has torch, transformers and onnx. An encoder is what a vanilla
model runs of it: all layers up to the one whose features it takes, and the connector of two linear
maps (Linear, GELU, Linear) into the decoder's width.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

ALPHABET = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves


def make_decoder(folder: Path, config: dict[str, Any]) -> None:
    """A Qwen2 of that shape, and a tokenizer of as many ids: bytes, then "<256>" and so on."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**config)).save_pretrained(folder)
    vocabulary = config["vocab_size"]
    tokens = [chr(i) for i in ALPHABET] + [chr(256 + i) for i in range(256 - len(ALPHABET))]
    tokens += [f"<{i}>" for i in range(len(tokens), vocabulary)]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "use_regex": False,
        "trim_offsets": False,
    }
    bpe = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": byte_level}
    tokenizer |= {"decoder": byte_level, "model": bpe}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    special = dict.fromkeys(("eos_token", "pad_token", "unk_token"), f"<{config['eos_token_id']}>")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    settings["chat_template"] = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


class Encoder(nn.Module):
    """pixel_values [1, 3, H, W] -> embeddings [1, N, h] for a decoder of width h."""

    def __init__(self, kind: str, config: dict[str, Any], width: int) -> None:
        super().__init__()
        from transformers import (
            CLIPVisionConfig,
            CLIPVisionModel,
            SiglipVisionConfig,
            SiglipVisionModel,
        )

        torch.manual_seed(0)
        if kind == "siglip":
            self.tower: nn.Module = SiglipVisionModel(
                SiglipVisionConfig(**config, vision_use_head=False)
            )
        else:
            self.tower = CLIPVisionModel(CLIPVisionConfig(**config))
        self.skipped = 0 if kind == "siglip" else 1  # CLIP's class token
        hidden = config["hidden_size"]
        self.connector = nn.Sequential(nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As above."""
        tower = getattr(self.tower, "vision_model", self.tower)
        hidden = tower.embeddings(pixel_values)
        if self.skipped:
            hidden = tower.pre_layrnorm(hidden)
        hidden = tower.encoder(inputs_embeds=hidden).last_hidden_state
        return self.connector(hidden[:, self.skipped :])


def make_encoder(file: Path, config: dict[str, Any]) -> None:
    """The ONNX file of an encoder, weights beside it, and its torch weights."""
    width, kind = config.pop("width"), config.pop("kind")
    model = Encoder(kind, config, width).eval()
    size = config["image_size"]
    file.parent.mkdir(parents=True, exist_ok=True)
    save_encoder(file.with_suffix(".safetensors"), model, kind, config, width)
    torch.onnx.export(
        model,
        (torch.zeros(1, 3, size, size),),
        str(file),
        input_names=["pixel_values"],
        output_names=["embeddings"],
        opset_version=20,
        external_data=True,
        dynamo=True,
    )


def save_encoder(file: Path, model: Encoder, kind: str, config: dict[str, Any], width: int) -> None:
    """The weights, and what they are the weights of."""
    described = json.dumps({"kind": kind, "config": config, "width": width})
    save_file(model.state_dict(), file, metadata={"encoder": described})


def read_encoder(file: Path) -> Encoder:
    """What `save_encoder` wrote."""
    with safe_open(file, framework="pt") as stored:
        described = json.loads(stored.metadata()["encoder"])
    with torch.device("meta"):
        model = Encoder(described["kind"], described["config"], described["width"])
    model.load_state_dict(load_file(file), assign=True)
    positions = model.tower.embeddings.position_ids  # no weight, so not stored
    model.tower.embeddings.position_ids = torch.arange(positions.shape[-1])[None]
    return model.eval()


if __name__ == "__main__":
    make = {"decoder": make_decoder, "encoder": make_encoder}[sys.argv[1]]
    make(Path(sys.argv[2]), json.loads(sys.argv[3]))
