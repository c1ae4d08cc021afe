"""Linear maps in closed form from running sums: memory does not grow with the rows seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from himix_edge.errors import TrainingError

SUMS = ("count", "x", "xx", "y", "yy", "xy")


class Moments:
    """Sums in float64 over rows of inputs x [d] and, for each layer, of outputs y [o].

    Where each layer weighs the rows in its own way, each has its own sums of the inputs; else all
    share one. G is the number of such groups: L, or 1.

    Attributes:
        count: [G], of the weights; x: [G, d]; xx: [G, d, d], of x x^T.
        y: [L, o]; yy: [L, o], of the squares; xy: [L, d, o], of x y^T.
    """

    def __init__(
        self, layers: int, inputs: int, outputs: int, *, weighted: bool, device: torch.device
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.groups, self.layers, self.inputs = layers if weighted else 1, layers, inputs
        self.count, self.x = zeros(self.groups), zeros(self.groups, inputs)
        self.xx = zeros(self.groups, inputs, inputs)
        self.y, self.yy = zeros(layers, outputs), zeros(layers, outputs)
        self.xy = zeros(layers, inputs, outputs)

    def tensors(self) -> dict[str, Tensor]:
        """The sums themselves by name, not copies: to store, or to be filled."""
        return {name: getattr(self, name) for name in SUMS}

    def add(self, x: Tensor, targets: Sequence[Tensor], weights: Tensor | None = None) -> None:
        """More rows.

        Args:
            x: [R, d]
            targets: per layer [R, o].
            weights: [G, R]; None is 1 for all.
        """
        wide = x.to(self.x)  # [R, d]
        ones = wide.new_ones(self.groups, len(wide))
        weights = ones if weights is None else weights.to(ones)
        for group, weight in enumerate(weights):
            self.count[group] += weight.sum()
            self.x[group] += weight @ wide
            self.xx[group].addmm_((wide * weight[:, None]).T, wide)
        for layer, target in enumerate(targets):
            y, weight = target.to(self.y), weights[self._group(layer)]
            weighted = y * weight[:, None]  # [R, o]
            self.y[layer] += weighted.sum(0)
            self.yy[layer] += (weighted * y).sum(0)
            self.xy[layer].addmm_(wide.T, weighted)

    def ridge(self, penalty: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Layer by layer, the weight [o, d] and the bias [o] of the map from x to y.

        They minimize the squared error, plus `penalty` times the inputs' mean variance times the
        weight's squares; the bias is free.

        Raises:
            TrainingError: sums that are not finite, or that leave the map undetermined.
        """
        factor, seen = self.xx[0], -1
        for layer in range(self.layers):
            if (group := self._group(layer)) != seen:
                factor, seen = self._factor(group, penalty), group
            count, mean = self.count[group], self._mean(group)
            covariance = self.xy[layer] / count - torch.outer(mean, self.y[layer] / count)
            weight = torch.cholesky_solve(covariance, factor).T  # [o, d]
            bias = self.y[layer] / count - weight @ mean
            if not bool(weight.isfinite().all() and bias.isfinite().all()):
                raise _undetermined(layer)
            yield weight, bias

    def errors(self, layer: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A map's error in these rows: the mean squared error, and y's variance, each [o].

        Args:
            weight: [o, d]
            bias: [o]
        """
        group = self._group(layer)
        weight, bias = weight.to(self.x), bias.to(self.x)
        count, mean, mean_y = (
            self.count[group],
            self._mean(group),
            self.y[layer] / self.count[group],
        )
        variance = self.yy[layer] / count - mean_y.square()
        covariance = self.xy[layer] / count - torch.outer(mean, mean_y)  # [d, o]
        spread = ((weight @ self._covariance(group)) * weight).sum(1)
        error = variance - 2 * (weight.T * covariance).sum(0) + spread
        error += (mean_y - weight @ mean - bias).square()
        return error, variance

    def _group(self, layer: int) -> int:
        return layer if self.groups > 1 else 0

    def _mean(self, group: int) -> Tensor:
        return self.x[group] / self.count[group]

    def _covariance(self, group: int) -> Tensor:
        """Of the inputs, [d, d]."""
        mean = self._mean(group)
        return (self.xx[group] / self.count[group]).addr_(mean, mean, alpha=-1)

    def _factor(self, group: int, penalty: float) -> Tensor:
        """The Cholesky factor of the inputs' covariance with the penalty on its diagonal."""
        covariance = self._covariance(group)
        diagonal = covariance.diagonal()
        diagonal += penalty * diagonal.mean()
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if bool(failed) or not bool(factor.isfinite().all()):
            raise _undetermined(group)
        return factor


def _undetermined(layer: int) -> TrainingError:
    return TrainingError(
        f"the projections of layer {layer} can't be fitted",
        expected="features, keys and values that are finite and vary",
        found="sums over them that are not finite, or a matrix that is singular",
        fix="use more pictures, or run the teacher in float32",
    )
