"""The formulas against real forward passes, counted by torch and by the paper's tool, calflops.

On the meta device: shapes flow, and no memory is needed, so that full size is no slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from calflops import calculate_flops  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from himix_edge.analysis import costs, sizes
from himix_edge.analysis.report import DESIGNS, pair_config
from himix_edge.config import DecoderConfig, Design, HiMixConfig, VisionConfig
from himix_edge.models.decoder import Decoder
from himix_edge.models.himix import HiMix
from himix_edge.models.injection import injection_from_config
from himix_edge.presets import DECODERS, ENCODERS
from tests.tiny import tiny_config

FULL_SIZE = pair_config("tinyclip-39m", "qwen2-0.5b")
IMAGE, TEXT = 728, 64
QWEN2 = (Qwen2Config, Qwen2ForCausalLM)
LLAMA = (LlamaConfig, LlamaForCausalLM)
CLIP = (CLIPVisionConfig, CLIPVisionModel)
SIGLIP = (SiglipVisionConfig, SiglipVisionModel)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Also the buffers that a model computes for itself, and keeps in memory wherever it is."""
    with torch.device("meta"):
        module = build()
    return module.eval().to("meta")


def sized(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Our own modules, counted by torch.


def counted(config: HiMixConfig, text_tokens: int) -> dict[str, int]:
    """What the parts of a HiMix model multiply and add in one forward pass."""
    model = on_meta(lambda: HiMix(config))
    size = config.vision.image_size
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size), torch.zeros(1, text_tokens, dtype=torch.int64))
    of = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    layers = [f"HiMix.decoder.model.layers.{i}" for i in range(config.decoder.num_hidden_layers)]
    apart = ("HiMix.vision", "HiMix.injection", "HiMix.decoder")
    return {
        "encoder": of["HiMix.vision"],
        "injection": of["HiMix.injection"],
        "attention": sum(of[f"{layer}.self_attn"] for layer in layers),
        "ffn": sum(of[f"{layer}.mlp"] for layer in layers),
        "head": of["HiMix"] - sum(of[name] for name in apart),
    }


CONFIGS: dict[str, HiMixConfig] = {
    **{f"tiny {design}": tiny_config(design) for design in DESIGNS},
    "tiny, untied and biased": tiny_config(tie_word_embeddings=False, attention_bias=True),
    "tiny, wide heads": tiny_config(head_dim=12),
    "full size himix": FULL_SIZE,
    **{
        f"full size {design}, siglip": pair_config("siglip-so400m-384", "llama-3.2-1b", design)
        for design in DESIGNS
    },
}


def some(names: Iterable[str], *slow: str) -> list[ParameterSet]:
    """Parameters of a test, marked as slow where one of those words is in the name."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if any(word in name for word in slow) else [])
        for name in names
    ]


@pytest.mark.parametrize("name", some((n for n in CONFIGS if "vanilla" not in n), "siglip"))
def test_torch_counts_what_the_formulas_say(name: str) -> None:
    config = CONFIGS[name]
    cost = costs.cost(config, TEXT)
    assert counted(config, TEXT) == {
        "encoder": cost.encoder.matmul,
        "injection": cost.connectors.matmul + cost.projections.matmul,
        "attention": cost.attention.matmul,
        "ffn": cost.ffn.matmul,
        "head": cost.head.matmul,
    }


@pytest.mark.parametrize("name", some((n for n in CONFIGS if "vanilla" in n), "siglip"))
def test_our_vanilla_model_saves_what_no_answer_needs(name: str) -> None:
    """Image tokens run ahead of the text: they see none of it, and have no logits."""
    config = CONFIGS[name]
    decoder, images = config.decoder, config.vision.num_image_tokens
    cost, found = costs.cost(config, TEXT), counted(config, TEXT)
    heads = decoder.num_attention_heads * decoder.head_dim * decoder.num_hidden_layers
    assert found["attention"] == cost.attention.matmul - 4 * images * TEXT * heads
    assert found["ffn"] == cost.ffn.matmul
    assert found["head"] == cost.head.matmul - costs.head(decoder, images).matmul
    of_the_image = costs.attention(decoder, images, images) + costs.ffn(decoder, images)
    assert found["injection"] == (cost.connectors + of_the_image).matmul


@pytest.mark.parametrize("name", some(CONFIGS, "siglip"))
def test_parameters_are_those_of_the_model(name: str) -> None:
    model = on_meta(lambda: HiMix(CONFIGS[name]))
    assert isinstance(model, HiMix)
    count = sizes.parameters(CONFIGS[name])
    assert count.encoder == sized(model.vision)
    assert count.injection == sized(model.injection)
    assert count.decoder == sized(model.decoder)
    assert count.total == sized(model)


@pytest.mark.parametrize("name", some(DECODERS, "3b", "7b"))
def test_parameters_of_the_decoder_presets(name: str) -> None:
    decoder = DECODERS[name].decoder
    assert sizes.decoder_parameters(decoder) == sized(on_meta(lambda: Decoder(decoder)))


def test_bytes_of_the_cache_are_those_of_its_tensors() -> None:
    config = FULL_SIZE
    injection = on_meta(lambda: injection_from_config(config)).half()
    images, width = config.vision.num_image_tokens, config.vision.hidden_size
    kv = injection(torch.empty(1, images, width, device="meta", dtype=torch.half), None)
    assert sizes.kv_cache_bytes(config.decoder, images) == sum(
        part.nbytes for layer in kv for part in layer
    )


# Stock models of transformers, counted by the paper's tool.


def calflops_of(module: nn.Module, *args: Tensor) -> int:
    with torch.no_grad():
        flops, _, _ = calculate_flops(
            module, args=list(args), print_results=False, output_as_string=False
        )
    return int(flops)


def stock_decoder(config: DecoderConfig) -> PreTrainedModel:
    """With eager attention: calflops does not see into scaled_dot_product_attention."""
    kind, model = QWEN2 if config.attention_bias else LLAMA
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings", "head_dim")
    built: PreTrainedModel = stock(kind, model, config, names + heads, "eager")
    return built


def stock(kind: Any, model: Any, config: object, names: Iterable[str], attention: str) -> Any:
    """A model of transformers with our config's dimensions."""
    shape = {name: getattr(config, name) for name in names}
    return on_meta(lambda: model(kind(**shape, attn_implementation=attention)))


