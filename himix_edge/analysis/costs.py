"""FLOPs, parameters and bytes of a model, from its config: standard library only.

T tokens go through the decoder and see S slots of the cache; N image tokens of width d_v; h hidden,
L layers, H heads, K key-value heads, d head dim, I intermediate, V vocabulary. Vanilla: T = S =
N + M. The other designs: T = M, S = N + M, and the image's keys and values come from elsewhere; a
converted model with P tokens of fixed text has S = P + N + M. Products with what the causal mask
hides are counted, as the paper does.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from himix_edge.config import DecoderConfig, HiMixConfig, VisionConfig
from himix_edge.errors import ConfigError


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, as the paper's tool, calflops, counts them.

    Attributes:
        matmul: of matrix products and convolutions, two a multiply-add.
        elementwise: one an element of a softmax, of an activation and of a convolution's bias, five
            of a LayerNorm. RMSNorm, rotary embedding, residuals and other biases count nothing.
    """

    matmul: int = 0
    elementwise: int = 0

    @property
    def total(self) -> int:
        return self.matmul + self.elementwise

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matmul + other.matmul, self.elementwise + other.elementwise)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.matmul * times, self.elementwise * times)


# The decoder: each of these is of all L layers.


def attention(config: DecoderConfig, tokens: int, slots: int) -> Flops:
    """2TL(2hHd + 2hKd) + 4TSHdL, and a softmax of T S H L."""
    wide, narrow = _widths(config)
    projections = 2 * tokens * config.hidden_size * (2 * wide + 2 * narrow)
    products = 4 * tokens * slots * wide
    softmax = tokens * slots * config.num_attention_heads
    return Flops(projections + products, softmax) * config.num_hidden_layers


def ffn(config: DecoderConfig, tokens: int) -> Flops:
    """6TLhI, and an activation of T I L."""
    inner = tokens * config.intermediate_size
    return Flops(6 * inner * config.hidden_size, inner) * config.num_hidden_layers


def head(config: DecoderConfig, tokens: int) -> Flops:
    """2ThV: the logits of T tokens."""
    return Flops(2 * tokens * config.hidden_size * config.vocab_size)


def image_kv(config: DecoderConfig, image_tokens: int, width: int) -> Flops:
    """4NLwKd: the image's keys and values from an input of width w, d_v in HiMix, else h."""
    return Flops(4 * image_tokens * width * _widths(config)[1]) * config.num_hidden_layers


def connector(image_tokens: int, width: int, size: int) -> Flops:
    """The 2-layer MLP from d_v to c, mostly h: 2Nc(d_v + c), and an activation of N c."""
    out = image_tokens * size
    return Flops(2 * out * (width + size), out)


def fastv(
    config: DecoderConfig, image_tokens: int, text_tokens: int, layer: int, ratio: float
) -> Flops:
    """Vanilla with FastV: after `layer` layers, `ratio` of the image tokens are gone.

    Source: Chen et al., "An image is worth 1/2 tokens after layer 2", K and R there. The ranking of
    the tokens counts nothing.

    Raises:
        ConfigError: a layer that is not there, or a ratio that is none.
    """
    if not 0 < layer < config.num_hidden_layers:
        raise ConfigError(
            "the layer to filter after is out of range",
            expected=f"1 to {config.num_hidden_layers - 1}",
            found=str(layer),
        )
    if not 0 <= ratio <= 1:
        raise ConfigError("the filtering ratio is invalid", expected="0 to 1", found=str(ratio))
    all_tokens = image_tokens + text_tokens
    left = round(image_tokens * (1 - ratio)) + text_tokens
    below = dataclasses.replace(config, num_hidden_layers=layer)
    above = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers - layer)
    layers = attention(below, all_tokens, all_tokens) + ffn(below, all_tokens)
    return layers + attention(above, left, left) + ffn(above, left) + head(config, left)


# The encoder.


@dataclass(frozen=True)
class EncoderCost:
    """One image through the encoder.

    Attributes:
        linear: the patch embedding, the projections and the MLP of each layer, the norms.
        attention: the products of queries, keys and values.
        pooling: what is above the layers; the features X_v do not need it.
    """

    linear: Flops
    attention: Flops
    pooling: Flops

    @property
    def total(self) -> Flops:
        return self.linear + self.attention + self.pooling


