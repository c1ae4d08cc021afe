"""How large the values within a model get, and which of them float16 can't hold.

float16 ends at 65504. Trained vision transformers have values beyond it: a few channels of the
residual stream that the MLP of one block makes enormous and a later block takes away ("massive
activations", Sun et al. 2024). Beyond the limit they are infinite, and the next norm makes NaN of
the whole image. Here the model runs in fp32 over images, and of everything that a graph in float16
would have to hold the largest magnitude is kept: one number a value, however many the images.

Norms, softmax and activations are in fp32 in every graph; what is within them is no matter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from himix_edge.contract import LOGITS, present_names
from himix_edge.errors import ExportError
from himix_edge.export.expected import Array
from himix_edge.export.graphs import flat, plain_attention
from himix_edge.export.wide import WideParts
from himix_edge.models.decoder import rotated, split_heads
from himix_edge.models.himix import HiMix
from himix_edge.models.injection import Connector, HiMixInjection, VisionProjections

FLOAT16_MAX = 65504.0
# What of the encoder comes so close to the limit is put into fp32, since other images have larger
# values. In the demo model: up to 1.7 times those of three scenes in 150 other scenes, up to 2.9
# times in noise, checkerboards, plain colours and a photograph. Kernels that add up in float16 need
# some room too: partial sums may be larger than the sum.
MARGIN = 4.0

Magnitudes: TypeAlias = dict[str, float]  # the largest, by the name of the value

# A value's name, its module within the block, and whether it goes in there or comes out.
_IN, _OUT = "in", "out"
_Places: TypeAlias = dict[str, tuple[tuple[str, str, str], ...]]
_ENCODER_BLOCK: _Places = {
    "residual": (
        ("input", "layer_norm1", _IN),
        ("after attention", "layer_norm2", _IN),
        ("after MLP", "", _OUT),
    ),
    "attention": (
        ("norm", "layer_norm1", _OUT),
        ("query", "self_attn.q_proj", _OUT),
        ("key", "self_attn.k_proj", _OUT),
        ("value", "self_attn.v_proj", _OUT),
        ("attended", "self_attn.out_proj", _IN),
        ("output", "self_attn.out_proj", _OUT),
    ),
    "mlp": (
        ("norm", "layer_norm2", _OUT),
        ("fc1", "mlp.fc1", _OUT),
        ("activation", "mlp.fc2", _IN),
        ("output", "mlp.fc2", _OUT),
    ),
}
_DECODER_BLOCK: _Places = {
    "residual": (
        ("input", "input_layernorm", _IN),
        ("after attention", "post_attention_layernorm", _IN),
        ("after MLP", "", _OUT),
    ),
    "attention": (
        ("norm", "input_layernorm", _OUT),
        ("query", "self_attn.q_proj", _OUT),
        ("key", "self_attn.k_proj", _OUT),
        ("value", "self_attn.v_proj", _OUT),
        ("attended", "self_attn.o_proj", _IN),
        ("output", "self_attn.o_proj", _OUT),
    ),
    "mlp": (
        ("norm", "post_attention_layernorm", _OUT),
        ("gate", "mlp.gate_proj", _OUT),
        ("up", "mlp.up_proj", _OUT),
        ("product", "mlp.down_proj", _IN),
        ("output", "mlp.down_proj", _OUT),
    ),
}


@dataclass(frozen=True)
class BlockRanges:
    """The largest magnitudes within a transformer block.

    Attributes:
        residual: what the block finds in the residual stream, and its two sums.
        attention: from the norm before it to what it adds to the stream; its scores are those
            before the softmax, its queries and keys those before and after rotary embedding.
        mlp: likewise.
    """

    residual: Magnitudes = field(default_factory=dict)
    attention: Magnitudes = field(default_factory=dict)
    mlp: Magnitudes = field(default_factory=dict)


@dataclass(frozen=True)
class Ranges:
    """The largest magnitudes within a model; plain data, ready for JSON.

    Attributes:
        images: how many were looked at.
        embeddings: the encoder's, before its first block.
        encoder, decoder: block by block.
        injection: the vision features, and what connectors make of them; of a converted model's
            projections, what they are applied to, and their products before bias and rotation.
        cache: the image's keys and values, by their names in the contract.
        head: the decoder's, after its last block.
    """

    images: int = 0
    embeddings: Magnitudes = field(default_factory=dict)
    encoder: list[BlockRanges] = field(default_factory=list)
    injection: Magnitudes = field(default_factory=dict)
    cache: Magnitudes = field(default_factory=dict)
    decoder: list[BlockRanges] = field(default_factory=list)
    head: Magnitudes = field(default_factory=dict)


@torch.inference_mode()
def ranges_from_model(
    model: HiMix, images: Iterable[Array], prompts: Sequence[list[int]]
) -> Ranges:
    """Encodes images one by one, and lets the decoder read a prompt after each, in turn.

    Args:
        model: in fp32; it stays as it is.
        images: each [1, 3, H, W]; one is held at a time.
        prompts: token ids.

    Raises:
        ExportError: a value that isn't finite even in fp32.
    """
    blocks, layers = model.vision.model.encoder.layers, model.decoder.model.layers
    seen = Ranges(encoder=[BlockRanges() for _ in blocks], decoder=[BlockRanges() for _ in layers])
    numbers = {block.self_attn: i for i, block in enumerate(blocks)}

    def see_scores(attention: nn.Module, scores: Tensor) -> None:
        _note(seen.encoder[numbers[attention]].attention, "scores", scores)

    count = 0
    with contextlib.ExitStack() as stack:
        for hook in _hooks(model, seen):
            stack.callback(hook.remove)
        stack.enter_context(plain_attention(model.vision.model, see_scores))
        for count, pixels in enumerate(images, 1):
            image = model.encode(torch.from_numpy(pixels))
            for name, part in zip(present_names(len(layers)), flat(image), strict=True):
                _note(seen.cache, name, part)
            prompt = torch.tensor([prompts[(count - 1) % len(prompts)]])
            _note(seen.head, LOGITS, model.decode(prompt, image)[0])
    return dataclasses.replace(seen, images=count)


def wide_parts(ranges: Ranges) -> WideParts:
    """What of a vision graph has to be in fp32 when the rest of it is in float16.

    Raises:
        ExportError: float16 can't hold something that is in float16 in any case: the image's keys
            and values, or what is within the decoder or a connector.
    """
    for place, magnitudes in _never_wide(ranges):
        name = _largest(magnitudes)
        if magnitudes[name] > FLOAT16_MAX:
            raise ExportError(
                "the model does not fit into float16",
                expected=f"values of at most {FLOAT16_MAX:,.0f}",
                found=f"{magnitudes[name]:,.0f} in {place}, {name}",
                fix="export with --dtype bfloat16, or float32",
            )
    blocks = list(enumerate(ranges.encoder))
    streams = [ranges.embeddings, *(block.residual for _, block in blocks)]
    return WideParts(
        residual=any(_is_near(stream) for stream in streams),
        attentions=frozenset(i for i, block in blocks if _is_near(block.attention)),
        mlps=frozenset(i for i, block in blocks if _is_near(block.mlp)),
        projections=not _has_connector(ranges) and _is_near(ranges.injection),
    )


def ranges_table(ranges: Ranges, wide: WideParts) -> str:
    """The largest value of every part and its name, for people.

    A star stands beside what is in fp32; an exclamation mark beside what is in float16 and comes
    within MARGIN of its limit.
    """
    rows = [("", "residual stream  ", "attention  ", "MLP  ")]
    rows.append(("encoder embeddings", _cell(ranges.embeddings, wide.residual), "", ""))
    for i, block in enumerate(ranges.encoder):
        residual = _cell(block.residual, wide.residual)
        attention = _cell(block.attention, i in wide.attentions)
        rows.append((f"encoder {i}", residual, attention, _cell(block.mlp, i in wide.mlps)))
    rows.append(("vision features", _cell(ranges.injection, wide.projections), "", ""))
    rows.append(("keys and values", "", _cell(ranges.cache), ""))
    for i, block in enumerate(ranges.decoder):
        residual, attention = _cell(block.residual), _cell(block.attention)
        rows.append((f"decoder {i}", residual, attention, _cell(block.mlp)))
    rows.append(("decoder head", _cell(ranges.head), "", ""))
    return "\n".join(f"{a:20}{b:>26}{c:>26}{d:>26}".rstrip() for a, b, c, d in rows)


def _cell(magnitudes: Magnitudes, is_wide: bool = False) -> str:
    name = _largest(magnitudes)
    mark = "*" if is_wide else "!" if _is_near(magnitudes) else " "
    return f"{name} {magnitudes[name]:,.1f} {mark}"


def _never_wide(ranges: Ranges) -> Iterator[tuple[str, Magnitudes]]:
    """What `WideParts` can't put into fp32, and where it is."""
    yield "the cache", ranges.cache
    if _has_connector(ranges):
        yield "the connector", ranges.injection
    for i, block in enumerate(ranges.decoder):
        for part in (block.residual, block.attention, block.mlp):
            yield f"decoder block {i}", part
    yield "the decoder's head", ranges.head


