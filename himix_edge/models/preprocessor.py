"""From Hugging Face's `preprocessor_config.json` to what the runtime's preprocessing does.

References: transformers' `CLIPImageProcessor`, `SiglipImageProcessor`, `LlavaImageProcessor` and
`LlavaOnevisionImageProcessor`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from himix_edge.config import PreprocessConfig, VisionFamily
from himix_edge.errors import ConfigError
from himix_edge.plain import dataclass_from_dict, shown

# What a file may leave out.
STEPS = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": STEPS
    | {
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": PreprocessConfig.image_mean,
        "image_std": PreprocessConfig.image_std,
    },
    "siglip": STEPS
    | {
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "crop_size": None,
        "resample": 3,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    },
    # Its base tile, the image as a whole; what it says of further tiles and of padding is let be.
    "onevision": STEPS
    | {
        "size": {"height": 384, "width": 384},
        "do_center_crop": False,
        "crop_size": None,
        "resample": 3,
        "image_mean": PreprocessConfig.image_mean,
        "image_std": PreprocessConfig.image_std,
        "do_pad": True,
        "image_grid_pinpoints": None,
    },
}
DEFAULTS["llava"] = DEFAULTS["clip"] | {"do_pad": False}  # CLIP's, of a picture padded to a square
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
NAMES = {"CLIP": "clip", "Siglip": "siglip", "Llava": "llava", "LlavaOnevision": "onevision"}
PROCESSORS = {
    f"{name}{kind}": family
    for name, family in NAMES.items()
    for kind in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
}
# Of no influence on the pixels of an RGB image, which is what the runtime makes of all images.
NO_INFLUENCE = {
    "_valid_processor_keys", "auto_map", "data_format", "device", "disable_grouping",
    "do_convert_rgb", "feature_extractor_type", "image_processor_type", "input_data_format",
    "processor_class", "return_tensors",
}  # fmt: skip


def preprocess_from_json(data: Mapping[str, Any], family: VisionFamily) -> PreprocessConfig:
    """What the file's processor does, if the runtime can do it.

    Args:
        data: the file's content.
        family: the encoder's, whose processor it is if the file does not say.

    Raises:
        ConfigError: a step, a setting or a value that the runtime does not have.
    """
    kind = data.get("image_processor_type", data.get("feature_extractor_type"))
    if kind is not None and kind not in PROCESSORS:
        raise ConfigError(
            "its processor is unknown",
            expected="one of " + ", ".join(f"{name}ImageProcessor" for name in NAMES),
            found=str(kind),
        )
    defaults = DEFAULTS[family if kind is None else PROCESSORS[kind]]
    settings = defaults | {name: value for name, value in data.items() if value is not None}
    if unsupported := ", ".join(_unsupported(settings, defaults)):
        raise ConfigError("it has what himix-edge has not", found=unsupported)
    size, resize = _size_and_mode(settings)
    if defaults is DEFAULTS["llava"] and settings["do_pad"]:
        resize = "pad"
    return dataclass_from_dict(
        PreprocessConfig,
        {
            "image_size": size,
            "resize": resize,
            "resample": RESAMPLE[settings["resample"]],
            "image_mean": settings["image_mean"],
            "image_std": settings["image_std"],
        },
    )


def _unsupported(settings: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if settings[step] is not True:
            yield f"{step} {settings[step]}"
    factor = settings["rescale_factor"]
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        yield f"rescale_factor {factor}"
    if settings["resample"] not in RESAMPLE:
        yield f"resample {settings['resample']}"
    for name in sorted(settings.keys() - known.keys() - NO_INFLUENCE):
        if settings[name] is not False:
            yield f"{name} {shown(settings[name])}"


def _size_and_mode(settings: Mapping[str, Any]) -> tuple[Any, str]:
    size, crop = settings["size"], settings["crop_size"]
    size = size if isinstance(size, Mapping) else {"shortest_edge": size}  # an int in old files
    crop = crop if isinstance(crop, Mapping) else {"height": crop, "width": crop}
    cropped = settings["do_center_crop"]
    edge = size.get("shortest_edge", size.get("height"))
    square = {"height": edge, "width": edge}
    if size == {"shortest_edge": edge} and cropped is True and crop == square:
        return edge, "crop"
    if size == square and (cropped is False or crop == square):
        return edge, "squash"
    raise ConfigError(
        "its sizes are unknown",
        expected="a square, or the shortest edge and a centre crop of that size",
        found=f"size {shown(dict(size))}, "
        + (f"crop_size {shown(dict(crop))}" if cropped else "no crop"),
    )
