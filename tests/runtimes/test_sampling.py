from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from himix_edge.contract import SUPPRESSED_LOGIT
from himix_edge.errors import BundleError, ConfigError
from himix_edge.runtimes.sampling import Sampler, SamplingOptions, penalized, probabilities
from tests.tolerances import PROBABILITIES

VOCAB = 200
COUNT = "a whole number from 0 to 2147483647"
SEED = "a whole number from 0 to 18446744073709551615, or None"
TEXT = [3, 3, 17, 42, 199, 0]


def random_logits(seed: int, size: int = VOCAB) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def distribution(logits: NDArray[np.float32], options: SamplingOptions) -> NDArray[np.float64]:
    scores = penalized(logits.astype(np.float64), TEXT, options.repetition_penalty)
    return probabilities(scores, options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 5, VOCAB, VOCAB + 1])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_the_distribution_is_transformers(
    temperature: float, top_k: int, top_p: float, penalty: float, seed: int
) -> None:
    processors: LogitsProcessorList = LogitsProcessorList()
    if penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    logits = random_logits(seed)
    scores = processors(torch.LongTensor([TEXT]), torch.FloatTensor(logits)[None])
    expected = scores.softmax(-1)[0].numpy()

    options = SamplingOptions(temperature, top_k, top_p, penalty)
    ours = distribution(logits, options)
    assert ((ours > 0) == (expected > 0)).all()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=PROBABILITIES)


