"""An engine whose every answer can be worked out by hand, and small tokenizers for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from himix_edge.config import DecoderConfig, HiMixConfig, PreprocessConfig, VisionConfig
from himix_edge.contract import SCHEMA_VERSION, Chat, FileRecord, Manifest
from himix_edge.runtimes.base import FloatArray, IntArray, VisionKV
from himix_edge.runtimes.chat import ChatTemplate
from himix_edge.runtimes.kvcache import Cache
from himix_edge.runtimes.tokenizer import Tokenizer

END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
END_ID = 0
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<|user|>{{ message.content }}"
    "{% else %}<|assistant|>{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = ChatTemplate(CHAT_TEMPLATE, Chat())
VOCAB_SIZE = 3 + 256
IMAGE_SLOTS = 9

# What comes next, given the image's number, all text ids and their positions.
Rule = Callable[[int, list[int], list[int]], int]


class FakeEngine:
    """The likeliest next token is whatever a rule says; the image is the sum of its pixels."""

    def __init__(self, rule: Rule, capacity: int = 10_000, text_offset: int = 0) -> None:
        self.rule, self.capacity, self.text_offset = rule, capacity, text_offset
        self.fed: list[list[int]] = []  # the tokens of every step

    def encode(self, pixel_values: FloatArray) -> VisionKV:
        return VisionKV((round(float(pixel_values.sum())), (), ()), IMAGE_SLOTS)

    def open(self, image: VisionKV | None) -> Cache:
        assert image is not None
        slots = image.slots
        return Cache(image.tensors, slots, slots, self.text_offset, slots + self.capacity)

    def prefill(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        return self.step(input_ids, cache)

    def step(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        tokens, positions = input_ids[0], cache.next_positions(*input_ids.shape)[0]
        image, text, places = cache.tensors
        text, places = (*text, *tokens.tolist()), (*places, *positions.tolist())
        cache.advance((image, text, places), len(tokens))
        self.fed.append(tokens.tolist())
        logits = np.zeros((1, VOCAB_SIZE), np.float32)
        logits[0, self.rule(image, list(text), list(places))] = 1
        return logits

    def rewind(self, cache: Cache, count: int) -> None:
        image, text, places = cache.tensors
        cache.move_to((image, text[:count], places[:count]))
        cache.rewind(count)


def arithmetic(image: int, text: list[int], positions: list[int]) -> int:
    """A printable character that depends on the image, on every token and on every position."""
    total = 7 * image + sum((t + 1) * (p + 1) for t, p in zip(text, positions, strict=True))
    return 3 + 0x20 + total % 90


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Three control tokens, then one token for every byte: id 3 + b is byte b."""
    alphabet = _byte_level_characters()
    vocab = {END: 0, USER: 1, ASSISTANT: 2} | {alphabet[b]: 3 + b for b in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (END, USER, ASSISTANT)])
    return tokenizer


def tokenizer_at(path: Path, chat: ChatTemplate) -> Tokenizer:
    """Ours, of a file."""
    return Tokenizer(path.read_bytes(), chat, path)


def ids_of(text: str) -> list[int]:
    """Text without control tokens, as `byte_tokenizer` encodes it."""
    return [3 + b for b in text.encode()]


def tiny_config(design: str = "himix", max_position_embeddings: int = 64) -> HiMixConfig:
    """9 image tokens, 2 layers, 2 key heads for 4 query heads."""
    return HiMixConfig.from_dict(
        HiMixConfig(
            vision=VisionConfig(
                image_size=24,
                patch_size=8,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
            ),
            decoder=DecoderConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                max_position_embeddings=max_position_embeddings,
                tie_word_embeddings=False,  # tied at random, it says one token for ever
                eos_token_ids=(END_ID,),
            ),
            preprocess=PreprocessConfig(image_size=24),
        ).to_dict()
        | {"design": design}
    )


def manifest(config: HiMixConfig, folder: Path | None = None) -> Manifest:
    """A manifest, with a record of every file in the folder."""
    files = sorted(folder.iterdir()) if folder else []
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name="tiny",
        notice="It knows nothing.",
        dialect="portable",
        dtype="float32",
        config=config,
        chat=CHAT.chat,
        files={path.name: FileRecord.of(path) for path in files},
        tools={},
        parity={},
    )


def _byte_level_characters() -> list[str]:
    """GPT-2's table: printable bytes are themselves, the others come from 256 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b if b in printable else 256 + others.index(b)) for b in range(256)]
