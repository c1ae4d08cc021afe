"""The model in torch behind the runtimes' protocol: what a bundle's answers are compared with."""

from __future__ import annotations

from pathlib import Path

import torch

from himix_edge.contract import TOKENIZER, Chat
from himix_edge.export.bundle import manifest_of
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.models.decoder import KV
from himix_edge.models.himix import HiMix
from himix_edge.runtimes import Model
from himix_edge.runtimes.base import FloatArray, IntArray, VisionKV
from himix_edge.runtimes.chat import ChatTemplate
from himix_edge.runtimes.kvcache import Cache
from himix_edge.runtimes.tokenizer import Tokenizer


def reference_model(checkpoint: Checkpoint) -> Model:
    """A checkpoint that answers as a bundle does, in torch.

    Raises:
        CheckpointError: weights or a tokenizer that can't be used.
        ExportError: a chat template that can't be rendered.
    """
    manifest = manifest_of(checkpoint)
    tokenizer = tokenizer_of(checkpoint)
    return Model(manifest, tokenizer, TorchEngine(checkpoint.model()))


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that a bundle of the checkpoint would have.

    Raises:
        BundleError: texts that are no tokenizer or no template.
    """
    return tokenizer_from_texts(
        checkpoint.tokenizer_json, checkpoint.chat_template, checkpoint.chat
    )


def tokenizer_from_texts(tokenizer_json: str, chat_template: str, chat: Chat) -> Tokenizer:
    """Likewise, of texts that are not yet a checkpoint's."""
    return Tokenizer(tokenizer_json, ChatTemplate(chat_template, chat), Path(TOKENIZER))


class TorchEngine:
    """Slow, and right by definition; see `runtimes.base.Engine`."""

    def __init__(self, model: HiMix) -> None:
        self._model = model

    @torch.inference_mode()
    def encode(self, pixel_values: FloatArray) -> VisionKV:
        """[B, 3, H, W] -> per layer keys and values [B, Hkv, P + N, D]"""
        kv = self._model.encode(torch.from_numpy(pixel_values))
        return VisionKV(tuple(kv), self._model.config.image_slots)

    def open(self, image: VisionKV | None) -> Cache:
        """A fresh cache whose first P + N slots are the image, or none."""
        tensors, slots = (image.tensors, image.slots) if image else ((), 0)
        return Cache.after_image(self._model.config, tensors, slots)

    def prefill(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        """M tokens of a prompt [B, M] go into the cache; the logits [B, V] of the last come out."""
        return self.step(input_ids, cache)

    @torch.inference_mode()
    def step(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        """M tokens [B, M] go into the cache; the logits [B, V] of the last of them come out."""
        batch, count = input_ids.shape
        positions = torch.from_numpy(cache.next_positions(batch, count))
        past: list[KV] = list(cache.tensors)
        hidden, present = self._model.decoder(torch.from_numpy(input_ids), positions, past)
        cache.advance(tuple(present), count)
        logits: FloatArray = self._model.decoder.logits(hidden[:, -1]).numpy()
        return logits

    def rewind(self, cache: Cache, count: int) -> None:
        """Forgets all text but the first `count` tokens."""
        length = cache.image_slots + count
        layers = (KV(kv.key[:, :, :length], kv.value[:, :, :length]) for kv in cache.tensors)
        cache.move_to(tuple(layers))
        cache.rewind(count)