def _has_connector(ranges: Ranges) -> bool:
    return "connector" in ranges.injection


def _is_near(magnitudes: Magnitudes) -> bool:
    """Whether a value comes within MARGIN of the limit."""
    return max(magnitudes.values()) > FLOAT16_MAX / MARGIN


def _largest(magnitudes: Magnitudes) -> str:
    return max(magnitudes, key=lambda name: magnitudes[name])


def _hooks(model: HiMix, seen: Ranges) -> Iterator[RemovableHandle]:
    """All over the model; what they see goes into `seen`."""
    encoder, decoder = model.vision.model, model.decoder.model
    embeddings: Any = encoder.embeddings
    yield _hook(embeddings.patch_embedding, _OUT, seen.embeddings, "patches")
    yield _hook(embeddings, _OUT, seen.embeddings, "embeddings")
    for places, blocks, ranges in (
        (_ENCODER_BLOCK, encoder.encoder.layers, seen.encoder),
        (_DECODER_BLOCK, decoder.layers, seen.decoder),
    ):
        for block, of_block in zip(blocks, ranges, strict=True):
            for part, values in places.items():
                for name, path, side in values:
                    module = block.get_submodule(path)
                    yield _hook(module, side, getattr(of_block, part), name)
    yield _hook(model.vision, _OUT, seen.injection, "features")
    connected = "inputs" if isinstance(model.injection, HiMixInjection) else "connector"
    for module in model.injection.modules():
        if isinstance(module, Connector):
            for step in module:
                yield _hook(step, _OUT, seen.injection, connected)
        elif isinstance(module, VisionProjections) and module.k_proj.bias is not None:
            yield _hook(module.k_proj, _OUT, seen.injection, "projections")
            yield _hook(module.v_proj, _OUT, seen.injection, "projections")
    for of_block, layer in zip(seen.decoder, decoder.layers, strict=True):
        yield _hook_on_attention(layer.get_submodule("self_attn"), of_block.attention)
    yield _hook(decoder.norm, _OUT, seen.head, "norm")


