"""What of a vision graph is in fp32 although its weights are in half precision.

Every cast is written out: a graph with these modules in it is as strongly typed as one without.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, SiglipVisionModel


@dataclass(frozen=True)
class WideParts:
    """What a vision graph in float16 computes in float32, because it can't hold the values.

    The weights of these parts are stored in float32 too. `ranges.wide_parts` says what needs it.

    Attributes:
        residual: the residual stream: the embeddings, every sum, and the norms that read it.
        attentions, mlps: the blocks whose attention, or MLP, is wide as a whole, its norm included.
        projections: from the vision features to keys and values, a connector of their own
            included. Keys and values are in float16 either way.
    """

    residual: bool = False
    attentions: frozenset[int] = frozenset()
    mlps: frozenset[int] = frozenset()
    projections: bool = False

    def __str__(self) -> str:
        parts = (
            "the residual stream" if self.residual else "",
            _of_blocks("attention", self.attentions),
            _of_blocks("MLP", self.mlps),
            "the projections to keys and values" if self.projections else "",
        )
        return ", ".join(filter(None, parts)) or "nothing"


NOTHING_WIDE = WideParts()


def widen_encoder(encoder: CLIPVisionModel | SiglipVisionModel, wide: WideParts) -> None:
    """Puts into fp32 what of a model in half precision has to be, in place.

    That is its activations, in bfloat16 the patches' convolution, and whatever `wide` says.
    """
    embeddings: Any = encoder.embeddings
    if dtype_of(encoder) == torch.bfloat16:
        embeddings.patch_embedding = WidePatches(embeddings.patch_embedding)
    if wide.residual:
        embeddings.float()
        if isinstance(encoder, CLIPVisionModel):
            encoder.pre_layrnorm.float()
    layers: Any = encoder.encoder.layers
    for i, layer in enumerate(layers):
        layer.mlp.activation_fn = WideActivation(layer.mlp.activation_fn)
        attention, mlp = i in wide.attentions, i in wide.mlps
        if wide.residual or attention or mlp:
            layers[i] = WideBlock(layer, residual=wide.residual, attention=attention, mlp=mlp)


class WideActivation(nn.Module):
    """An activation in fp32: half precision rounds its constants, and GELU's cube overflows it."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(x.float())
        return result.to(x.dtype)


class WideBlock(nn.Module):
    """A block of the encoder, parts of which are in fp32 and the others in half precision.

    Every part takes its input in the type of its own weights; the sums are in the type of the
    residual stream. HF: `SiglipEncoderLayer` and `CLIPEncoderLayer`, whose parts' names it keeps.
    """

    def __init__(self, layer: Any, *, residual: bool, attention: bool, mlp: bool) -> None:
        super().__init__()
        self.layer_norm1, self.self_attn = layer.layer_norm1, layer.self_attn
        self.layer_norm2, self.mlp = layer.layer_norm2, layer.mlp
        for norm, part, wide in (
            (self.layer_norm1, self.self_attn, attention),
            (self.layer_norm2, self.mlp, mlp),
        ):
            part.himix_edge_wide = wide
            if wide:
                part.float()
            if wide or residual:
                norm.float()

    def forward(self, hidden: Tensor, attention_mask: None, **kwargs: Any) -> Tensor:
        normed = _through(self.layer_norm1, hidden).to(dtype_of(self.self_attn))
        attended, _ = self.self_attn(normed, attention_mask, **kwargs)
        hidden = hidden + attended.to(hidden.dtype)
        normed = _through(self.layer_norm2, hidden)
        return hidden + _through(self.mlp, normed).to(hidden.dtype)


class WidePatches(nn.Module):
    """The patches' convolution in fp32: before opset 22 there is none in bfloat16."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.stride = convolution.stride

    def forward(self, pixel_values: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        patches = F.conv2d(pixel_values.float(), self.weight.float(), bias, self.stride)
        return patches.to(self.weight.dtype)


def is_wide(part: nn.Module) -> bool:
    """Whether an attention or MLP is in fp32 in a model that isn't."""
    return getattr(part, "himix_edge_wide", False)


def _through(module: nn.Module, x: Tensor) -> Tensor:
    """What a module makes of an input of any type, in the type of its weights."""
    result: Tensor = module(x.to(dtype_of(module)))
    return result


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of its first weight."""
    return next(itertools.chain(module.parameters(), module.buffers())).dtype


def _of_blocks(part: str, blocks: Iterable[int]) -> str:
    """As in "MLP of blocks 3, 4"."""
    numbers = sorted(blocks)
    of = f"{part} of block{'s' if len(numbers) > 1 else ''} "
    return of + ", ".join(map(str, numbers)) if numbers else ""
