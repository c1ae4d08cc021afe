"""A whole model in small: random weights, a tokenizer for any text, a chat template."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from himix_edge.bundle.files import BundleFiles
from himix_edge.config import (
    DecoderConfig,
    Design,
    HiMixConfig,
    PreprocessConfig,
    ProjectionConfig,
    VisionConfig,
    VisionFamily,
)
from himix_edge.contract import MANIFEST, FileRecord, Manifest
from himix_edge.models.checkpoints import Checkpoint, read_checkpoint, save_checkpoint
from himix_edge.models.himix import HiMix
from tests.models.reference import randomized

END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{{ '<|assistant|>' }}"
)
CORPUS = ("There is a small red circle and a large blue square.", "How many objects? describe")
VOCAB_SIZE = 300


def tiny_config(design: Design = "himix", **changes: Any) -> HiMixConfig:
    """2 layers, 4 image tokens, 2 heads to a key head; `changes` are fields of the decoder."""
    decoder = DecoderConfig(VOCAB_SIZE, 32, 64, 2, 4, 2, 16, 256, eos_token_ids=(0,))
    return HiMixConfig(
        VisionConfig(28, 14, 32, 64, 2, 4),
        dataclasses.replace(decoder, **changes),
        PreprocessConfig(28),
        design,
    )


def converted_config(family: VisionFamily = "clip", **changes: Any) -> HiMixConfig:
    """All that a converted model may have; 3 slots of a prefix, and 8 of 9 patches."""
    config = tiny_config(attention_bias=True, **changes)
    vision = dataclasses.replace(
        config.vision,
        model_type=family,
        image_size=42,
        num_hidden_layers=3,
        feature_layer=-2 if family == "siglip" else -1,
        joined_layers=(-3,),
        skipped_patches=1,
    )
    return HiMixConfig(
        vision,
        config.decoder,
        PreprocessConfig(42),
        projection=ProjectionConfig(neighbourhood=3, connector_size=24, bias=True),
        vision_key_rotation="slots",
        prefix_tokens=3,
    )


def tiny_model(config: HiMixConfig) -> HiMix:
    model = HiMix(config)
    randomized(model)
    return model


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE, trained on two sentences; END is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def tiny_checkpoint(folder: Path, config: HiMixConfig, **changes: str) -> Checkpoint:
    """Saves a random model; `changes` are texts of `save_checkpoint`, tokenizer_json and so on."""
    texts: dict[str, Any] = {
        "name": "tiny",
        "notice": "It knows nothing.",
        "tokenizer_json": tiny_tokenizer().to_str(),
        "chat_template": CHAT_TEMPLATE,
        "model_card": "# tiny\n",
    }
    save_checkpoint(folder, tiny_model(config), **{**texts, **changes})
    return read_checkpoint(folder)


def opened(folder: Path, manifest: Manifest) -> BundleFiles:
    """All that a folder holds, as a bundle of this manifest."""
    paths = (path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    files = {path.name: FileRecord.of(path) for path in paths}
    return BundleFiles(folder, dataclasses.replace(manifest, files=files))