def encoder(config: VisionConfig, *, whole: bool = False) -> EncoderCost:
    """The encoder down to its feature layer, or the whole of the published model.

    Args:
        whole: all layers and what is above them: SigLIP's pooling head, CLIP's last norm.
    """
    h, inner, patches = config.hidden_size, config.intermediate_size, config.num_patches
    siglip, layers = config.model_type == "siglip", layers_run(config, whole=whole)
    tokens = patches if siglip else patches + 1  # with CLIP's class token
    norm = Flops(0, 5 * tokens * h)
    embedding = Flops(2 * patches * 3 * config.patch_size**2 * h, patches * h if siglip else 0)
    mlp = Flops(4 * tokens * h * inner, tokens * inner)
    layer = Flops(8 * tokens * h * h) + mlp + norm * 2
    products = Flops(4 * tokens * tokens * h, tokens * tokens * config.num_attention_heads)
    pooling = Flops()
    if whole and siglip:  # one learnt query over all tokens, then an MLP on what it found
        query = Flops(4 * h * h + 4 * tokens * h * h + 4 * tokens * h)
        softmax = Flops(0, tokens * config.num_attention_heads)
        pooling = norm + query + softmax + Flops(4 * h * inner, inner + 5 * h)
    elif whole:
        pooling = Flops(0, 5 * h)  # the last norm, of the class token
    before = Flops() if siglip else norm
    return EncoderCost(embedding + before + layer * layers, products * layers, pooling)


def layers_run(config: VisionConfig, *, whole: bool = False) -> int:
    """How many of the encoder's layers run: those above the feature layer don't, unless `whole`."""
    return config.num_hidden_layers + (0 if whole else 1 + config.feature_layer)


# The whole model.


@dataclass(frozen=True)
class Cost:
    """The first step of an answer: one image, and a prompt of M tokens.

    Attributes:
        encoder: down to the feature layer.
        connectors: from vision features to the width of token embeddings, or that of HiMix's own.
        projections: the image's keys and values, where it doesn't run through the decoder.
        attention, ffn: of all tokens that run through the decoder.
        head: logits of all of them, as the paper counts.
        last_logits: logits of the last one, which is all that an answer needs and that the exported
            graphs compute.
    """

    encoder: Flops
    connectors: Flops
    projections: Flops
    attention: Flops
    ffn: Flops
    head: Flops
    last_logits: Flops

    @property
    def decoder(self) -> Flops:
        """What the paper's tables call the cost of the language decoder."""
        return self.projections + self.attention + self.ffn + self.head

    @property
    def total(self) -> Flops:
        return self.encoder + self.connectors + self.decoder

    @property
    def total_as_run(self) -> Flops:
        """`total` with the last token's logits in place of all."""
        layers = self.projections + self.attention + self.ffn
        return self.encoder + self.connectors + layers + self.last_logits


def cost(config: HiMixConfig, text_tokens: int, image_tokens: int | None = None) -> Cost:
    """What a prompt about one image costs.

    Args:
        text_tokens: M.
        image_tokens: N, where it is not the encoder's: the paper counts 728 of SigLIP's 729.

    Raises:
        ConfigError: less than one token, or more text than the decoder has positions for.
    """
    decoder, width, vanilla = config.decoder, config.vision.feature_size, config.design == "vanilla"
    images = config.vision.num_image_tokens if image_tokens is None else image_tokens
    longest = config.max_text_tokens
    if vanilla or config.vision_key_rotation == "slots":  # the image takes positions
        longest += config.vision.num_image_tokens - images
    if images < 1:
        raise ConfigError("image_tokens is out of range", expected="1 or more", found=str(images))
    if not 1 <= text_tokens <= longest:
        raise ConfigError(
            "text_tokens is out of range",
            expected=f"1 to {longest}, with {images} image tokens",
            found=str(text_tokens),
        )
    slots = config.prefix_tokens + images + text_tokens
    tokens = slots if vanilla else text_tokens
    size = config.projection.connector_size or decoder.hidden_size
    projections = {
        "himix": image_kv(decoder, images, config.projection.input_size(width)),
        "uniform": image_kv(decoder, images, decoder.hidden_size),
        "hierarchical": image_kv(decoder, images, decoder.hidden_size),
        "vanilla": Flops(),
    }
    return Cost(
        encoder=encoder(config.vision).total,
        connectors=connector(images, width, size) * connectors(config),
        projections=projections[config.design],
        attention=attention(decoder, tokens, slots),
        ffn=ffn(decoder, tokens),
        head=head(decoder, tokens),
        last_logits=head(decoder, 1),
    )


def connectors(config: HiMixConfig) -> int:
    """How many connectors a model has."""
    own = 1 if config.projection.connector_size else 0
    layers = config.decoder.num_hidden_layers
    return {"himix": own, "uniform": 1, "hierarchical": layers, "vanilla": 1}[config.design]


def _widths(config: DecoderConfig) -> tuple[int, int]:
    """H d and K d."""
    return (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
