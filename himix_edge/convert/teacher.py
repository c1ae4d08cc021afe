"""A vanilla model as a teacher, and the HiMix model that is to be made of it.

Scores depend on differences of rotary positions alone. A vanilla decoder has its fixed text at 0 to
P - 1, the image at P to P + N - 1 and the text from P + N on; turn everything back by P + N, and
the text begins at 0, as in HiMix, with the rest ahead of it. So a HiMix decoder whose cache holds
the vanilla model's own keys and values, the keys turned back by P + N, gives its very logits:
`Teacher.replayed`. What is left to say is how the image's keys (before rotary embedding) and values
follow from its features: `Teacher.image_targets`, which `fit.py` fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from himix_edge.config import HiMixConfig, ProjectionConfig
from himix_edge.contract import Chat
from himix_edge.models.decoder import KV, rotated
from himix_edge.models.himix import HiMix, hollow_model
from himix_edge.models.injection import HiMixInjection, VanillaInjection
from himix_edge.models.weights import Weight, Weights


@dataclass(frozen=True)
class TeacherSource:
    """A vanilla model on disk, not yet read.

    Attributes:
        name: whose model it is, for people.
        family: what its files call its architecture: "llava", "llava_onevision", ...
        licence: what its folder says of its licence; "" if nothing.
        notice: as in a checkpoint.
        config: the model as we have it, of the design "vanilla".
        weights: by the names of that model's parameters.
        prefix_ids: the fixed text ahead of the image.
        tokenizer_json, chat_template, chat: as in a checkpoint.
        head_rows: by token, the source's own rows [h] of the head, where `weights` has something
            else in it or the config suppresses the token for our sake.
    """

    name: str
    family: str
    licence: str
    notice: str
    config: HiMixConfig
    weights: Weights
    prefix_ids: tuple[int, ...]
    tokenizer_json: str
    chat_template: str
    chat: Chat = field(default_factory=Chat)
    head_rows: Mapping[int, Weight] = field(default_factory=dict)


class Teacher:
    """A vanilla model in memory, its weights frozen: it says what its source says.

    Attributes:
        model: of the design "vanilla", with the decoder that the converted model is to have. Its
            own logits are that model's, `decode` has the source's.
        prefix: per layer keys and values [1, Hkv, P, D] of the fixed text, at positions 0 to P - 1.
    """

    def __init__(
        self,
        model: HiMix,
        prefix_ids: Sequence[int],
        head_rows: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.prefix_ids = tuple(prefix_ids)
        self.head_rows = dict(head_rows or {})
        self.prefix = self._prefix()

    @property
    def prefix_tokens(self) -> int:
        """P"""
        return len(self.prefix_ids)

    @property
    def text_offset(self) -> int:
        """P + N: the rotary position of the first token after the image."""
        return self.prefix_tokens + self.model.config.vision.num_image_tokens

    @property
    def config(self) -> HiMixConfig:
        """The vanilla model's."""
        return self.model.config

    @property
    def connector(self) -> nn.Module:
        """From vision features to token embeddings."""
        return cast(VanillaInjection, self.model.injection).connector

    @property
    def device(self) -> torch.device:
        return self.model.decoder.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.decoder.model.embed_tokens.weight.dtype

    @torch.no_grad()
    def image_cache(self, features: Tensor) -> list[KV]:
        """What one image leaves in the cache, after the prefix.

        Args:
            features: X_v [B, N, d_v] of the model's own feature layers.

        Returns:
            per layer [B, Hkv, P + N, D], the keys at positions 0 to P + N - 1.
        """
        connected = self.connector(features)  # [B, N, h]
        batch = features.shape[0]
        positions = torch.arange(self.prefix_tokens, self.text_offset, device=self.device)
        past = [KV(*(part.expand(batch, -1, -1, -1) for part in kv)) for kv in self.prefix]
        _, present = self.model.decoder.model(
            connected, positions.expand(batch, -1), past if self.prefix_ids else None
        )
        cache: list[KV] = present
        return cache

    @torch.no_grad()
    def image_targets(self, cache: list[KV]) -> list[KV]:
        """The image's keys before rotary embedding, and its values: per layer [B, Hkv, N, D]."""
        first = self.prefix_tokens
        positions = torch.arange(first, self.text_offset, device=self.device)
        return [
            KV(self.turned(key[:, :, first:], -positions), value[:, :, first:])
            for key, value in cache
        ]

    @torch.no_grad()
    def replayed(self, cache: list[KV]) -> list[KV]:
        """The cache of a HiMix model that is to say the same: keys turned back by P + N."""
        back = torch.full((self.text_offset,), -self.text_offset, device=self.device)
        return [KV(self.turned(key, back), value) for key, value in cache]

    def turned(self, key: Tensor, by: Tensor) -> Tensor:
        """key [B, Hkv, S, D] with slot s rotated by `by[s]` positions, computed in fp32."""
        angles: tuple[Tensor, Tensor] = self.model.decoder.model.rotary(by[None])
        return rotated(key.float(), angles).to(key.dtype)

    def logits(self, input_ids: Tensor, cache: list[KV]) -> Tensor:
        """Of M tokens [B, M] that follow a cache [B, Hkv, S, D], S >= P + N: [B, M, V].

        The positions are a vanilla model's own: slot s stands at s.
        """
        return self.decode(input_ids, cache)[0]

    def _prefix(self) -> list[KV]:
        with torch.no_grad():
            ids = torch.tensor([self.prefix_ids], dtype=torch.int64, device=self.device)
            return self.decode(ids, [])[1] if self.prefix_ids else []

    def decode(self, input_ids: Tensor, past: list[KV]) -> tuple[Tensor, list[KV]]:
        """`logits` with the longer cache; the cache may be empty."""
        first = past[0].key.shape[2] if past else 0
        positions = torch.arange(first, first + input_ids.shape[1], device=self.device)
        decoder = self.model.decoder
        hidden, present = decoder(input_ids, positions.expand(input_ids.shape), past or None)
        logits = decoder.logits(hidden)
        for token, row in self.head_rows.items():
            logits[..., token] = (hidden @ row).to(logits.dtype)
        return logits, present


