from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from himix_edge.convert.moments import Moments
from himix_edge.errors import TrainingError
from tests.models.reference import random_tensor
from tests.tolerances import RUNNING_SUMS

ROWS, INPUTS, OUTPUTS, LAYERS = 60, 5, 4, 2
Array = NDArray[np.float64]


def data() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Inputs far from zero on average, outputs that depend on them and on chance, weights."""
    x = 3 + random_tensor(ROWS, INPUTS, seed=1).double() * torch.tensor([1.0, 2.0, 0.1, 5.0, 1.0])
    maps = random_tensor(LAYERS, INPUTS, OUTPUTS, seed=2).double()
    noise = random_tensor(LAYERS, ROWS, OUTPUTS, seed=3).double()
    targets = [x @ maps[i] + noise[i] - 7 for i in range(LAYERS)]
    return x, targets, random_tensor(LAYERS, ROWS, seed=4).double().abs() + 0.1


def arrays() -> tuple[Array, list[Array], Array]:
    x, targets, weights = data()
    return x.numpy(), [target.numpy() for target in targets], weights.numpy()


def sums(weighted: bool, chunks: int = 1) -> Moments:
    x, targets, weights = data()
    moments = Moments(LAYERS, INPUTS, OUTPUTS, weighted=weighted, device=torch.device("cpu"))
    for rows in torch.arange(ROWS).chunk(chunks):
        part = weights[:, rows] if weighted else None
        moments.add(x[rows], [target[rows] for target in targets], part)
    return moments


def lstsq(x: Array, y: Array, weights: Array, penalty: float) -> tuple[Array, Array]:
    """Weighted ridge regression as plain least squares with rows added for the penalty.

    The column of ones, the bias, has none; numpy solves the rows, not the normal equations.
    """
    share = weights / weights.sum()
    mean = share @ x
    scale = penalty * (share @ (x - mean) ** 2).mean()
    rows = np.concatenate((x, np.ones((len(x), 1))), axis=1) * np.sqrt(share)[:, None]
    extra = np.concatenate((np.sqrt(scale) * np.eye(INPUTS), np.zeros((INPUTS, 1))), axis=1)
    targets = np.concatenate((y * np.sqrt(share)[:, None], np.zeros((INPUTS, OUTPUTS))))
    solution = np.linalg.lstsq(np.concatenate((rows, extra)), targets, rcond=None)[0]
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("penalty", [1e-9, 0.3])
def test_the_map_is_that_of_least_squares(weighted: bool, penalty: float) -> None:
    x, targets, weights = arrays()
    for i, (weight, bias) in enumerate(sums(weighted).ridge(penalty)):
        own = weights[i] if weighted else np.ones(ROWS)
        expected, constant = lstsq(x, targets[i], own, penalty)
        assert np.allclose(weight.numpy(), expected, rtol=0, atol=RUNNING_SUMS)
        assert np.allclose(bias.numpy(), constant, rtol=0, atol=RUNNING_SUMS)


@pytest.mark.parametrize("weighted", [False, True])
def test_errors_follow_from_the_sums_alone(weighted: bool) -> None:
    x, targets, weights = arrays()
    moments = sums(weighted)
    weight, bias = random_tensor(OUTPUTS, INPUTS, seed=5), random_tensor(OUTPUTS, seed=6)
    for i, y in enumerate(targets):
        share = weights[i] / weights[i].sum() if weighted else np.full(ROWS, 1 / ROWS)
        error, variance = moments.errors(i, weight, bias)
        off = share @ (y - x @ weight.double().numpy().T - bias.double().numpy()) ** 2
        assert np.allclose(error.numpy(), off, rtol=0, atol=RUNNING_SUMS)
        spread = share @ (y - share @ y) ** 2
        assert np.allclose(variance.numpy(), spread, rtol=0, atol=RUNNING_SUMS)


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_do_not_depend_on_how_rows_come(weighted: bool) -> None:
    one, many = sums(weighted).tensors(), sums(weighted, chunks=7).tensors()
    for name, tensor in one.items():
        assert torch.allclose(tensor, many[name], rtol=1e-13, atol=0), name


def test_half_precision_rows_are_summed_in_double() -> None:
    moments = Moments(1, 1, 1, weighted=False, device=torch.device("cpu"))
    rows = torch.full((3000, 1), 1.5, dtype=torch.float16)
    moments.add(rows, [rows])
    assert moments.x.item() == 4500.0
    assert moments.xy.item() == 6750.0  # float16 counts by fours there


def test_inputs_that_do_not_vary_are_refused() -> None:
    moments = Moments(1, 2, 1, weighted=False, device=torch.device("cpu"))
    moments.add(torch.ones(9, 2), [random_tensor(9, 1)])
    with pytest.raises(TrainingError, match="layer 0 can't be fitted"):
        list(moments.ridge(1e-3))


@pytest.mark.parametrize("part", ["x", "y"])
def test_sums_that_are_not_finite_are_refused(part: str) -> None:
    x, targets, _ = data()
    moments = sums(weighted=False)
    (x if part == "x" else targets[1])[3, 2] = torch.inf
    moments.add(x, targets)
    with pytest.raises(TrainingError, match="not finite"):
        list(moments.ridge(1e-3))
