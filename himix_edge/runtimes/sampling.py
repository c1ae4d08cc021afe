"""From logits to a token: greedy, or drawn from the distribution that the options leave.

Reference: transformers' `RepetitionPenaltyLogitsProcessor`, `TemperatureLogitsWarper`,
`TopKLogitsWarper`, `TopPLogitsWarper`, in the order in which its `generate` applies them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from himix_edge.contract import SUPPRESSED_LOGIT
from himix_edge.errors import BundleError, ConfigError, closest
from himix_edge.plain import shown

MAX_NUMBER = 1000  # of a temperature, which then draws nearly evenly, and of a penalty
MAX_COUNT = 2**31 - 1  # of tokens; an answer ends where the context is full, whatever is asked for
MAX_SEED = 2**64 - 1
MAX_STOPS, MAX_STOP_LENGTH = 1024, 10_000  # strings, and characters of all of them

_LARGEST = float(np.finfo(np.float64).max)


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen, and when to end.

    Attributes:
        temperature: 0 is greedy, 1 the model's own distribution, 1000 the highest.
        top_k: draw from the k likeliest tokens only; 0 is all of them. Up to 2**31 - 1.
        top_p: draw from the fewest tokens that hold this much probability; 1 is all.
        repetition_penalty: above 1, tokens of the text so far get less likely; 1 changes nothing.
            Above 0, up to 1000.
        seed: the same seed draws the same tokens; None draws anew each time. Up to 2**64 - 1.
        max_tokens: of an answer, from 1 to 2**31 - 1; it ends as well where the context is full.
        stop: a string, or several, before which the answer ends; kept as a tuple. Up to 1,024
            strings, of 10,000 characters together.

    Raises:
        ConfigError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 256
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Checks every value, and keeps it as plain Python's: numpy's numbers do as well."""
        number, whole, stop = _number(self.temperature), _whole(self.top_k), _strings(self.stop)
        most = f"a number from 0 to {MAX_NUMBER}"
        self._keep("temperature", number, most, 0 <= number <= MAX_NUMBER)
        self._keep("top_k", whole, f"a whole number from 0 to {MAX_COUNT}", 0 <= whole <= MAX_COUNT)
        number = _number(self.top_p)
        self._keep("top_p", number, "a number above 0, at most 1", 0 < number <= 1)
        number = _number(self.repetition_penalty)
        most = f"a number above 0, at most {MAX_NUMBER}"
        self._keep("repetition_penalty", number, most, 0 < number <= MAX_NUMBER)
        if self.seed is not None:
            whole = _whole(self.seed)
            most = f"a whole number from 0 to {MAX_SEED}, or None"
            self._keep("seed", whole, most, 0 <= whole <= MAX_SEED)
        whole = _whole(self.max_tokens)
        most = f"a whole number from 1 to {MAX_COUNT}"
        self._keep("max_tokens", whole, most, 1 <= whole <= MAX_COUNT)
        self._keep("stop", stop, "a string or several, none of them empty", "" not in stop)
        most = f"at most {MAX_STOPS:,} strings of {MAX_STOP_LENGTH:,} characters together"
        short = len(stop) <= MAX_STOPS and sum(map(len, stop)) <= MAX_STOP_LENGTH
        self._keep("stop", stop, most, short)

    def _keep(self, name: str, plain: object, expected: str, right: bool) -> None:
        if not right:
            found = shown(getattr(self, name))
            raise ConfigError(f"{name} is out of range", expected=expected, found=found)
        object.__setattr__(self, name, plain)  # frozen for everyone else

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
    with np.errstate(over="ignore"):  # by a penalty next to nothing, or next to infinity
        punished = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    scores[seen] = np.clip(punished, -_LARGEST, _LARGEST)
    return scores


def probabilities(scores: NDArray[np.float64], options: SamplingOptions) -> NDArray[np.float64]:
    """[V] -> [V]: temperature, top_k, top_p, softmax; for a temperature above 0."""
    with np.errstate(over="ignore"):  # by a temperature next to nothing: to minus infinity
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


def _number(value: object) -> float:
    """The value if it is a finite number, else NaN, which no comparison holds for."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond all floats
        return math.nan
    return number if math.isfinite(number) else math.nan


def _whole(value: object) -> int:
    """The value if it is a whole number, of any size, else one that is out of every range."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if whole else -1  # type: ignore[call-overload]


def _strings(value: object) -> tuple[str, ...]:
    """One string, or several, as a tuple; what is neither, as one that is empty.

    Of more than MAX_STOPS the first that are too many end it.
    """
    if isinstance(value, str):
        return (value,)
    several = ("",)
    if isinstance(value, Iterable):
        several = tuple(itertools.islice(value, MAX_STOPS + 1))
    return several if all(isinstance(item, str) for item in several) else ("",)
