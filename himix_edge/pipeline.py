"""The whole line at once: a recipe trained, exported, judged through its bundle, and saved."""

from __future__ import annotations

from pathlib import Path

import torch

from himix_edge.claims import scratch_folder
from himix_edge.evaluation import Watch, evaluate, table
from himix_edge.export.bundle import export_bundle
from himix_edge.files import refuse_foreign_folder, sole_writer
from himix_edge.models.checkpoints import CHECKPOINT, read_checkpoint, save_checkpoint
from himix_edge.shapes.benchmark import NOTICE
from himix_edge.trained import remember_checkpoint
from himix_edge.training.card import model_card
from himix_edge.training.log import TrainingLog
from himix_edge.training.loop import Progress
from himix_edge.training.recipe import Recipe, train
from himix_edge.training.tokens import CHAT_TEMPLATE


def train_checkpoint(recipe: Recipe, seed: int, output: Path, scenes: int, watch: Watch) -> Path:
    """Trains, evaluates and saves; goes on where an earlier run into `output` stopped.

    Args:
        scenes: how many held-out scenes the model card's accuracy is measured on.

    Returns:
        the checkpoint's folder, within `output`; `trained_checkpoints` knows it from now on.

    Raises:
        TrainingError: a state in `output` belongs to another run, or is corrupt.
        OutputError: `output` can't be written, or holds a checkpoint folder of someone else's.
    """
    refuse_foreign_folder(output / "checkpoint", CHECKPOINT)
    with sole_writer(output):
        return _train_checkpoint(recipe, seed, output, scenes, watch)


def _train_checkpoint(recipe: Recipe, seed: int, output: Path, scenes: int, watch: Watch) -> Path:
    log = TrainingLog(output)

    def watch_training(progress: Progress) -> None:
        said = log.update(progress)
        watch(progress.phase.task, progress.step, progress.phase.steps, str(said or ""))

    model, tokenizer = train(recipe, seed, output, watch_training)

    def save(folder: Path, card: str) -> Path:
        save_checkpoint(
            folder,
            model,
            name=f"{recipe.config.design}-{recipe.name}-demo",
            notice=NOTICE,
            tokenizer_json=tokenizer.to_str(pretty=True),
            chat_template=CHAT_TEMPLATE,
            model_card=card,
            dtype=torch.float16,
        )
        return folder

    with scratch_folder() as scratch:
        bundle = scratch / "bundle"
        export_bundle(read_checkpoint(save(scratch / "checkpoint", "# A trial\n")), bundle)
        result = evaluate(bundle, scenes, None, watch)
    card = model_card(recipe, seed, log.last, table(result), scenes)
    checkpoint = save(output / "checkpoint", card)
    remember_checkpoint(checkpoint)
    return checkpoint
