from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from himix_edge.bundles import DEMO_CHECKPOINT
from himix_edge.config import DecoderConfig, Design, HiMixConfig, VisionConfig
from himix_edge.errors import CheckpointError
from himix_edge.models.checkpoints import read_checkpoint, save_checkpoint
from himix_edge.models.himix import HiMix
from himix_edge.training.data import NO_LOSS, image_batch, scene_batch, text_batch
from himix_edge.training.labels import CLASSES, labels_of
from himix_edge.training.loop import Phase
from himix_edge.training.recipe import ABLATION, ASKED, RECIPES, SHAPES, TEACHER, Recipe, train
from himix_edge.training.tasks import TaskName, initialised_model, task_from_name
from himix_edge.training.tokens import tokenizer_from_world

CONFIG = dataclasses.replace(
    SHAPES.config,
    vision=VisionConfig(112, 14, 24, 48, 1, 2),
    decoder=DecoderConfig(448, 24, 48, 2, 4, 2, 6, 256, eos_token_ids=(0,)),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_from_world(0)


def snapshot(model: HiMix) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "moving"),
    [
        ("encoder", {"vision"}),
        ("language", {"decoder"}),
        ("projections", {"injection"}),
        ("finetune", {"injection", "decoder"}),
        ("practice", {"injection", "decoder"}),
    ],
)
def test_a_task_moves_its_own_part_and_nothing_else(
    name: TaskName, moving: set[str], tokenizer: Tokenizer
) -> None:
    model = initialised_model(CONFIG, 0)
    before = snapshot(model)
    task = task_from_name(name, model, tokenizer, 0)
    task.trained.requires_grad_(True)
    optimizer = torch.optim.SGD(task.trained.parameters(), lr=0.5)
    task.outcome(1, ASKED, np.random.default_rng(0)).loss.backward()
    optimizer.step()
    moved = {
        key.split(".")[0]
        for key, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[key])
    }
    assert moved == moving


@pytest.mark.parametrize("name", ["encoder", "language", "projections", "finetune"])
def test_a_step_down_the_gradient_lowers_the_loss(name: TaskName, tokenizer: Tokenizer) -> None:
    task = task_from_name(name, initialised_model(CONFIG, 0), tokenizer, 0)
    task.trained.requires_grad_(True)
    optimizer = torch.optim.SGD(task.trained.parameters(), lr=1e-4)
    before = task.outcome(1, ASKED, np.random.default_rng(0)).loss
    before.backward()
    optimizer.step()
    after = task.outcome(1, ASKED, np.random.default_rng(0)).loss
    assert after.item() < before.item()


@pytest.mark.parametrize("design", ["himix", "uniform", "hierarchical", "vanilla"])
def test_the_loss_is_the_mean_over_answers_of_their_tokens_cross_entropy(
    design: Design, tokenizer: Tokenizer
) -> None:
    model = initialised_model(dataclasses.replace(CONFIG, design=design), 0)
    outcome = task_from_name("finetune", model, tokenizer, 0).outcome(
        3, ASKED, np.random.default_rng(7)
    )

    rng = np.random.default_rng(7)
    scenes = scene_batch(rng, 3)
    images = image_batch(scenes, CONFIG, rng)
    texts = text_batch(scenes, ASKED, tokenizer, rng)
    each, right = [], dict.fromkeys(ASKED, 0.0)
    with torch.no_grad():
        for row, kind in enumerate(texts.kinds):
            i = row // len(ASKED)
            logits = model(images[i : i + 1], texts.input_ids[row : row + 1])[0]
            learned = texts.labels[row] != NO_LOSS
            each.append(F.cross_entropy(logits[learned], texts.labels[row][learned]))
            hit = torch.equal(logits[learned].argmax(-1), texts.labels[row][learned])
            right[kind] += hit / texts.kinds.count(kind)
    assert outcome.loss.item() == pytest.approx(float(torch.stack(each).mean()), abs=1e-5)
    assert outcome.right == pytest.approx({kind: right[kind] for kind in set(texts.kinds)})


def test_a_perfect_eye_would_have_no_dense_loss() -> None:
    from himix_edge.training.tasks import _dense_outcome

    labels = labels_of(scene_batch(np.random.default_rng(0), 4), 112, 14)
    symbols = torch.from_numpy(labels.symbols())
    sharp = torch.cat((symbols[..., :-2] * 50, symbols[..., -2:]), dim=-1)
    perfect = _dense_outcome(sharp, labels)
    assert perfect.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert perfect.right == dict.fromkeys([*CLASSES, "object"], 1.0)
    blind = _dense_outcome(torch.zeros_like(sharp), labels)
    assert blind.loss.item() > np.log(list(CLASSES.values())).sum()
    assert blind.right["object"] == 0.0