class AfterAnImage(nn.Module):
    """A stock decoder whose first N cache slots are filled: what a HiMix decoder is."""

    def __init__(self, decoder: PreTrainedModel, config: DecoderConfig, images: int) -> None:
        super().__init__()
        self.decoder, self.config, self.images = decoder, config, images

    def forward(self, input_ids: Tensor) -> Tensor:
        cache = DynamicCache()
        slots = (1, self.config.num_key_value_heads, self.images, self.config.head_dim)
        for layer in range(self.config.num_hidden_layers):
            cache.update(
                torch.empty(slots, device="meta"), torch.empty(slots, device="meta"), layer
            )
        logits: Tensor = self.decoder(input_ids, past_key_values=cache).logits
        return logits


def ids(count: int) -> Tensor:
    return torch.zeros(1, count, dtype=torch.int64, device="meta")


PAPER_DECODERS = {
    "tiny": tiny_config().decoder,
    **{
        name: DECODERS[name].decoder
        for name in ("qwen2-0.5b", "tinyllama-1.1b", "llama-3.2-1b", "llama-3.2-3b", "vicuna-7b")
    },
}


@pytest.mark.parametrize("name", some(PAPER_DECODERS, "llama", "vicuna"))
def test_calflops_counts_what_the_formulas_say_of_vanilla(name: str) -> None:
    config, tokens = PAPER_DECODERS[name], IMAGE + TEXT
    expected = costs.attention(config, tokens, tokens) + costs.ffn(config, tokens)
    expected += costs.head(config, tokens)
    assert calflops_of(stock_decoder(config), ids(tokens)) == expected.total


@pytest.mark.parametrize("name", some(PAPER_DECODERS, "llama", "vicuna"))
def test_calflops_counts_what_the_formulas_say_of_himix(name: str) -> None:
    config, slots = PAPER_DECODERS[name], IMAGE + TEXT
    text = costs.attention(config, TEXT, slots) + costs.ffn(config, TEXT) + costs.head(config, TEXT)
    assert calflops_of(AfterAnImage(stock_decoder(config), config, IMAGE), ids(TEXT)) == text.total


@pytest.mark.parametrize("design", ["himix", "vanilla"])
def test_calflops_counts_what_the_formulas_say_of_projections_and_connectors(
    design: Design,
) -> None:
    config = pair_config("siglip-so400m-384", "llama-3.2-1b", design)
    injection = on_meta(lambda: injection_from_config(config))
    features = torch.empty(1, IMAGE, config.vision.hidden_size, device="meta")
    cost = costs.cost(config, TEXT, IMAGE)
    if design == "vanilla":
        connector = injection.get_submodule("connector")
        assert calflops_of(connector, features) == cost.connectors.total
        return
    layers = injection.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    assert sum(calflops_of(layer, features) for layer in layers) == cost.projections.total


def stock_encoder(config: VisionConfig, attention: str) -> PreTrainedModel:
    kind, model = SIGLIP if config.model_type == "siglip" else CLIP
    names = ("image_size", "patch_size", "hidden_size", "intermediate_size", "hidden_act")
    layers = ("num_hidden_layers", "num_attention_heads")
    built: PreTrainedModel = stock(kind, model, config, names + layers, attention)
    for module in list(built.modules()):
        if hasattr(module, "activation_fn"):  # it holds on to F.gelu, and so evades calflops
            module.activation_fn = nn.GELU()
    return built


def pixels(config: VisionConfig) -> Tensor:
    return torch.empty(1, 3, config.image_size, config.image_size, device="meta")


@pytest.mark.parametrize("name", list(ENCODERS))
def test_parameters_of_the_encoder_presets(name: str) -> None:
    vision = ENCODERS[name].vision
    assert sizes.encoder_parameters(vision, whole=True) == sized(stock_encoder(vision, "eager"))


@pytest.mark.parametrize("name", some(ENCODERS, "siglip", "61m"))
def test_calflops_counts_what_the_formulas_say_of_the_encoder(name: str) -> None:
    vision = ENCODERS[name].vision
    expected = costs.encoder(vision, whole=True).total.total
    if vision.model_type == "siglip":  # its pooling head multiplies with torch.bmm: not seen
        expected -= 4 * vision.num_image_tokens * vision.hidden_size
    assert calflops_of(stock_encoder(vision, "eager"), pixels(vision)) == expected


@pytest.mark.parametrize("name", some(ENCODERS, "siglip", "61m"))
def test_torch_counts_what_the_formulas_say_of_the_encoder(name: str) -> None:
    vision = ENCODERS[name].vision
    encoder = stock_encoder(vision, "eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(pixels(vision))
    assert counter.get_total_flops() == costs.encoder(vision, whole=True).total.matmul


def test_calflops_misses_the_products_inside_fused_attention() -> None:
    """As it misses torch.bmm, which transformers' CLIP used: Table 6's TinyCLIPs count none."""
    vision = ENCODERS["tinyclip-39m"].vision
    cost = costs.encoder(vision, whole=True)
    seen = calflops_of(stock_encoder(vision, "sdpa"), pixels(vision))
    assert seen == (cost.linear + cost.pooling).total
