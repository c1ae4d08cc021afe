"""The whole model against Algorithm 1 in plain loops, and against transformers in LLaVA's way."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from himix_edge.config import DecoderConfig, Design, HiMixConfig, PreprocessConfig
from himix_edge.models.decoder import KV, Attention, Rotary, part_causal_mask
from himix_edge.models.himix import HiMix, hollow_model, model_from_weights
from himix_edge.models.injection import VisionProjections
from himix_edge.models.weights import HeldWeight, held_weights
from himix_edge.presets import DECODERS, ENCODERS
from tests import tolerances
from tests.models.reference import (
    Array,
    algorithm_1,
    connected,
    mixture_attention,
    random_ids,
    random_tensor,
    randomized,
    shared_kv,
    weights_of,
)
from tests.models.test_decoder import stock_and_ours
from tests.models.test_injection import DECODER, VISION

DESIGNS: list[Design] = ["himix", "uniform", "hierarchical", "vanilla"]
N = VISION.num_image_tokens
PIXELS = random_tensor(2, 3, VISION.image_size, VISION.image_size, seed=7)
IDS = random_ids(4, 6, DECODER.vocab_size, seed=8)  # two texts an image


def model_of(design: Design, decoder: DecoderConfig = DECODER) -> HiMix:
    config = HiMixConfig(VISION, decoder, PreprocessConfig(VISION.image_size), design)
    model = randomized(HiMix(config))
    assert isinstance(model, HiMix)
    return model


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (3, 1), (6, 2)])
def test_mixture_attention_is_equations_5_and_6(heads: int, kv_heads: int) -> None:
    config = dataclasses.replace(DECODER, num_attention_heads=heads, num_key_value_heads=kv_heads)
    attention = randomized(Attention(config), seed=1)
    projections = randomized(VisionProjections(VISION.hidden_size, config), seed=2)
    text = random_tensor(2, 5, config.hidden_size, seed=3)
    features = random_tensor(2, 7, VISION.hidden_size, seed=4)

    mask = part_causal_mask(5, 7, text.device)
    angles = Rotary(config)(torch.arange(5).expand(2, 5))
    actual, _ = attention(text, angles, mask, projections(features))

    vision_weights = weights_of(projections)
    expected = [
        mixture_attention(
            x_l,
            x_v @ vision_weights["k_proj.weight"].T,
            x_v @ vision_weights["v_proj.weight"].T,
            weights_of(attention),
            "",
            config,
        )
        for x_l, x_v in zip(text.double().numpy(), features.double().numpy(), strict=True)
    ]
    assert actual.std() > 0.1
    np.testing.assert_allclose(actual, np.stack(expected), rtol=0, atol=tolerances.ATTENTION)


def himix_image(features: Array, model: HiMix) -> list[tuple[Array, Array]]:
    """Algorithm 1, line 11"""
    weights = weights_of(model.injection)
    return [
        (
            features @ weights[f"layers.{i}.k_proj.weight"].T,
            features @ weights[f"layers.{i}.v_proj.weight"].T,
        )
        for i in range(DECODER.num_hidden_layers)
    ]


def uniform_image(features: Array, model: HiMix) -> list[tuple[Array, Array]]:
    """Figure 4 (a)"""
    image = connected(features, weights_of(model.injection), "connector.")
    weights = weights_of(model.decoder)
    return [
        shared_kv(image, weights, i, DECODER.rms_norm_eps) for i in range(DECODER.num_hidden_layers)
    ]


def hierarchical_image(features: Array, model: HiMix) -> list[tuple[Array, Array]]:
    """Figure 4 (b)"""
    own = weights_of(model.injection)
    images = [
        connected(features, own, f"connectors.{i}.") for i in range(DECODER.num_hidden_layers)
    ]
    weights = weights_of(model.decoder)
    return [shared_kv(image, weights, i, DECODER.rms_norm_eps) for i, image in enumerate(images)]


IMAGES = {"himix": himix_image, "uniform": uniform_image, "hierarchical": hierarchical_image}


@pytest.mark.parametrize("design", ["himix", "uniform", "hierarchical"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_those_of_algorithm_1(design: Design, tied: bool) -> None:
    model = model_of(design, dataclasses.replace(DECODER, tie_word_embeddings=tied))
    features = model.vision(PIXELS).double().numpy()
    weights = weights_of(model.decoder)
    expected = [
        algorithm_1(
            IDS[text].tolist(),
            IMAGES[design](features[text // 2], model),
            weights,
            model.config.decoder,
        )
        for text in range(4)
    ]
    actual = model(PIXELS, IDS)
    assert actual.std() > 0.5
    np.testing.assert_allclose(actual, np.stack(expected), rtol=0, atol=tolerances.REFERENCE_LOGITS)


def test_vanilla_is_the_stock_decoder_fed_with_image_and_text() -> None:
    model = model_of("vanilla", dataclasses.replace(DECODER, head_dim=6))  # Qwen2's own: 24 / 4
    stock, ours = stock_and_ours(Qwen2ForCausalLM, Qwen2Config, model.config.decoder)
    model.decoder = ours
    features = model.vision(PIXELS).double().numpy()
    own = weights_of(model.injection)
    image = torch.from_numpy(np.stack([connected(x, own, "connector.") for x in features])).float()
    image = image.repeat_interleave(2, 0)
    text = stock.get_input_embeddings()(IDS)
    expected = stock(inputs_embeds=torch.cat((image, text), dim=1), use_cache=True)

    assert_near(model(PIXELS, IDS), expected.logits[:, N:], tolerances.MODEL_LOGITS)
    for kv, layer in zip(model.encode(PIXELS), expected.past_key_values.layers, strict=True):
        assert_near(kv.key, layer.keys[::2, :, :N], tolerances.MODEL_LOGITS)
        assert_near(kv.value, layer.values[::2, :, :N], tolerances.MODEL_LOGITS)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("split", [(1, 1, 1, 1, 1, 1), (4, 1, 1), (2, 4)], ids=str)
def test_over_a_cache_the_logits_are_the_same(design: Design, split: tuple[int, ...]) -> None:
    model = model_of(design)
    expected = model(PIXELS, IDS)
    cache = [KV(*(part.repeat_interleave(2, 0) for part in kv)) for kv in model.encode(PIXELS)]
    logits = []
    for tokens in torch.split(IDS, list(split), dim=1):
        some, cache = model.decode(tokens, cache)
        logits.append(some)
    assert cache[0].key.shape[2] == N + IDS.shape[1]
    assert_near(torch.cat(logits, dim=1), expected, tolerances.CACHED_DECODE)


@pytest.mark.parametrize("design", DESIGNS)
def test_each_text_is_about_its_own_image(design: Design) -> None:
    model = model_of(design)
    together = model(PIXELS, IDS)
    for text in range(4):
        image = text // 2
        alone = model(PIXELS[image : image + 1], IDS[text : text + 1])
        other = model(PIXELS[1 - image : 2 - image], IDS[text : text + 1])
        assert_near(together[text : text + 1], alone, tolerances.CACHED_DECODE)
        assert (together[text : text + 1] - other).abs().max() > 0.01


@pytest.mark.parametrize("design", DESIGNS)
def test_a_token_sees_the_text_before_it_and_none_after(design: Design) -> None:
    model = model_of(design)
    ids = IDS[:1]
    logits = model(PIXELS[:1], ids)
    for changed in range(ids.shape[1]):
        others = ids.clone()
        others[0, changed] = (ids[0, changed] + 1) % DECODER.vocab_size
        moved = (model(PIXELS[:1], others) != logits).any(-1)[0]
        assert moved.tolist() == [token >= changed for token in range(ids.shape[1])]


@pytest.mark.parametrize("design", DESIGNS)
def test_the_first_text_token_sees_every_image_token(design: Design) -> None:
    model = model_of(design)
    features = model.vision(PIXELS[:1])
    before = first_logits(model, features)
    for token in range(N):
        changed = features.clone()
        changed[:, token] += 1
        assert (first_logits(model, changed) - before).abs().max() > 1e-3


@pytest.mark.parametrize("design", ["himix", "uniform", "hierarchical"])
def test_the_order_of_image_tokens_means_nothing(design: Design) -> None:
    model = model_of(design)
    features = model.vision(PIXELS[:1])
    after = first_logits(model, features.flip(1))
    assert_near(after, first_logits(model, features), tolerances.CACHED_DECODE)


def test_in_the_vanilla_design_the_order_of_image_tokens_means_something() -> None:
    model = model_of("vanilla")
    features = model.vision(PIXELS[:1])
    difference = first_logits(model, features.flip(1)) - first_logits(model, features)
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize("design", DESIGNS)
def test_greedy_takes_the_likeliest_token_each_time(design: Design) -> None:
    model = model_of(design)
    tokens = model.generate_greedy(PIXELS[:1], IDS[:1], max_new_tokens=5)
    text = IDS[:1]
    for token in tokens:
        assert token == int(model(PIXELS[:1], text)[0, -1].argmax())
        text = torch.cat((text, torch.tensor([[token]])), dim=1)
    assert len(tokens) == 5


def test_greedy_ends_with_the_first_end_token() -> None:
    model = model_of("himix")
    free = model.generate_greedy(PIXELS[:1], IDS[:1], max_new_tokens=6)
    end = free[2]
    decoder = dataclasses.replace(model.config.decoder, eos_token_ids=(DECODER.vocab_size - 1, end))
    model.config = dataclasses.replace(model.config, decoder=decoder)
    expected = free[: free.index(end) + 1]
    assert model.generate_greedy(PIXELS[:1], IDS[:1], max_new_tokens=6) == expected


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hollow_model_has_every_weight_but_no_value(design: Design, dtype: torch.dtype) -> None:
    model = model_of(design)
    hollow = hollow_model(model.config, dtype)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in hollow.state_dict().items()} == expected
    assert {parameter.dtype for parameter in hollow.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in hollow.parameters())
    assert not any(module.training for module in hollow.modules())
    computed = dict(model.named_buffers())
    assert computed
    for name, buffer in hollow.named_buffers():  # what is no weight is there, in its own type
        assert torch.equal(buffer, computed.pop(name))
    assert computed == {}


def test_a_hollow_model_takes_no_memory() -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc here")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    siglip, qwen2 = ENCODERS["siglip-so400m-384"], DECODERS["qwen2-0.5b"]
    before = resident()
    model = hollow_model(HiMixConfig(siglip.vision, qwen2.decoder, siglip.preprocess))
    assert sum(parameter.nbytes for parameter in model.parameters()) > 3.5e9
    assert resident() - before < 100e6


@pytest.mark.parametrize("design", DESIGNS)
def test_a_model_from_weights_is_the_model_they_are_of(design: Design) -> None:
    model = model_of(design)
    again = model_from_weights(model.config, held_weights(model))
    assert not again.training
    assert torch.equal(again(PIXELS, IDS), model(PIXELS, IDS))
    assert again.decoder.model.norm.weight.data_ptr() != model.decoder.model.norm.weight.data_ptr()


def test_narrow_weights_make_a_wide_model() -> None:
    model = model_of("himix")
    narrow = {name: HeldWeight(tensor.half()) for name, tensor in model.state_dict().items()}
    for name, tensor in model_from_weights(model.config, narrow).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].half().float())


def first_logits(model: HiMix, features: Tensor) -> Tensor:
    """[1, N, d_v] -> [1, V] of the first text token."""
    logits, _ = model.decode(IDS[:1, :1], model.injection(features, model.decoder))
    return logits[:, 0]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
