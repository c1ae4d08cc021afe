"""The whole model: encoder, injection, decoder; and its reference loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from himix_edge.config import HiMixConfig
from himix_edge.models.decoder import KV, Decoder
from himix_edge.models.injection import injection_from_config
from himix_edge.models.vision import VisionEncoder
from himix_edge.models.weights import Weights


class HiMix(nn.Module):
    """Algorithm 1 of the paper, cut in two where the runtime cuts it.

    `encode` is the image's part, lines 4 and 11: it fills the first N slots of the cache; in a
    converted model the fixed text's P slots before them as well.
    `decode` is the text's part, lines 5 to 24, over that cache.
    """

    def __init__(self, config: HiMixConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.decoder = Decoder(config.decoder)
        self.injection = injection_from_config(config)

    def encode(self, pixel_values: Tensor) -> list[KV]:
        """[B, 3, H, W] -> per layer keys and values [B, Hkv, P + N, D]"""
        kv: list[KV] = self.injection(self.vision(pixel_values), self.decoder)
        return kv

    def decode(self, input_ids: Tensor, past: list[KV]) -> tuple[Tensor, list[KV]]:
        """M text tokens after an image and perhaps more text.

        Args:
            input_ids: [B, M]
            past: per layer [B, Hkv, P, D], the first `image_slots` being the image's.

        Returns:
            logits [B, M, V], and the cache with M more slots.
        """
        first = past[0].key.shape[2] - self.config.image_slots + self.config.text_offset
        positions = first + torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden, present = self.decoder(input_ids, positions.expand(input_ids.shape), past)
        return self.decoder.logits(hidden), present

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """Logits [B * Q, M, V] of Q texts [B * Q, M] about each of B images [B, 3, H, W]."""
        return self.decode_texts(input_ids, self.encode(pixel_values))

    def decode_texts(self, input_ids: Tensor, image: list[KV]) -> Tensor:
        """Several texts about each image at once, nothing cached: what training looks at.

        Args:
            input_ids: [B * Q, M], the texts about one image after each other.
            image: per layer [B, Hkv, N, D]

        Returns:
            logits [B * Q, M, V].
        """
        texts = input_ids.shape[0] // image[0].key.shape[0]
        past = [KV(*(part.repeat_interleave(texts, 0) for part in kv)) for kv in image]
        return self.decode(input_ids, past)[0]

    @torch.inference_mode()
    def generate_greedy(
        self, pixel_values: Tensor, input_ids: Tensor, max_new_tokens: int
    ) -> list[int]:
        """The likeliest tokens after one prompt [1, M] about one image, up to an end token.

        The reference that exported graphs and runtimes are held against; the end token is included.
        """
        logits, cache = self.decode(input_ids, self.encode(pixel_values))
        tokens = [int(logits[0, -1].argmax())]
        while len(tokens) < max_new_tokens and tokens[-1] not in self.config.decoder.eos_token_ids:
            logits, cache = self.decode(torch.tensor([[tokens[-1]]]), cache)
            tokens.append(int(logits[0, -1].argmax()))
        return tokens


def hollow_model(config: HiMixConfig, dtype: torch.dtype = torch.float32) -> HiMix:
    """A model whose weights nobody has written yet: to trace, or to fill.

    Memory that was never written is only promised by the system: of a model of any size this
    takes next to none.
    """
    with torch.device("meta"):
        model = HiMix(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
    return model.eval()


def model_from_weights(config: HiMixConfig, weights: Weights) -> HiMix:
    """The model in fp32, in eval mode; at no time in memory more than once.

    Args:
        weights: one for every parameter, of its shape; see `weights.misfits`.
    """
    model = hollow_model(config)
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name].read())
    return model
