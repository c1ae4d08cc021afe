"""From logits to a token: greedy, or drawn from the distribution that the options leave.

Reference: transformers' `RepetitionPenaltyLogitsProcessor`, `TemperatureLogitsWarper`,
`TopKLogitsWarper`, `TopPLogitsWarper`, in the order in which its `generate` applies them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from himix_edge.contract import SUPPRESSED_LOGIT
from himix_edge.errors import BundleError, ConfigError, closest


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, and when to end.

    Attributes:
        temperature: 0 is greedy, 1 the model's own distribution.
        top_k: draw from the k likeliest tokens only; 0 is off.
        top_p: draw from the fewest tokens that hold this much probability; 1 is off.
        repetition_penalty: above 1, tokens of the text so far get less likely; 1 is off.
        seed: the same seed draws the same tokens; None draws anew each time.
        max_tokens: of an answer.
        stop: strings before which the answer ends.

    Raises:
        ConfigError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(
            "temperature", self.temperature, "a number from 0 up", _number(self.temperature) >= 0
        )
        _check("top_k", self.top_k, "a whole number from 0 up", _whole(self.top_k) >= 0)
        _check("top_p", self.top_p, "a number above 0, at most 1", 0 < _number(self.top_p) <= 1)
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, "a number above 0", _number(penalty) > 0)
        seeded = self.seed is None or _whole(self.seed) >= 0
        _check("seed", self.seed, "a whole number from 0 up, or None", seeded)
        _check(
            "max_tokens", self.max_tokens, "a whole number from 1 up", _whole(self.max_tokens) >= 1
        )
        _check("stop", self.stop, "a tuple of strings, none of them empty", _strings(self.stop))

    def updated(self, changes: Mapping[str, Any]) -> SamplingOptions:
        """These options with some changed.

        Raises:
            ConfigError: an unknown option (the closest one is named), or a value out of its range.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise ConfigError(f"unknown sampling option {name!r}", fix=closest(name, names))
        return dataclasses.replace(self, **changes)


class Sampler:
    """Chooses one token after the other; two samplers with one seed choose alike."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._random = np.random.default_rng(options.seed)

    def __call__(self, logits: NDArray[np.float32], text: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: [V]
            text: all token ids before it, prompt and answer.

        Raises:
            BundleError: logits that are not finite.
        """
        likeliest = int(logits.argmax())  # where one is no number, that one
        if not (math.isfinite(logits[likeliest]) and math.isfinite(logits.min())):
            raise BundleError(
                "the decoder fails",
                expected="finite logits",
                found="NaN or infinity",
                fix="export the bundle again; its verification names the tensor at fault",
            )
        greedy = self.options.temperature == 0
        if greedy and self.options.repetition_penalty == 1:
            return likeliest
        scores = penalized(logits.astype(np.float64), text, self.options.repetition_penalty)
        scores[logits < logits[likeliest] + SUPPRESSED_LOGIT / 2] = -np.inf  # whatever the options
        if greedy:
            return int(scores.argmax())
        cumulative = probabilities(scores, self.options).cumsum()
        drawn = self._random.random() * cumulative[-1]
        return int(np.searchsorted(cumulative, drawn, side="right"))


def penalized(
    scores: NDArray[np.float64], text: Sequence[int], penalty: float
) -> NDArray[np.float64]:
    """[V] -> [V]: scores of the text's tokens over the penalty, or times it where negative."""
    seen = np.unique(np.asarray(text, dtype=np.int64))
    scores = scores.copy()
    scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    return scores


def probabilities(scores: NDArray[np.float64], options: SamplingOptions) -> NDArray[np.float64]:
    """[V] -> [V]: temperature, top_k, top_p, softmax; for a temperature above 0."""
    scores = (scores - scores.max()) / options.temperature
    if 0 < options.top_k < scores.size:
        kth = np.partition(scores, -options.top_k)[-options.top_k]
        scores[scores < kth] = -np.inf
    weights = np.exp(scores)
    weights /= weights.sum()
    if options.top_p < 1:
        ascending = np.argsort(weights, kind="stable")
        unlikely = weights[ascending].cumsum() <= 1 - options.top_p
        unlikely[-1] = False  # the likeliest always stays
        weights[ascending[unlikely]] = 0
        weights /= weights.sum()
    return weights


def _check(name: str, value: object, expected: str, right: bool) -> None:
    if not right:
        raise ConfigError(f"{name} is out of range", expected=expected, found=repr(value))


def _number(value: object) -> float:
    """The value if it is a finite number, else NaN, which no comparison holds for."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if real else math.nan  # type: ignore[arg-type]


def _strings(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)


def _whole(value: object) -> float:
    return _number(value) if isinstance(value, int) else math.nan