def test_initial_weights_depend_on_the_seed_alone() -> None:
    one, same, other = (snapshot(initialised_model(CONFIG, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_initial_positions_tell_rows_and_columns() -> None:
    positions = initialised_model(CONFIG, 0).vision.model.embeddings.position_embedding.weight[1:]
    grid = positions.detach().reshape(8, 8, -1)
    width = grid.shape[-1] // 2
    assert torch.equal(grid[2, 3, :width], grid[2, 6, :width])  # one half is the row's
    assert torch.equal(grid[2, 3, width:], grid[5, 3, width:])  # the other the column's
    assert len({tuple(row.tolist()) for row in positions}) == 64


def test_a_recipe_runs_from_end_to_end_and_goes_on_after_an_interrupt(tmp_path: Path) -> None:
    tasks: tuple[TaskName, ...] = ("encoder", "language", "projections", "finetune")
    recipe = Recipe(
        "tiny",
        CONFIG,
        tuple(Phase(name, 2, 1, 1e-3, asked=("describe", "count")) for name in tasks),
    )
    seen: list[tuple[str, int]] = []
    straight, _ = train(recipe, 0, tmp_path / "a", lambda p: seen.append((p.phase.task, p.step)))
    assert seen == [(name, step) for name in tasks for step in (1, 2)]

    def interrupt(progress: object) -> None:
        if getattr(progress, "phase").task == "projections":  # noqa: B009
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, 0, tmp_path / "b", interrupt)
    resumed, _ = train(recipe, 0, tmp_path / "b", lambda _: None)
    expected = snapshot(straight)
    assert all(torch.equal(t, expected[key]) for key, t in resumed.state_dict().items())


def saved_encoder(folder: Path, seed: int) -> HiMix:
    model = initialised_model(CONFIG, seed)
    save_checkpoint(
        folder, model, name="encoder", notice="", tokenizer_json="", chat_template="", model_card=""
    )
    return model


def test_a_run_may_begin_with_a_trained_encoder_and_leaves_it(tmp_path: Path) -> None:
    pretrained = saved_encoder(tmp_path / "encoder", seed=5)
    phases = (Phase("projections", 1, 1, 1e-3, asked=("count",)),)
    recipe = Recipe("tiny", CONFIG, phases, encoder=tmp_path / "encoder")
    model, _ = train(recipe.with_design("uniform"), 0, tmp_path / "run", lambda _: None)
    assert model.config.design == "uniform"
    for name, tensor in model.vision.state_dict().items():
        assert torch.equal(tensor, pretrained.vision.state_dict()[name]), name
    fresh = initialised_model(dataclasses.replace(CONFIG, design="uniform"), 0)
    assert not torch.equal(
        fresh.vision.state_dict()["model.embeddings.class_embedding"],
        model.vision.state_dict()["model.embeddings.class_embedding"],
    )
    for name, tensor in model.decoder.state_dict().items():  # the encoder alone was taken
        assert torch.equal(tensor, fresh.decoder.state_dict()[name]), name


def test_an_encoder_that_is_gone(tmp_path: Path) -> None:
    recipe = Recipe("tiny", CONFIG, (), encoder=tmp_path / "gone")
    with pytest.raises(CheckpointError, match="gone is not a checkpoint"):
        train(recipe, 0, tmp_path / "run", lambda _: None)


def test_the_ablation_is_one_recipe_for_the_four_designs() -> None:
    assert RECIPES == {"shapes": SHAPES, "shapes-ablation": ABLATION, "shapes-teacher": TEACHER}
    assert TEACHER.phases[:3] == ABLATION.phases
    assert set(TEACHER.phases[3].asked) == set(ASKED)
    assert ABLATION.config == SHAPES.config == read_checkpoint(DEMO_CHECKPOINT).config
    assert ABLATION.encoder == DEMO_CHECKPOINT
    assert [phase.task for phase in ABLATION.phases] == ["language", "projections", "finetune"]
    for phase in ABLATION.phases:
        assert set(phase.asked) == set(ASKED)  # what is not asked is forgotten
    for design in ("uniform", "hierarchical", "vanilla"):
        other = ABLATION.with_design(design)
        config = dataclasses.replace(ABLATION.config, design=design)
        assert other == dataclasses.replace(ABLATION, config=config)


def test_the_shipped_recipe_is_what_the_paper_asks_for() -> None:
    config: HiMixConfig = SHAPES.config
    assert config.design == "himix"
    assert [phase.task for phase in SHAPES.phases] == [
        "encoder",
        "language",
        "projections",
        "finetune",
        "practice",
    ]
    longest = text_batch(
        scene_batch(np.random.default_rng(0), 200),
        ("describe", "relation"),
        tokenizer_from_world(0),
        np.random.default_rng(0),
    ).input_ids.shape[1]
    assert config.vision.num_image_tokens > longest  # more image tokens than text tokens
