from __future__ import annotations

import dataclasses
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from himix_edge.config import HiMixConfig
from himix_edge.errors import OutputError, TrainingError
from himix_edge.training import loop
from himix_edge.training.loop import Phase, Progress, train_phase
from himix_edge.training.tasks import Kinds, Outcome
from tests.tiny import tiny_config

CONFIG = tiny_config()
PHASE = Phase("encoder", steps=12, scenes=5, learning_rate=0.1)


class LineTask:
    """Least squares on random points of a line: y = 3 x - 1."""

    def __init__(self) -> None:
        self.trained = nn.Linear(1, 1)
        with torch.no_grad():
            for parameter in self.trained.parameters():
                parameter.zero_()

    def outcome(self, scenes: int, kinds: Kinds, rng: np.random.Generator) -> Outcome:
        x = torch.from_numpy(rng.normal(size=(scenes, 1)).astype(np.float32))
        return Outcome(((self.trained(x) - (3 * x - 1)) ** 2).mean(), {"all": 0.5})


class NowhereTask(LineTask):
    def outcome(self, scenes: int, kinds: Kinds, rng: np.random.Generator) -> Outcome:
        good = super().outcome(scenes, kinds, rng)
        return Outcome(good.loss * math.nan, good.right)


def ignore(_: Progress) -> None:
    pass


def weights(task: LineTask) -> list[float]:
    return [value for p in task.trained.parameters() for value in p.detach().flatten().tolist()]


def test_it_learns(tmp_path: Path) -> None:
    task = LineTask()
    train_phase(
        task, dataclasses.replace(PHASE, steps=200), CONFIG, 0, tmp_path / "s.safetensors", ignore
    )
    assert weights(task) == pytest.approx([3.0, -1.0], abs=0.02)


@pytest.mark.parametrize("interrupted_after", [1, 7, 11])
def test_an_interrupted_run_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_after: int
) -> None:
    straight = LineTask()
    train_phase(straight, PHASE, CONFIG, 3, tmp_path / "straight.safetensors", ignore)

    def interrupt(progress: Progress) -> None:
        if progress.step == interrupted_after + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    state = tmp_path / "halting.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_phase(LineTask(), PHASE, CONFIG, 3, state, interrupt)
    steps: list[int] = []
    resumed = LineTask()
    train_phase(resumed, PHASE, CONFIG, 3, state, lambda progress: steps.append(progress.step))
    assert steps == list(range(interrupted_after + 1, PHASE.steps + 1))
    assert weights(resumed) == weights(straight)  # to the bit
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*"))


def test_a_finished_phase_is_read_not_trained(tmp_path: Path) -> None:
    first, again = LineTask(), LineTask()
    train_phase(first, PHASE, CONFIG, 3, tmp_path / "s.safetensors", ignore)

    def never(_: Progress) -> None:
        raise AssertionError

    train_phase(again, PHASE, CONFIG, 3, tmp_path / "s.safetensors", never)
    assert weights(again) == weights(first)


def test_another_seed_trains_on_other_batches(tmp_path: Path) -> None:
    one, other = LineTask(), LineTask()
    train_phase(one, PHASE, CONFIG, 1, tmp_path / "1.safetensors", ignore)
    train_phase(other, PHASE, CONFIG, 2, tmp_path / "2.safetensors", ignore)
    assert weights(one) != weights(other)


@pytest.mark.parametrize(
    ("phase", "config", "seed", "differing"),
    [
        (PHASE, CONFIG, 4, "expected seed 4, found seed 3"),
        (PHASE, tiny_config("vanilla"), 3, 'expected config.design "vanilla", found'),
        (dataclasses.replace(PHASE, learning_rate=0.2), CONFIG, 3, "phase.learning_rate 0.2"),
    ],
)
def test_the_state_of_another_run_is_refused(
    tmp_path: Path, phase: Phase, config: HiMixConfig, seed: int, differing: str
) -> None:
    state = tmp_path / "s.safetensors"
    train_phase(LineTask(), PHASE, CONFIG, 3, state, ignore)
    with pytest.raises(TrainingError, match=f"another run.*{differing}"):
        train_phase(LineTask(), phase, config, seed, state, ignore)


def test_a_state_of_before_states_had_a_sum_goes_on(tmp_path: Path) -> None:
    state = tmp_path / "s.safetensors"
    train_phase(LineTask(), PHASE, CONFIG, 3, state, ignore)
    with safe_open(state, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "sha256"}
    save_file(load_file(state), state, metadata)
    steps: list[int] = []
    train_phase(LineTask(), PHASE, CONFIG, 3, state, lambda progress: steps.append(progress.step))
    assert steps == []


def test_safetensors_that_are_no_state_are_refused(tmp_path: Path) -> None:
    state = tmp_path / "s.safetensors"
    save_file({"weight": torch.zeros(1, 1)}, state)
    with pytest.raises(TrainingError, match="is no state of a run"):
        train_phase(LineTask(), PHASE, CONFIG, 3, state, ignore)


def test_a_full_disk_keeps_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "s.safetensors"

    def fill_the_disk(progress: Progress) -> None:
        if progress.step == 4:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))

    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OutputError, match="cannot write"):
            train_phase(LineTask(), PHASE, CONFIG, 3, state, fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    steps: list[int] = []
    train_phase(LineTask(), PHASE, CONFIG, 3, state, lambda progress: steps.append(progress.step))
    assert steps[0] == 4  # step 3 was the last that could be kept


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the loss of phase 'encoder' at step 0 is nan"):
        train_phase(NowhereTask(), PHASE, CONFIG, 0, tmp_path / "s.safetensors", ignore)


def test_the_schedule_warms_up_and_ends_in_a_cosine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: rates.append(self.param_groups[0]["lr"]),
    )
    phase = dataclasses.replace(PHASE, steps=200, learning_rate=1.0)
    train_phase(LineTask(), phase, CONFIG, 0, tmp_path / "s.safetensors", ignore)
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    for step in (6, 50, 103, 150, 199):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 6) / 194))
        assert rates[step] == pytest.approx(cosine)
