"""The largest magnitudes within a model: against formulas, and what is made of them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from himix_edge.config import Design, HiMixConfig
from himix_edge.contract import present_names
from himix_edge.errors import ExportError
from himix_edge.export.expected import Array
from himix_edge.export.graphs import flat
from himix_edge.export.ranges import (
    FLOAT16_MAX,
    MARGIN,
    BlockRanges,
    Magnitudes,
    Ranges,
    ranges_from_model,
    ranges_table,
    wide_parts,
)
from himix_edge.export.wide import NOTHING_WIDE, WideParts
from himix_edge.models.himix import HiMix
from tests.export.test_wide import CONFIGS
from tests.models.reference import heads_joined, random_tensor, rms_normed, turned, weights_of
from tests.tiny import tiny_config, tiny_model
from tests.tolerances import LARGEST_MAGNITUDES

IMAGES = [random_tensor(1, 3, 28, 28, seed=seed).numpy() for seed in range(3)]
PROMPTS = [[1, 40, 41, 42, 2], [1, 50, 2]]


def largest(*values: Any) -> float:
    return max(float(np.abs(np.asarray(value)).max()) for value in values)


def require_equal(found: Magnitudes, expected: Magnitudes) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=0, abs=LARGEST_MAGNITUDES), name


@pytest.mark.parametrize("family", CONFIGS)
def test_encoder_against_its_formulas_and_transformers_hidden_states(family: str) -> None:
    model = tiny_model(CONFIGS[family])
    found = ranges_from_model(model, IMAGES[:1], PROMPTS)
    pixels = torch.from_numpy(IMAGES[0])
    states = model.vision.model(pixels, output_hidden_states=True).hidden_states
    for i, block in enumerate(found.encoder):
        expected = encoder_block(model, i, states[i])
        require_equal({"": expected.residual["after MLP"]}, {"": largest(states[i + 1])})
        for part in ("residual", "attention", "mlp"):
            require_equal(getattr(block, part), getattr(expected, part))
    embeddings: Any = model.vision.model.embeddings
    patches = F.conv2d(
        pixels, embeddings.patch_embedding.weight, embeddings.patch_embedding.bias, stride=14
    )
    require_equal(
        found.embeddings,
        {"patches": largest(patches), "embeddings": largest(embeddings(pixels))},
    )
    features = states[-1][:, 1:] if family == "clip" else states[-1]
    require_equal(found.injection, {"features": largest(features)})
    image = flat(model.encode(pixels))
    require_equal(found.cache, dict(zip(present_names(2), map(largest, image), strict=True)))


def encoder_block(model: HiMix, i: int, hidden: Tensor) -> BlockRanges:
    """From the hidden state before it, by the formulas of a pre-norm transformer, in float64."""
    config, weights = model.config.vision, model.vision.double().state_dict()
    model.vision.float()
    prefix = f"model.encoder.layers.{i}."

    def norm(x: Tensor, name: str) -> Tensor:
        scale, shift = weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"]
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        normed: Tensor = centred / spread * scale + shift
        return normed

    def product(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        plain: Tensor = x @ weights[f"{prefix}{name}.weight"].T
        return plain, plain + weights[f"{prefix}{name}.bias"]

    def heads(x: Tensor) -> Tensor:  # [B, N, H * D] -> [B, H, N, D]
        return x.view(*x.shape[:2], config.num_attention_heads, -1).transpose(1, 2)

    x = hidden.double()
    first = norm(x, "layer_norm1")
    q, k, v = (product(first, f"self_attn.{name}_proj") for name in "qkv")
    query, key, value = (heads(pair[1]) for pair in (q, k, v))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    out = product(attended, "self_attn.out_proj")
    between = x + out[1]
    second = norm(between, "layer_norm2")
    fc1 = product(second, "mlp.fc1")
    if config.hidden_act == "quick_gelu":
        activation = fc1[1] * torch.sigmoid(1.702 * fc1[1])
    else:
        activation = F.gelu(fc1[1], approximate="tanh")
    fc2 = product(activation, "mlp.fc2")
    return BlockRanges(
        residual={
            "input": largest(x),
            "after attention": largest(between),
            "after MLP": largest(between + fc2[1]),
        },
        attention={
            "norm": largest(first),
            "query": largest(*q),
            "key": largest(*k),
            "value": largest(*v),
            "scores": largest(scores),
            "attended": largest(attended),
            "output": largest(*out),
        },
        mlp={
            "norm": largest(second),
            "fc1": largest(*fc1),
            "activation": largest(activation),
            "output": largest(*fc2),
        },
    )


def test_decoder_against_algorithm_1() -> None:
    """A prompt after an image, head by head and slot by slot, with a bias on q, k and v."""
    model = tiny_model(tiny_config(attention_bias=True))
    found = ranges_from_model(model, IMAGES[:1], PROMPTS)
    image = model.encode(torch.from_numpy(IMAGES[0]))
    weights = weights_of(model.decoder)
    text = weights["model.embed_tokens.weight"][PROMPTS[0]]
    for i, block in enumerate(found.decoder):
        key, value = (next(heads_joined(part)) for part in image[i])
        expected, text = decoder_block(model, i, text, key, value)
        for part in ("residual", "attention", "mlp"):
            require_equal(getattr(block, part), getattr(expected, part))
    normed = rms_normed(text, weights["model.norm.weight"], model.config.decoder.rms_norm_eps)
    logits = normed @ weights["model.embed_tokens.weight"].T
    require_equal(found.head, {"norm": largest(normed), "logits": largest(logits)})


def decoder_block(
    model: HiMix, i: int, text: Array, image_keys: Array, image_values: Array
) -> tuple[BlockRanges, Array]:
    config, weights = model.config.decoder, weights_of(model.decoder)
    prefix, d = f"model.layers.{i}.", config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads

    def norm(x: Array, name: str) -> Array:
        return rms_normed(x, weights[f"{prefix}{name}.weight"], config.rms_norm_eps)

    def product(x: Array, name: str) -> Array:
        return x @ weights[f"{prefix}{name}.weight"].T

    def rotated(x: Array) -> Array:
        rows = x.reshape(len(x), -1, d)
        turned_rows = [[turned(v, t, config.rope_theta) for v in row] for t, row in enumerate(rows)]
        return np.array(turned_rows).reshape(x.shape)

    first = norm(text, "input_layernorm")
    plain = {name: product(first, f"self_attn.{name}_proj") for name in "qkv"}
    q, k, v = (plain[name] + weights[f"{prefix}self_attn.{name}_proj.bias"] for name in "qkv")
    query, key = rotated(q), np.concatenate((image_keys, rotated(k)))
    value = np.concatenate((image_values, v))
    all_scores, attended = [], np.zeros_like(query)
    for head in range(config.num_attention_heads):
        mine, shared = (slice(h * d, (h + 1) * d) for h in (head, head // group))
        scores = query[:, mine] @ key[:, shared].T / math.sqrt(d)
        all_scores.append(scores)  # of later tokens too: the mask comes after
        for t, row in enumerate(scores):
            seen = np.exp(row[: len(image_keys) + t + 1])
            attended[t, mine] = seen / seen.sum() @ value[: len(seen), shared]
    out = product(attended, "self_attn.o_proj")
    between = text + out
    second = norm(between, "post_attention_layernorm")
    gate, up = product(second, "mlp.gate_proj"), product(second, "mlp.up_proj")
    both = gate / (1 + np.exp(-gate)) * up
    down = product(both, "mlp.down_proj")
    return BlockRanges(
        residual={
            "input": largest(text),
            "after attention": largest(between),
            "after MLP": largest(between + down),
        },
        attention={
            "norm": largest(first),
            "query": largest(plain["q"], q, query),
            "key": largest(plain["k"], k, key),
            "value": largest(plain["v"], v),
            "scores": largest(*all_scores),
            "attended": largest(attended),
            "output": largest(out),
        },
        mlp={
            "norm": largest(second),
            "gate": largest(gate),
            "up": largest(up),
            "product": largest(both),
            "output": largest(down),
        },
    ), between + down


def test_several_images_give_the_largest_of_each_and_are_held_one_at_a_time() -> None:
    model = tiny_model(tiny_config())
    alone = [
        dataclasses.asdict(ranges_from_model(model, [image], [PROMPTS[i % 2]]))
        for i, image in enumerate(IMAGES)
    ]
    held = 0

    def one_at_a_time() -> Iterator[Array]:
        nonlocal held
        for image in IMAGES:
            held += 1
            assert held == 1
            yield image
            held -= 1

    together = ranges_from_model(model, one_at_a_time(), PROMPTS)
    assert together.images == 3
    leaves = [list(numbers(one)) for one in alone]
    expected = [max(values) for values in zip(*leaves, strict=True)]
    found = list(numbers(dataclasses.asdict(together)))
    assert found[1:] == expected[1:]
    assert len({tuple(leaf) for leaf in leaves}) == 3
    assert json.loads(json.dumps(dataclasses.asdict(together))) == dataclasses.asdict(together)


def numbers(data: Any) -> Iterator[float]:
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list):
        for value in data:
            yield from numbers(value)
    else:
        yield data


def test_the_model_stays_as_it_was() -> None:
    model = tiny_model(tiny_config())
    attention = model.vision.model.config._attn_implementation
    pixels = torch.from_numpy(IMAGES[0])
    before = flat(model.encode(pixels))
    ranges_from_model(model, IMAGES, PROMPTS)
    require_untouched(model, attention)
    assert all(map(torch.equal, flat(model.encode(pixels)), before))


def test_a_model_that_is_not_finite_is_refused() -> None:
    model = tiny_model(tiny_config())
    attention = model.vision.model.config._attn_implementation
    model.get_parameter("vision.model.encoder.layers.1.mlp.fc2.bias")[3] = math.inf
    with pytest.raises(ExportError, match=r"not finite, even in float32: found inf in output"):
        ranges_from_model(model, IMAGES, PROMPTS)
    require_untouched(model, attention)


def require_untouched(model: HiMix, attention: str | None) -> None:
    assert model.vision.model.config._attn_implementation == attention != "himix_edge_plain"
    assert not any(module._forward_hooks for module in model.modules())


def ranges_of(config: HiMixConfig, **changes: Any) -> Ranges:
    """Of a model without fault, but for the changes."""
    return dataclasses.replace(ranges_from_model(tiny_model(config), IMAGES, PROMPTS), **changes)


@pytest.fixture(scope="module")
def sound() -> Ranges:
    return ranges_of(tiny_config())


def with_block(ranges: Ranges, side: str, block: int, part: str, name: str, value: float) -> Ranges:
    blocks = list(getattr(ranges, side))
    magnitudes = {**getattr(blocks[block], part), name: value}
    blocks[block] = dataclasses.replace(blocks[block], **{part: magnitudes})
    changed: dict[str, Any] = {side: blocks}
    return dataclasses.replace(ranges, **changed)


NEAR = FLOAT16_MAX / MARGIN + 1
PLACES: list[tuple[str, str, WideParts]] = [
    ("residual", "input", WideParts(residual=True)),
    ("residual", "after MLP", WideParts(residual=True)),
    ("attention", "norm", WideParts(attentions=frozenset({1}))),
    ("attention", "scores", WideParts(attentions=frozenset({1}))),
    ("mlp", "activation", WideParts(mlps=frozenset({1}))),
]


@pytest.mark.parametrize(("part", "name", "wide"), PLACES)
def test_what_comes_within_the_margin_is_wide(
    sound: Ranges, part: str, name: str, wide: WideParts
) -> None:
    assert wide_parts(sound) == NOTHING_WIDE
    assert wide_parts(with_block(sound, "encoder", 1, part, name, NEAR)) == wide
    assert wide_parts(with_block(sound, "encoder", 1, part, name, NEAR - 2)) == NOTHING_WIDE


def test_embeddings_and_features_within_the_margin_are_wide(sound: Ranges) -> None:
    near = dataclasses.replace(sound, embeddings={"patches": NEAR, "embeddings": 1.0})
    assert wide_parts(near) == WideParts(residual=True)
    near = dataclasses.replace(sound, injection={"features": NEAR})
    assert wide_parts(near) == WideParts(projections=True)


def test_a_key_that_float16_cannot_hold_is_an_error(sound: Ranges) -> None:
    cache = {**sound.cache, "present.1.key": 65504.0}
    assert wide_parts(dataclasses.replace(sound, cache=cache)) == NOTHING_WIDE
    cache["present.1.key"] = 65505.0
    message = (
        "the model does not fit into float16: expected values of at most 65,504, "
        "found 65,505 in the cache, present.1.key. "
        "Fix: export with --dtype bfloat16, or float32"
    )
    with pytest.raises(ExportError, match=re.escape(message)):
        wide_parts(dataclasses.replace(sound, cache=cache))


@pytest.mark.parametrize("part", ["residual", "attention", "mlp"])
def test_a_decoder_that_overflows_is_an_error_that_names_the_block(
    sound: Ranges, part: str
) -> None:
    near = with_block(sound, "decoder", 1, part, "norm", NEAR)
    assert wide_parts(near) == NOTHING_WIDE
    with pytest.raises(ExportError, match="found 70,000 in decoder block 1, norm"):
        wide_parts(with_block(sound, "decoder", 1, part, "norm", 7e4))
    with pytest.raises(ExportError, match="found 70,000 in the decoder's head, logits"):
        wide_parts(dataclasses.replace(sound, head={"logits": 7e4}))


@pytest.mark.parametrize("design", ["uniform", "hierarchical", "vanilla"])
def test_connectors_are_looked_at_and_never_wide(design: Design) -> None:
    ranges = ranges_of(tiny_config(design))
    assert ranges.injection.keys() == {"features", "connector"}
    assert all(block.residual and block.mlp for block in ranges.decoder)
    near = dataclasses.replace(ranges, injection={"features": NEAR, "connector": 1.0})
    assert wide_parts(near) == NOTHING_WIDE
    beyond = dataclasses.replace(ranges, injection={"features": 1.0, "connector": 7e4})
    with pytest.raises(ExportError, match="found 70,000 in the connector, connector"):
        wide_parts(beyond)


def test_the_table(sound: Ranges) -> None:
    ranges = with_block(sound, "encoder", 1, "mlp", "output", 123456.7)
    ranges = with_block(ranges, "encoder", 1, "residual", "after MLP", 123450.0)
    ranges = with_block(ranges, "decoder", 0, "attention", "scores", 20000.0)
    rows = [line.split("  ") for line in ranges_table(ranges, wide_parts(ranges)).splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells[0] == ["residual stream", "attention", "MLP"]
    assert [row[0] for row in cells[1:]] == [
        *("encoder embeddings", "encoder 0", "encoder 1", "vision features", "keys and values"),
        *("decoder 0", "decoder 1", "decoder head"),
    ]
    assert cells[3][1] == "after MLP 123,450.0 *"
    assert cells[3][3] == "output 123,456.7 *"
    assert cells[2][1].endswith("*")  # the residual stream is wide from end to end
    assert cells[6][2] == "scores 20,000.0 !"
    assert sum(cell.endswith(("*", "!")) for row in cells for cell in row) == 5