def test_by_hand() -> None:
    scores = np.log(np.array([0.5, 0.25, 0.15, 0.1]))
    for options, expected in (
        (SamplingOptions(1.0), [0.5, 0.25, 0.15, 0.1]),
        (SamplingOptions(1.0, top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (SamplingOptions(1.0, top_p=0.8), [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        (SamplingOptions(1.0, top_p=1e-20), [1, 0, 0, 0]),  # 1 - top_p is 1
        (SamplingOptions(1.0, top_k=2, top_p=0.6), [1, 0, 0, 0]),  # top_p of what top_k left
        (SamplingOptions(0.5), [x * x / 0.345 for x in (0.5, 0.25, 0.15, 0.1)]),
    ):
        np.testing.assert_allclose(
            probabilities(scores, options), expected, rtol=0, atol=PROBABILITIES
        )
    assert penalized(np.array([2.0, -2.0, 2.0, -2.0]), [0, 1, 0], 2.0).tolist() == [1, -4, 2, -2]
    assert penalized(np.array([2.0, -2.0]), [], 2.0).tolist() == [2, -2]


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    assert Sampler(SamplingOptions())(logits, [1]) == 1
    assert Sampler(SamplingOptions(repetition_penalty=2.0))(logits, [1]) == 2
    assert logits.tolist() == [1, 3, 2]  # left alone


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=1.0, seed=1),
        SamplingOptions(temperature=0.7, top_k=8, seed=2),
        SamplingOptions(temperature=1.3, top_p=0.8, repetition_penalty=1.5, seed=3),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(options: SamplingOptions) -> None:
    """Pearson's chi-squared, mean k - 1, variance 2 (k - 1): five deviations above are a fault."""
    logits, draws = random_logits(7, size=20) * np.float32(0.5), 20_000
    text = [3, 17]
    expected = probabilities(
        penalized(logits.astype(np.float64), text, options.repetition_penalty), options
    )
    sampler = Sampler(options)
    counts = np.bincount([sampler(logits, text) for _ in range(draws)], minlength=20)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_squared = ((counts - draws * expected)[possible] ** 2 / (draws * expected[possible])).sum()
    freedom = possible.sum() - 1
    assert freedom >= 5
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5


def test_one_seed_one_sequence() -> None:
    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed))
        return [sampler(random_logits(i), []) for i in range(30)]

    assert tokens(5) == tokens(5) != tokens(6)
    assert tokens(None) != tokens(None)


def test_a_temperature_next_to_nothing_is_greedy() -> None:
    sampler = Sampler(SamplingOptions(temperature=1e-300, seed=0))
    logits = random_logits(0)
    assert {sampler(logits, []) for _ in range(20)} == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("penalty", [1e-9, 1.0, 2.0])
def test_what_the_graph_suppresses_is_never_drawn(temperature: float, penalty: float) -> None:
    logits = random_logits(0)
    logits[[3, 9]] += SUPPRESSED_LOGIT
    sampler = Sampler(SamplingOptions(temperature, repetition_penalty=penalty, seed=0))
    drawn = {sampler(logits, [3, 9, 4]) for _ in range(300)}
    assert not drawn & {3, 9}
    assert temperature < 1000 or len(drawn) > VOCAB / 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite(bad: float) -> None:
    logits = random_logits(0)
    logits[5] = bad
    with pytest.raises(BundleError, match="expected finite logits"):
        Sampler(SamplingOptions())(logits, [])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, "a number from 0 to 1000"),
        ("temperature", float("nan"), "a number from 0 to 1000"),
        ("temperature", float("inf"), "a number from 0 to 1000"),
        ("temperature", "hot", "a number from 0 to 1000"),
        ("temperature", 1000.1, "a number from 0 to 1000"),
        ("repetition_penalty", 1e9, "a number above 0, at most 1000"),
        ("top_k", 2**31, COUNT),
        ("max_tokens", 2**31, "a whole number from 1 to 2147483647"),
        ("seed", 2**64, SEED),
        ("temperature", True, "a number from 0 to 1000"),
        ("top_k", -1, COUNT),
        ("top_k", 1.5, COUNT),
        ("top_p", 0.0, "a number above 0, at most 1"),
        ("top_p", 1.01, "a number above 0, at most 1"),
        ("repetition_penalty", 0.0, "a number above 0, at most 1000"),
        ("repetition_penalty", -1.0, "a number above 0, at most 1000"),
        ("seed", -1, SEED),
        ("seed", 0.5, SEED),
        ("max_tokens", 0, "a whole number from 1 to 2147483647"),
        ("max_tokens", None, "a whole number from 1 to 2147483647"),
        ("max_tokens", True, "a whole number from 1 to 2147483647"),
        ("max_tokens", 1e308, "a whole number from 1 to 2147483647"),
        ("max_tokens", "5", "a whole number from 1 to 2147483647"),
        ("seed", True, SEED),
        ("top_k", np.float32(2), COUNT),
        ("temperature", np.float32("nan"), "a number from 0 to 1000"),
        ("temperature", np.True_, "a number from 0 to 1000"),
        ("top_k", np.True_, COUNT),
        ("temperature", 1j, "a number from 0 to 1000"),
        ("stop", "", "a string or several, none of them empty"),
        ("stop", None, "a string or several, none of them empty"),
        ("stop", 5, "a string or several, none of them empty"),
        ("stop", b"end", "a string or several, none of them empty"),
        ("stop", ("end", ""), "a string or several, none of them empty"),
        ("stop", ["end", None], "a string or several, none of them empty"),
    ],
)
def test_options_out_of_range(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingOptions(**{name: value})
    assert str(error.value) == f"{name} is out of range: expected {expected}, found {value!r}"


def test_updated() -> None:
    options = SamplingOptions(top_k=3).updated({"temperature": 1, "stop": ("x",)})
    assert options == SamplingOptions(temperature=1, top_k=3, stop=("x",))
    with pytest.raises(ConfigError, match=r"unknown sampling option 'temprature'.*'temperature'\?"):
        options.updated({"temprature": 1})
    with pytest.raises(ConfigError, match="top_p is out of range"):
        options.updated({"top_p": 7})


HUGE = 10**5000  # beyond all floats, and longer than Python prints
HUNDREDS = int("9" * 400)


@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [HUGE, -HUGE, HUNDREDS], ids=["huge", "-huge", "hundreds"])
def test_numbers_beyond_all_floats(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} is out of range: expected a number") as error:
        SamplingOptions().updated({name: value})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["top_k", "seed", "max_tokens"])
