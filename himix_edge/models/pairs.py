"""From the names of an encoder and a decoder to a checkpoint of that pair."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from himix_edge.bundles import DEMO_CHECKPOINT
from himix_edge.config import DecoderConfig, HiMixConfig, PreprocessConfig, VisionConfig
from himix_edge.errors import CheckpointError, ConfigError
from himix_edge.models.chat_files import read_chat_files
from himix_edge.models.checkpoints import Checkpoint, checkpoint_config, read_checkpoint
from himix_edge.models.huggingface import (
    decoder_from_folder,
    encoder_from_folder,
    folder_from_source,
)
from himix_edge.models.standin import random_checkpoint
from himix_edge.models.weights import Weight
from himix_edge.presets import (
    DECODERS,
    DEFAULT_DECODER,
    ENCODERS,
    DecoderPreset,
    EncoderPreset,
    is_preset_name,
    preset,
)
from himix_edge.trained import trained_checkpoints

# No part of a model's shape: here a checkpoint may differ from a preset, and is right.
CHECKPOINT_DECIDES = (
    "feature_layer", "eos_token_ids", "suppressed_token_ids", "max_position_embeddings",
    "hidden_act",
)  # fmt: skip
SAME_FLOAT = 1e-6  # relative: a config that went through float32, a GGUF's for one, is as good


@dataclasses.dataclass(frozen=True)
class Pair:
    """An encoder and a decoder.

    Attributes:
        encoder, decoder: a preset's name, a Hugging Face folder, or a repository of its hub.
    """

    encoder: str
    decoder: str

    @property
    def name(self) -> str:
        return "-".join(Path(part).resolve().name for part in (self.encoder, self.decoder))

    def config(self, *, fetch: bool = False) -> HiMixConfig:
        """The pair as a HiMix model.

        Args:
            fetch: whether a repository that is not in the hub's cache may be downloaded.

        Raises:
            ConfigError: neither a preset, nor a folder, nor a repository.
            CheckpointError: a folder or repository that can't be had or used.
        """
        vision, preprocess = _encoder(self.encoder, fetch=fetch)
        return HiMixConfig(vision, _decoder(self.decoder, fetch=fetch), preprocess)


def chosen_checkpoint(
    encoder: str | None, decoder: str | None, folder: Path | None, *, random_weights: bool
) -> Checkpoint:
    """What a command line names: a pair, or a checkpoint, or both; the demo model if neither.

    Raises:
        ConfigError: options that don't go together, or names of nothing.
        CheckpointError: as `checkpoint_of_pair`.
    """
    if encoder is None:
        if decoder or random_weights:
            raise ConfigError("the encoder is missing", fix="add --encoder, see: himix-edge models")
        return read_checkpoint(folder or DEMO_CHECKPOINT)
    pair = Pair(encoder, decoder or DEFAULT_DECODER)
    if not random_weights:
        return checkpoint_of_pair(pair, folder)
    if folder:
        raise ConfigError(
            "a checkpoint has weights of its own", fix="leave out --checkpoint or --random-weights"
        )
    return random_pair(pair)


def random_pair(pair: Pair) -> Checkpoint:
    """The pair with random projections; what is a preset's name is random as well.

    A folder, or a repository of the hub, keeps its weights, and a decoder's its tokenizer and its
    chat template.

    Raises:
        CheckpointError: a decoder's tokenizer or chat template that can't be used.
        as `Pair.config`.
    """
    config = pair.config(fetch=True)
    weights: dict[str, Weight] = {}
    if not is_preset_name(pair.encoder):
        weights |= encoder_from_folder(folder_from_source(pair.encoder, fetch=True)).weights
    if is_preset_name(pair.decoder):
        return random_checkpoint(pair.name, config, weights)
    place = folder_from_source(pair.decoder, fetch=True)
    weights |= decoder_from_folder(place).weights
    chat_files = read_chat_files(place, config.decoder.vocab_size)
    return random_checkpoint(pair.name, config, weights, chat_files)


def random_parts(pair: Pair) -> str:
    """What `random_pair` makes up, and what it keeps, for people."""
    parts = {"encoder": pair.encoder, "decoder": pair.decoder}
    kept = [f"the {part} is {name}" for part, name in parts.items() if not is_preset_name(name)]
    drawn = [f"the {part} ({name})" for part, name in parts.items() if is_preset_name(name)]
    said = f"random weights in {' and '.join(['the projections', *drawn])}"
    return "; ".join([said, *kept])


def checkpoint_of_pair(pair: Pair, folder: Path | None) -> Checkpoint:
    """The pair with the projections of a HiMix checkpoint.

    Args:
        folder: the checkpoint; None looks among those trained on this machine.

    Raises:
        CheckpointError: none there, or one of another pair, or one that can't be used.
        as `Pair.config`.
    """
    config = pair.config(fetch=True)
    folder = folder or _trained(pair, config)
    found = read_checkpoint(
        folder, _source(pair.encoder, ENCODERS), _source(pair.decoder, DECODERS)
    )
    if differences := _differences(found.config, config):
        raise CheckpointError(
            f"{folder} is a checkpoint of another pair",
            expected=", ".join(f"{name} {ours}" for name, (_, ours) in differences.items()),
            found=", ".join(str(theirs) for theirs, _ in differences.values()),
            fix="leave out --encoder and --decoder, or point to another checkpoint",
        )
    return found


def _trained(pair: Pair, config: HiMixConfig) -> Path:
    """The newest checkpoint of this shape and design among those trained on this machine."""
    for folder in trained_checkpoints():
        found = checkpoint_config(folder)
        if found and found.design == config.design and not _differences(found, config):
            return folder
    raise CheckpointError(
        f"the HiMix projections for {pair.encoder} and {pair.decoder} are not there",
        expected="a HiMix checkpoint of this pair",
        found="none among those trained on this machine",
        fix="train one, or point to one with --checkpoint FOLDER, or, to measure a device before "
        "any training, add --random-weights",
    )


def _differences(found: HiMixConfig, config: HiMixConfig) -> dict[str, tuple[Any, Any]]:
    """What makes two models of different shapes, by name."""
    one, other = (
        {
            f"{part}.{name}": value
            for part in ("vision", "decoder")
            for name, value in dataclasses.asdict(getattr(each, part)).items()
            if name not in CHECKPOINT_DECIDES
        }
        for each in (found, config)
    )
    return {name: (one[name], other[name]) for name in one if not _same(one[name], other[name])}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=SAME_FLOAT)
    return bool(one == other)


def _source(name: str, presets: Mapping[str, EncoderPreset] | Mapping[str, DecoderPreset]) -> str:
    """Where the weights of a preset are; of anything else, what it says itself."""
    return presets[name].hub_id if is_preset_name(name) else name


def _encoder(name: str, *, fetch: bool) -> tuple[VisionConfig, PreprocessConfig]:
    if is_preset_name(name):
        found = preset("encoder", ENCODERS, name)
        return found.vision, found.preprocess
    source = encoder_from_folder(folder_from_source(name, fetch=fetch))
    return source.vision, source.preprocess


def _decoder(name: str, *, fetch: bool) -> DecoderConfig:
    if is_preset_name(name):
        return preset("decoder", DECODERS, name).decoder
    return decoder_from_folder(folder_from_source(name, fetch=fetch)).decoder
