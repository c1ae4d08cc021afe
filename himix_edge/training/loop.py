"""Training: AdamW, a warm-up, a cosine, and a state on disk to go on from."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from himix_edge.config import HiMixConfig
from himix_edge.errors import TrainingError
from himix_edge.training.state import load_state, save_state
from himix_edge.training.tasks import Outcome, Task, TaskName

WARMUP_RATIO = 0.03  # the paper's table 7, as are AdamW, no weight decay, and the cosine
BETAS = (0.9, 0.98)
MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch's AdamW calls them
MAX_GRAD_NORM = 1.0
SAVE_SECONDS = 60.0  # between two states on disk


StepWatch = Callable[[int, Outcome], None]  # the steps that are done, what the last came to


@dataclass(frozen=True)
class Phase:
    """How long one task is trained, and how.

    Attributes:
        scenes: a step's.
        learning_rate: the highest, reached after the warm-up.
        asked: the kinds of the questions about each scene, in the phases with text.
    """

    task: TaskName
    steps: int
    scenes: int
    learning_rate: float
    asked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Progress:
    """What a step came to, for whoever watches."""

    phase: Phase
    step: int
    outcome: Outcome


def train_phase(
    task: Task,
    phase: Phase,
    config: HiMixConfig,
    seed: int,
    state_path: Path,
    watch: Callable[[Progress], None],
) -> None:
    """Trains until the phase is over, from the state on disk if there is one.

    Every batch is a function of the seed, the phase and the step; see `optimize`.

    Args:
        config: the model's; with the phase and the seed it says whose state is on disk.

    Raises:
        TrainingError: the state on disk is another run's, or the loss is no longer a number.
        OutputError: the state can't be written; the one before it stays.
    """

    def outcome(step: int) -> Outcome:
        rng = np.random.default_rng([seed, *phase.task.encode(), step])
        return task.outcome(phase.scenes, phase.asked, rng)

    optimize(
        task.trained,
        outcome,
        Plan(f"phase {phase.task!r}", phase.steps, phase.learning_rate),
        {"seed": seed, "phase": dataclasses.asdict(phase), "config": config.to_dict()},
        state_path,
        lambda step, came_to: watch(Progress(phase, step, came_to)),
    )


@dataclass(frozen=True)
class Plan:
    """How long something is trained.

    Attributes:
        name: what it is, for people.
        learning_rate: the highest, reached after the warm-up.
    """

    name: str
    steps: int
    learning_rate: float


def optimize(
    trained: nn.Module,
    outcome: Callable[[int], Outcome],
    plan: Plan,
    run: Mapping[str, Any],
    state_path: Path,
    watch: StepWatch,
    notes: dict[str, Any] | None = None,
) -> None:
    """Trains to the last step, from the state on disk if there is one.

    An interrupted run that goes on ends with the very weights of one that was never interrupted.
    The state is written once a minute and at the end; an interrupt costs what came after the last.

    Args:
        outcome: what a step's batch comes to: a function of the step, and of `notes`.
        run: all that decides the run, as plain data; it says whose state is on disk.
        watch: called after every step.
        notes: plain data that outcomes leave for later ones; kept in the state, and put back.

    Raises:
        TrainingError: the state on disk is another run's, or the loss is no longer a number.
        OutputError: the state can't be written; the one before it stays.
    """
    trained.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=plan.learning_rate, betas=BETAS, weight_decay=0.0
    )
    notes, step = {} if notes is None else notes, 0
    tensors = _state_tensors(trained, optimizer)
    if found := load_state(state_path, run, tensors):
        step = found["step"]
        notes.update(found["notes"])
    saved = time.monotonic()
    while step < plan.steps:
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * _schedule(step, plan.steps)
        came_to = outcome(step)
        _descend(came_to.loss, trained, optimizer, f"{plan.name} at step {step}")
        step += 1
        watch(step, Outcome(came_to.loss.detach(), came_to.right))
        if step == plan.steps or time.monotonic() - saved > SAVE_SECONDS:
            save_state(state_path, run, tensors, {"step": step, "notes": notes})
            saved = time.monotonic()


def _descend(
    loss: Tensor, trained: nn.Module, optimizer: torch.optim.Optimizer, where: str
) -> None:
    if not torch.isfinite(loss):
        raise TrainingError(f"the loss of {where} is {loss.item()}", fix="lower its learning rate")
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(trained.parameters(), MAX_GRAD_NORM)
    optimizer.step()


def _schedule(step: int, steps: int) -> float:
    """The part of the highest learning rate at a step: up in a line, then down in half a cosine."""
    warmup = max(1, round(steps * WARMUP_RATIO))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _state_tensors(trained: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments by name, the very ones: to be stored, or to be filled."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained.named_parameters():
        moments = optimizer.state[parameter]
        if not moments:  # as AdamW begins, but for having begun
            moments["step"] = torch.tensor(0.0)
            for part in MOMENTS:
                moments[part] = torch.zeros_like(parameter)
        tensors[name] = parameter.detach()
        tensors |= {f"{part}/{name}": moments[part] for part in ("step", *MOMENTS)}
    return tensors