def _hook(module: nn.Module, side: str, magnitudes: Magnitudes, name: str) -> RemovableHandle:
    """Notes what goes into a module, or comes out; of a product with a bias, without it too."""

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        value = inputs[0] if side == _IN else output
        value = value[0] if isinstance(value, tuple) else value
        _note(magnitudes, name, value)
        if side == _OUT and isinstance(module, nn.Linear) and module.bias is not None:
            _note(magnitudes, name, value - module.bias)

    return module.register_forward_hook(see)


def _hook_on_attention(attention: Any, magnitudes: Magnitudes) -> RemovableHandle:
    """Notes what no module within a decoder's attention makes: rotated, and the scores."""

    def see(_: nn.Module, inputs: Any, output: Any) -> None:
        x, angles = inputs[:2]
        query = rotated(split_heads(attention.q_proj(x), attention.heads), angles)  # [B, H, M, D]
        key = output[1].key  # [B, Hkv, S, D], those of the past included
        _note(magnitudes, "query", query)
        _note(magnitudes, "key", key)
        query = (query * attention.head_dim**-0.5).unflatten(1, (attention.kv_heads, -1))
        scores = query @ key[:, :, None].transpose(-1, -2)  # [B, Hkv, G, M, S], masked or not
        _note(magnitudes, "scores", scores)

    hook: RemovableHandle = attention.register_forward_hook(see)
    return hook


def _note(magnitudes: Magnitudes, name: str, value: Tensor) -> None:
    largest = max(abs(float(end)) for end in value.aminmax())
    if not math.isfinite(largest):
        raise ExportError(
            "the model's values are not finite, even in float32",
            found=f"{largest} in {name}",
            fix="export from a sound checkpoint",
        )
    magnitudes[name] = max(largest, magnitudes.get(name, 0.0))
