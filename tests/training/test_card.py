"""The model card says how the model came about, and no more than that."""

from __future__ import annotations

import pytest

from himix_edge.training.card import WHAT, model_card
from himix_edge.training.log import LogLine
from himix_edge.training.recipe import ABLATION, SHAPES, Recipe


def card_of(recipe: Recipe) -> str:
    log: dict[str, LogLine] = {
        phase.task: LogLine(phase.task, phase.steps, 90.0, 0.5, {"count": 0.5, "which": 1.0})
        for phase in recipe.phases
    }
    return model_card(recipe, 3, log, "| count | 50.0% |", scenes=77)


@pytest.mark.parametrize("recipe", [SHAPES, ABLATION.with_design("uniform")], ids=["shapes", "ab"])
def test_it_names_the_command_and_every_phase(recipe: Recipe) -> None:
    card = card_of(recipe)
    design = recipe.config.design
    assert card.startswith(f"# {design}-{recipe.name}-demo\n\nA demo model of himix-edge. ")
    assert f"himix-edge train --recipe {recipe.name} --design {design} --seed 3\n" in card
    assert f"Design: {design}." in card
    for phase in recipe.phases:
        row = f"| {phase.task} | {WHAT[phase.task]} | {phase.steps} | {phase.scenes} |"
        assert row in card
        assert f"| {phase.learning_rate:g} | 2 | count 50%, which 100% |" in card
    assert card.count("| count 50%, which 100% |") == len(recipe.phases)
    assert "On 77 held-out scenes" in card
    assert "\n| count | 50.0% |\n" in card


def test_it_says_what_the_run_began_with() -> None:
    nothing, encoder = "Nothing was pretrained elsewhere", "The encoder is that of `shapes-demo`"
    assert nothing in card_of(SHAPES)
    assert encoder not in card_of(SHAPES)
    assert encoder in card_of(ABLATION)
    assert nothing not in card_of(ABLATION)
