"""Hugging Face's image processors, read by us: what we can do, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    CLIPProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from himix_edge.config import PreprocessConfig
from himix_edge.errors import CheckpointError, ConfigError
from himix_edge.models.huggingface import (
    encoder_from_folder,
)
from himix_edge.models.preprocessor import DEFAULTS, preprocess_from_json
from tests.models.stock import (
    SIZE,
    edit,
    processor,
    tokenizer,
)


def preprocess(folder: Path) -> PreprocessConfig:
    return encoder_from_folder(folder).preprocess


def test_a_whole_processors_file(clip: Path) -> None:
    (clip / "preprocessor_config.json").unlink()
    processor_class: Any = CLIPProcessor
    processor_class(image_processor=processor("CLIP"), tokenizer=tokenizer()).save_pretrained(clip)
    assert not (clip / "preprocessor_config.json").exists()
    assert preprocess(clip) == PreprocessConfig(SIZE)


def test_clips_first_preprocessors_have_bare_sizes(clip: Path) -> None:
    (clip / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": SIZE,
                "do_center_crop": True,
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": [0.1, 0.2, 0.3],
                "image_std": [0.4, 0.5, 0.6],
                "resample": 2,
                "size": SIZE,
            }
        )
    )
    assert preprocess(clip) == PreprocessConfig(
        SIZE, "crop", "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    )


@pytest.mark.parametrize(
    ("family", "stock"), [("clip", CLIPImageProcessorPil), ("siglip", SiglipImageProcessorPil)]
)
def test_what_a_preprocessor_may_leave_out_is_transformers_default(family: Any, stock: Any) -> None:
    written = stock().to_dict()
    for name, value in DEFAULTS[family].items():
        expected = written.get(name, False if name == "do_center_crop" else None)
        assert value == (tuple(expected) if isinstance(value, tuple) else expected), name


def test_llavas_own_processors() -> None:
    """Pixel for pixel they are compared where whole models are: `tests/convert/test_replay.py`."""
    llava: Any = LlavaImageProcessorPil
    onevision: Any = LlavaOnevisionImageProcessorPil
    assert preprocess_from_json(llava().to_dict(), "clip") == PreprocessConfig(224)
    padded = preprocess_from_json(llava(do_pad=True).to_dict(), "clip")
    assert padded == PreprocessConfig(224, "pad")
    for settings in (
        onevision().to_dict(),
        {"image_processor_type": "LlavaOnevisionImageProcessor"},
    ):
        assert preprocess_from_json(settings, "siglip") == PreprocessConfig(384, "squash")
    with pytest.raises(ConfigError, match="do_resize False"):
        preprocess_from_json(onevision(do_resize=False).to_dict(), "siglip")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"shortest_edge": 40}}, "sizes are unknown.*found size {'shortest_edge': 40}"),
        ({"do_center_crop": False}, "sizes are unknown.*no crop"),
        ({"size": {"height": 20, "width": SIZE}}, "sizes are unknown"),
        ({"size": {"longest_edge": SIZE}}, "sizes are unknown"),
        ({"size": "large"}, "sizes are unknown"),
        ({"size": {"shortest_edge": 20}, "crop_size": 20}, "not the encoder's: expected 30, found"),
        ({"resample": 1}, "it has what himix-edge has not: found resample 1"),
        ({"do_resize": False}, "found do_resize False"),
        ({"do_rescale": False, "do_normalize": False}, "do_rescale False, do_normalize False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor 0.0078"),
        ({"do_pad": True}, "found do_pad True"),
        ({"image_mean": [0.5]}, "image_mean is invalid"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std is invalid"),
        ({"image_processor_type": "ViTImageProcessor"}, "found ViTImageProcessor"),
    ],
)
def test_preprocessors_that_we_lack(clip: Path, changes: dict[str, Any], message: str) -> None:
    edit(clip / "preprocessor_config.json", **changes)
    with pytest.raises(
        CheckpointError, match=rf"cannot use .*preprocessor_config\.json.*{message}"
    ):
        encoder_from_folder(clip)


def test_no_preprocessor(clip: Path) -> None:
    (clip / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: expected preprocessor_config\.json"):
        encoder_from_folder(clip)