def student_config(
    teacher: Teacher, joined_layers: tuple[int, ...], projection: ProjectionConfig
) -> HiMixConfig:
    """The HiMix model that is made of a teacher.

    Args:
        joined_layers: of the encoder, beside the teacher's own feature layers.
    """
    config = teacher.model.config
    layers = (*config.vision.joined_layers, *joined_layers)
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, joined_layers=layers),
        design="himix",
        projection=projection,
        vision_key_rotation="slots",
        prefix_tokens=teacher.prefix_tokens,
    )


def student_of(teacher: Teacher, config: HiMixConfig) -> HiMix:
    """The HiMix model over the teacher's own encoder and decoder, not copies of them.

    Its prefix is the teacher's; its projections are zero, in fp32, and await a fit. A connector is
    the teacher's own: of layers joined to the features it sees nothing.
    """
    student = hollow_model(config)
    student.vision.model = teacher.model.vision.model
    student.decoder = teacher.model.decoder
    injection = cast(HiMixInjection, student.injection.to(teacher.device))
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.zero_()
        if injection.prefix is not None:
            injection.prefix.copy_(_prefix_of(teacher))
        if injection.inputs.connector is not None:
            own, taught = injection.inputs.connector.parameters(), teacher.connector.parameters()
            for parameter, weight in zip(own, taught, strict=True):
                parameter[..., : weight.shape[-1]].copy_(weight)
    return student.eval()


def _prefix_of(teacher: Teacher) -> Tensor:
    """[L, 2, Hkv, P, D]: keys and values of the fixed text, ahead of everything else."""
    back = torch.full((teacher.prefix_tokens,), -teacher.text_offset, device=teacher.device)
    layers = [torch.cat((teacher.turned(key, back), value)) for key, value in teacher.prefix]
    return torch.stack(layers)


def features_of(teacher: Teacher, student: HiMix, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """X_v of both from one run of the encoder: the teacher's are the first of the student's."""
    features = student.vision(pixel_values.to(teacher.device, teacher.dtype))
    return features[..., : teacher.model.config.vision.feature_size], features