def test_whole_numbers_of_any_kind(name: str) -> None:
    for value in (2**31 - 1, np.int64(5), np.uint8(7)):
        kept = getattr(SamplingOptions().updated({name: value}), name)
        assert (kept, type(kept)) == (int(value), int)
    for value in (HUGE, -HUGE):
        with pytest.raises(ConfigError, match="found an int of thousands of digits"):
            SamplingOptions().updated({name: value})
    with pytest.raises(ConfigError, match=f"{name} is out of range"):
        SamplingOptions().updated({name: HUNDREDS})


def test_the_largest_numbers_draw_like_none_at_all() -> None:
    most, seed = 2**31 - 1, 2**64 - 1
    options = SamplingOptions(temperature=1.0, top_k=most, seed=seed, max_tokens=most)
    plain = SamplingOptions(temperature=1.0, seed=seed)
    samplers = Sampler(options), Sampler(plain)
    for number in range(20):
        logits = random_logits(number)
        assert samplers[0](logits, TEXT) == samplers[1](logits, TEXT)


def test_stop_strings_are_limited() -> None:
    SamplingOptions(stop=["x" * 9] * 1024)
    SamplingOptions(stop="x" * 10_000)
    limit = "stop is out of range: expected at most 1,024 strings of 10,000 characters together"
    endless: Any = (str(i) for i in itertools.count())
    for stop in (["x"] * 1025, "x" * 10_001, endless):
        with pytest.raises(ConfigError, match=limit):
            SamplingOptions(stop=stop)


@pytest.mark.parametrize("value", [np.float32(0.75), np.float16(0.75), np.float64(0.75), 0.75])
@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty"])
def test_numbers_of_numpy(name: str, value: Any) -> None:
    kept = getattr(SamplingOptions().updated({name: value}), name)
    assert (kept, type(kept)) == (0.75, float)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (".", (".",)),
        ("end", ("end",)),
        (["a", "b"], ("a", "b")),
        ((word for word in ("a", "b")), ("a", "b")),
        ({"a": 1}, ("a",)),
        ((), ()),
        ([], ()),
        (np.str_("x"), ("x",)),
    ],
)
def test_stop_is_one_string_or_several(given: Any, kept: tuple[str, ...]) -> None:
    assert SamplingOptions(stop=given).stop == kept
    assert SamplingOptions().updated({"stop": kept}).stop == kept
    hash(SamplingOptions(stop=kept))


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-100, 1e-5])
@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_the_colder_the_likelier_the_likeliest(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = np.array([-3e38, 1.0, 1.5, 3e38, 0.0], np.float32)
    expected = [0, 0, 0, 1, 0]
    assert distribution_of(logits, temperature, top_k, top_p) == expected
    tied = np.array([2.0, 1.0, 2.0, -1e30, 0.0], np.float32)
    kept = [1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0.5, 0, 0.5, 0, 0]
    assert distribution_of(tied, temperature, top_k, top_p) in kept


def distribution_of(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float
) -> list[float]:
    options = SamplingOptions(temperature, top_k, top_p)
    found: list[float] = probabilities(logits.astype(np.float64), options).tolist()
    return found


def test_the_hotter_the_more_alike() -> None:
    options = SamplingOptions(temperature=1000.0)
    found = probabilities(random_logits(0).astype(np.float64), options)
    np.testing.assert_allclose(found, 1 / VOCAB, rtol=0.02, atol=0)


@pytest.mark.parametrize("penalty", [5e-324, 1e-308, 1000.0])
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1.0, 1000.0])
def test_penalties_next_to_nothing_and_next_to_infinity(penalty: float, temperature: float) -> None:
    """As transformers in infinite precision would: seen tokens above all others, or below."""
    logits = np.array([1.0, -2.0, 3.0, 0.5, -0.5], np.float32)
    options = SamplingOptions(temperature, repetition_penalty=penalty, seed=1)
    chosen = Sampler(options)(logits, [0, 1])
    assert 0 <= chosen < 5
    if temperature == 0:
        assert chosen == (0 if penalty < 1 else 2)
