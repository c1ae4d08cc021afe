"""Recipes: a model, its phases, and the run that turns a seed into a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from himix_edge.bundles import DEMO_CHECKPOINT
from himix_edge.config import DecoderConfig, Design, HiMixConfig, PreprocessConfig, VisionConfig
from himix_edge.models.checkpoints import read_checkpoint
from himix_edge.models.himix import HiMix
from himix_edge.training.loop import Phase, Progress, train_phase
from himix_edge.training.tasks import initialised_model, task_from_name
from himix_edge.training.tokens import END_ID, tokenizer_from_world


@dataclass(frozen=True)
class Recipe:
    """All that decides what a run ends with, but the seed.

    Attributes:
        encoder: a checkpoint whose trained encoder the run begins with, as the paper's begin with
            SigLIP; None begins with a random one.
    """

    name: str
    config: HiMixConfig
    phases: tuple[Phase, ...]
    encoder: Path | None = None

    def with_design(self, design: Design) -> Recipe:
        """The same recipe for another of the paper's designs."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, design=design))


# The harder kinds more than once; relations are learned late, counts last of all.
ASKED = ("describe", "count", "colour", "exists", "relation", "relation", "which", "which")
ASKED_RELATIONS = ("describe", "count", "colour", "exists", "which", *["relation"] * 4)
ASKED_ALIKE = (*["describe", "count", "relation"] * 2, "colour", "exists", "which")
ASKED_TEACHER = (*ASKED_RELATIONS, "count")
ASKED_COUNTS = (*["count"] * 3, *["describe", "exists"] * 2, "colour", "relation", "which")

SHAPES = Recipe(
    name="shapes",
    config=HiMixConfig(
        vision=VisionConfig(
            image_size=112,
            patch_size=14,
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=6,
        ),
        decoder=DecoderConfig(
            vocab_size=448,  # the tokenizer's 432, in whole blocks of 64
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            eos_token_ids=(END_ID,),
        ),
        preprocess=PreprocessConfig(
            image_size=112,
            resize="squash",
            image_mean=(0.5, 0.5, 0.5),
            image_std=(0.5, 0.5, 0.5),
        ),
    ),
    phases=(
        Phase("encoder", steps=2000, scenes=64, learning_rate=1e-3),
        Phase("language", steps=2000, scenes=24, learning_rate=1e-3, asked=ASKED),
        Phase("projections", steps=400, scenes=24, learning_rate=2e-3, asked=ASKED),
        Phase("finetune", steps=2400, scenes=22, learning_rate=1e-3, asked=ASKED_RELATIONS),
        Phase("practice", steps=700, scenes=20, learning_rate=8e-4, asked=ASKED_COUNTS),
    ),
)
# For comparing the paper's four designs on two cores: the same encoder, less of everything.
ABLATION = Recipe(
    name="shapes-ablation",
    config=SHAPES.config,
    phases=(
        Phase("language", steps=1000, scenes=12, learning_rate=1e-3, asked=ASKED),
        Phase("projections", steps=200, scenes=12, learning_rate=2e-3, asked=ASKED_ALIKE),
        Phase("finetune", steps=1400, scenes=12, learning_rate=1e-3, asked=ASKED_ALIKE),
    ),
    encoder=DEMO_CHECKPOINT,
)
# The same, and then on until it answers well: what `convert` is tried on, as a vanilla model.
TEACHER = Recipe(
    name="shapes-teacher",
    config=SHAPES.config,
    phases=(
        *ABLATION.phases,
        Phase("practice", steps=3000, scenes=12, learning_rate=8e-4, asked=ASKED_TEACHER),
    ),
    encoder=DEMO_CHECKPOINT,
)
RECIPES = {recipe.name: recipe for recipe in (SHAPES, ABLATION, TEACHER)}


def train(
    recipe: Recipe, seed: int, folder: Path, watch: Callable[[Progress], None]
) -> tuple[HiMix, Tokenizer]:
    """Runs a recipe's phases one after the other, and goes on where an earlier run stopped.

    Args:
        folder: holds one state a phase; those of finished phases are read, not trained again.
        watch: called after every step.

    Raises:
        TrainingError: a state in the folder belongs to another run, or is corrupt.
        OutputError: the folder can't be written.
    """
    tokenizer = tokenizer_from_world(seed)
    model = initialised_model(recipe.config, seed)
    if recipe.encoder:
        pretrained = read_checkpoint(recipe.encoder).model()
        model.vision.load_state_dict(pretrained.vision.state_dict())
    for phase in recipe.phases:
        task = task_from_name(phase.task, model, tokenizer, seed)
        state = folder / f"{phase.task}.safetensors"
        train_phase(task, phase, recipe.config, seed, state, watch)
    return model.eval(), tokenizer
