"""What a HiMix model is, as data: frozen, checked when made, and free of any framework.

Field names are Hugging Face's wherever it has one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from himix_edge.errors import ConfigError
from himix_edge.plain import dataclass_from_dict, shown

Design = Literal["himix", "uniform", "hierarchical", "vanilla"]
ResizeMode = Literal["squash", "crop", "pad"]
VisionFamily = Literal["clip", "siglip"]
KeyRotation = Literal["none", "slots"]

# No model comes near these. What a config claims is held against them before anything is made of
# that size: it may be a stranger's.
MAX_LAYERS = 1_000
MAX_WIDTH = 1 << 20
MAX_VOCABULARY = 1 << 24
MAX_POSITIONS = 1 << 30
MAX_IMAGE_SIZE = 1 << 14  # pixels of an edge
MAX_IMAGE_SLOTS = 1 << 17


@dataclass(frozen=True)
class PreprocessConfig:
    """From an image of any size to `pixel_values`.

    Attributes:
        resize: "squash" to a square whatever the shape (SigLIP); "crop": the shorter edge
            resized to `image_size`, then the centre cut out (CLIP); or "pad": centred on a square
            of the mean colour, which is then resized (LLaVA-1.5).
        resample: Pillow's name of the filter.
        image_mean, image_std: per channel, on values in 0..1.
    """

    image_size: int
    resize: ResizeMode = "crop"
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        _within(self, MAX_IMAGE_SIZE, "image_size")
        if not all(0 < value < math.inf for value in self.image_std):
            raise ConfigError(
                "image_std is invalid", expected="positive numbers", found=shown(self.image_std)
            )


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer of the CLIP or SigLIP family (HF: CLIPVisionConfig, SiglipVisionConfig).

    Attributes:
        model_type: "clip" has a class token and a norm before the first layer, "siglip" neither.
        feature_layer: whose hidden state are the vision features X_v, counted as HF counts
            `hidden_states`: -1 is the last layer's, -2 the one before, as in LLaVA.
        joined_layers: whose hidden states stand beside it in X_v, lower layers all.
        skipped_patches: how many patches, from the first on, are no part of X_v: 1 where a model
            that was written for CLIP's class token drops SigLIP's first patch in its place.
    """

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    feature_layer: int = -1
    model_type: VisionFamily = "clip"
    joined_layers: tuple[int, ...] = ()
    skipped_patches: int = 0

    def __post_init__(self) -> None:
        _within(self, MAX_LAYERS, "num_hidden_layers")
        _within(self, MAX_WIDTH, "hidden_size", "intermediate_size")
        _within(self, MAX_IMAGE_SIZE, "image_size", "patch_size")
        _within(self, math.inf, "layer_norm_eps")
        if self.image_size < self.patch_size:
            raise ConfigError(
                "image_size is invalid",
                expected=f"at least patch_size ({self.patch_size})",
                found=str(self.image_size),
            )
        _divides("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        if not -self.num_hidden_layers <= self.feature_layer <= -1:
            raise ConfigError(
                "feature_layer is invalid",
                expected=f"-{self.num_hidden_layers} to -1",
                found=str(self.feature_layer),
            )
        joined = self.joined_layers
        lower = all(-self.num_hidden_layers <= layer < self.feature_layer for layer in joined)
        if not lower or len(set(joined)) < len(joined):
            raise ConfigError(
                "joined_layers are off",
                expected=f"different ones from -{self.num_hidden_layers} to below feature_layer "
                f"({self.feature_layer})",
                found=shown(joined),
            )
        if not 0 <= self.skipped_patches < self.num_patches:
            raise ConfigError(
                "skipped_patches is invalid",
                expected=f"0 to {self.num_patches - 1}",
                found=str(self.skipped_patches),
            )

    @property
    def num_patches(self) -> int:
        """The whole patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_image_tokens(self) -> int:
        """N: the patches in X_v; a class token is no part of it."""
        return self.num_patches - self.skipped_patches

    @property
    def feature_size(self) -> int:
        """d_v: the width of X_v."""
        return self.hidden_size * (1 + len(self.joined_layers))


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretch of the slow rotary frequencies (HF: rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _within(self, math.inf, "factor", "low_freq_factor", "original_max_position_embeddings")
        if not self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ConfigError(
                "high_freq_factor is invalid",
                expected=f"more than low_freq_factor ({self.low_freq_factor})",
                found=str(self.high_freq_factor),
            )


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the Llama / Qwen2 family (HF: LlamaConfig, Qwen2Config).

    Attributes:
        eos_token_ids: what ends an answer, and is no part of it.
        suppressed_token_ids: what is never chosen: the head gives them no probability. Some are a
            model's own (HF: `suppress_tokens`), some were placeholders of a model that was
            converted, whose rows of the embedding now hold something else.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_bias: bool = False  # on q, k and v: Qwen2
    tie_word_embeddings: bool = True
    eos_token_ids: tuple[int, ...] = ()
    rope_scaling: RopeScaling | None = None
    suppressed_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _within(self, MAX_LAYERS, "num_hidden_layers")
        _within(self, MAX_WIDTH, "hidden_size", "intermediate_size", "head_dim")
        _within(self, MAX_WIDTH, "num_attention_heads", "num_key_value_heads")
        _within(self, MAX_VOCABULARY, "vocab_size")
        _within(self, MAX_POSITIONS, "max_position_embeddings")
        _within(self, math.inf, "rms_norm_eps", "rope_theta")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _divides("num_attention_heads", heads, "num_key_value_heads", kv_heads)
        _divides("head_dim", self.head_dim, "a rotary pair", 2)
        for name in ("eos_token_ids", "suppressed_token_ids"):
            if wrong := [i for i in getattr(self, name) if not 0 <= i < self.vocab_size]:
                raise ConfigError(
                    f"{name} are off",
                    expected=f"ids below vocab_size ({self.vocab_size})",
                    found=shown(wrong),
                )
        if both := set(self.eos_token_ids) & set(self.suppressed_token_ids):
            raise ConfigError(
                "suppressed_token_ids are off", expected="no end tokens", found=shown(sorted(both))
            )

    @property
    def last_token_ids(self) -> tuple[int, ...]:
        """After which there is no going on: the ends, and what should never have been chosen."""
        return (*self.eos_token_ids, *self.suppressed_token_ids)


@dataclass(frozen=True)
class ProjectionConfig:
    """What a HiMix layer's W_v^K and W_v^V are applied to; by default X_v itself, as in the paper.

    Attributes:
        neighbourhood: 3 puts the features of the eight patches around beside each patch's own.
        connector_size: the width of a two-layer map of X_v (LLaVA's connector) whose output, at
            root mean square 1, stands beside the features; None is without one.
        bias: whether the two maps have a bias.
    """

    neighbourhood: Literal[1, 3] = 1
    connector_size: int | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        if self.connector_size is not None:
            _within(self, MAX_WIDTH, "connector_size")

    def input_size(self, feature_size: int) -> int:
        """The width of what the maps are applied to, from that of X_v."""
        return feature_size * self.neighbourhood**2 + (self.connector_size or 0)


@dataclass(frozen=True)
class HiMixConfig:
    """A whole model: the encoder, the decoder, and how the image reaches the decoder.

    The last three are for models that were converted from a vanilla one; a HiMix model as in the
    paper has their defaults. See `docs/convert.md`.

    Attributes:
        design: "himix" (paper 3.2), "uniform" (figure 4a), "hierarchical" (figure 4b), or
            "vanilla" (3.1).
        projection: what the maps of the design "himix" are applied to.
        vision_key_rotation: "slots" gives the image's keys a rotary embedding: slot n of N stands
            at n - N, ahead of the text; "none" is the paper's.
        prefix_tokens: P, tokens of fixed text ahead of the image: their keys and values are
            weights of the model, and the first slots of every cache.
    """

    vision: VisionConfig
    decoder: DecoderConfig
    preprocess: PreprocessConfig
    design: Design = "himix"
    projection: ProjectionConfig = ProjectionConfig()
    vision_key_rotation: KeyRotation = "none"
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.prefix_tokens <= MAX_IMAGE_SLOTS:
            raise ConfigError(
                "prefix_tokens is invalid",
                expected=f"0 to {MAX_IMAGE_SLOTS}",
                found=shown(self.prefix_tokens),
            )
        if self.vision.num_image_tokens > MAX_IMAGE_SLOTS:
            raise ConfigError(
                "image_size and patch_size are invalid",
                expected=f"at most {MAX_IMAGE_SLOTS} patches",
                found=str(self.vision.num_image_tokens),
            )
        converted = (self.projection, self.vision_key_rotation, self.prefix_tokens)
        if self.design != "himix" and converted != (ProjectionConfig(), "none", 0):
            raise ConfigError(
                "projection, vision_key_rotation and prefix_tokens are off",
                expected=f"their defaults in the design {self.design!r}",
                found=shown(converted),
            )
        if self.preprocess.image_size != self.vision.image_size:
            raise ConfigError(
                "preprocess.image_size is invalid",
                expected=f"the encoder's {self.vision.image_size}",
                found=str(self.preprocess.image_size),
            )
        if self.max_text_tokens < 1:
            raise ConfigError(
                "decoder.max_position_embeddings is invalid",
                expected=f"more than the {self._positions_before_text} that the image takes",
                found=str(self.decoder.max_position_embeddings),
            )

    @property
    def text_offset(self) -> int:
        """Rotary position of the first text token: 0, or N where image tokens take the first N."""
        return self.vision.num_image_tokens if self.design == "vanilla" else 0

    @property
    def image_slots(self) -> int:
        """How many slots of a cache are filled before there is any text: P + N."""
        return self.prefix_tokens + self.vision.num_image_tokens

    @property
    def max_text_tokens(self) -> int:
        """How many text tokens, question and answer together, the positions suffice for."""
        return self.decoder.max_position_embeddings - self._positions_before_text

    @property
    def _positions_before_text(self) -> int:
        """As many as the image takes, be it from 0 on or, in a converted model, ahead of 0."""
        return self.image_slots if self.vision_key_rotation == "slots" else self.text_offset

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HiMixConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown, missing, mistyped or impossible field.
        """
        return dataclass_from_dict(cls, data)


def _within(config: object, most: float, *names: str) -> None:
    """Positive, finite, and at most so much."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value <= most or value == math.inf:
            expected = "a positive number" if most == math.inf else f"1 to {most}"
            raise ConfigError(f"{name} is invalid", expected=expected, found=shown(value))


def _divides(whole_name: str, whole: int, part_name: str, part: int) -> None:
    if part < 1 or whole < 1 or whole % part:
        raise ConfigError(
            f"{whole_name} is invalid",
            expected=f"a positive multiple of {part_name} ({part})",
            found=str(whole),
        )
