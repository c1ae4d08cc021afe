from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from himix_edge.runtimes.base import FloatArray, VisionKV
from himix_edge.runtimes.generate import (
    Answer,
    FinishReason,
    StopStrings,
    TokenStream,
    generate,
)
from himix_edge.runtimes.tokenizer import Detokenizer
from tests.runtimes.fakes import (
    CHAT,
    END_ID,
    IMAGE_SLOTS,
    FakeEngine,
    arithmetic,
    byte_tokenizer,
    ids_of,
    tokenizer_at,
)

PROMPT = [1, 50, 60, 2]


def likeliest(logits: FloatArray, text: Sequence[int]) -> int:
    del text
    return int(logits.argmax())


def image(number: int) -> VisionKV:
    return VisionKV((number, (), ()), IMAGE_SLOTS)


def finished(stream: TokenStream) -> tuple[list[int], FinishReason]:
    reasons = []

    def outer() -> Iterator[int]:
        reasons.append((yield from stream))

    return list(outer()), reasons[0]


def expected_tokens(number: int, text: list[int], count: int, offset: int = 0) -> list[int]:
    """`arithmetic` over the whole text anew for each token: no cache."""
    text = list(text)
    for _ in range(count):
        positions = list(range(offset, offset + len(text)))
        text.append(arithmetic(number, text, positions))
    return text[-count:]


# The loop


@pytest.mark.parametrize("offset", [0, IMAGE_SLOTS])
def test_tokens_are_those_of_the_text_without_a_cache(offset: int) -> None:
    engine = FakeEngine(arithmetic, text_offset=offset)
    text = list(PROMPT)
    stream = generate(engine, engine.open(image(5)), text, likeliest, {END_ID}, max_tokens=12)
    expected = expected_tokens(5, PROMPT, 12, offset)
    assert finished(stream) == (expected, "length")
    assert text == PROMPT + expected


def test_each_token_is_fed_once_and_the_last_not_at_all() -> None:
    engine = FakeEngine(arithmetic)
    cache = engine.open(image(5))
    tokens, _ = finished(generate(engine, cache, list(PROMPT), likeliest, (), max_tokens=4))
    assert engine.fed == [PROMPT, *([t] for t in tokens[:3])]
    assert cache.length == IMAGE_SLOTS + len(PROMPT) + 3


def test_nothing_happens_before_the_first_token_is_asked_for() -> None:
    engine, text = FakeEngine(arithmetic), list(PROMPT)
    stream = generate(engine, engine.open(image(5)), text, likeliest, (), max_tokens=4)
    assert engine.fed == []
    token = next(stream)
    assert engine.fed == [PROMPT]
    assert text == [*PROMPT, token]


def test_an_end_token_ends_it_and_is_no_part_of_it() -> None:
    engine = FakeEngine(lambda _, text, __: END_ID if len(text) == 7 else 100 + len(text))
    text = list(PROMPT)
    stream = generate(engine, engine.open(image(0)), text, likeliest, {END_ID, 99}, max_tokens=9)
    assert finished(stream) == ([104, 105, 106], "stop")
    assert text == [*PROMPT, 104, 105, 106]


def test_a_further_turn_on_the_same_cache_is_the_whole_text_from_scratch() -> None:
    engine = FakeEngine(arithmetic)
    cache, text = engine.open(image(3)), list(PROMPT)
    finished(generate(engine, cache, text, likeliest, (), max_tokens=5))
    text += [0, 1, 70, 2]
    first_turns = list(text)
    second, _ = finished(generate(engine, cache, text, likeliest, (), max_tokens=5))
    assert engine.fed[5] == [
        first_turns[8],
        0,
        1,
        70,
        2,
    ]  # the last answer's last token comes along
    assert second == expected_tokens(3, first_turns, 5)


def test_the_sampler_sees_prompt_and_answer() -> None:
    seen = []

    def sample(logits: FloatArray, text: Sequence[int]) -> int:
        seen.append(list(text))
        return likeliest(logits, text)

    engine = FakeEngine(lambda _, text, __: 100 + len(text))
    finished(generate(engine, engine.open(image(0)), list(PROMPT), sample, (), max_tokens=3))
    assert seen == [PROMPT, [*PROMPT, 104], [*PROMPT, 104, 105]]


# Text


def said(tmp_path: Path, tokens: list[int], *stop: str, end: FinishReason = "stop") -> Answer:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))

    def stream() -> TokenStream:
        yield from tokens
        return end

    detokenizer = Detokenizer(tokenizer_at(tmp_path / "tokenizer.json", CHAT))
    return Answer(stream(), detokenizer, stop, prompt_tokens=4)


@pytest.mark.parametrize("end", ["stop", "length"])
def test_pieces_then_the_facts(tmp_path: Path, end: FinishReason) -> None:
    answer = said(tmp_path, ids_of("a é"), end=end)
    assert (answer.text, answer.tokens, answer.finish_reason) == ("", 0, None)
    assert next(answer) == "a"
    assert (answer.text, answer.tokens, answer.finish_reason) == ("a", 1, None)
    assert list(answer) == [" ", "é"]
    assert (answer.text, answer.tokens, answer.finish_reason) == ("a é", 4, end)
    assert answer.prompt_tokens == 4
    assert list(answer) == []


def test_half_a_character_at_the_end_is_shown_as_such(tmp_path: Path) -> None:
    answer = said(tmp_path, ids_of("aé")[:-1], end="length")
    assert list(answer) == ["a", "\ufffd"]


def test_no_tokens_at_all(tmp_path: Path) -> None:
    answer = said(tmp_path, [])
    assert answer.read() == ""
    assert (answer.tokens, answer.finish_reason) == (0, "stop")


def test_a_stop_string_ends_it_and_no_part_of_it_is_shown(tmp_path: Path) -> None:
    answer = said(tmp_path, ids_of("one. END two"), " END", end="length")
    assert list(answer) == ["o", "n", "e", "."]
    assert (answer.text, answer.tokens, answer.finish_reason) == ("one.", 8, "stop")


def test_what_only_looked_like_a_stop_string_is_shown(tmp_path: Path) -> None:
    answer = said(tmp_path, ids_of("a EN EN"), " END")
    assert list(answer) == ["a", " EN", " EN"]
    assert answer.finish_reason == "stop"


def test_a_stop_string_of_characters_of_many_bytes(tmp_path: Path) -> None:
    assert said(tmp_path, ids_of("zéé🙂!"), "é🙂").read() == "zé"


def test_a_stop_string_completed_by_the_last_broken_character(tmp_path: Path) -> None:
    answer = said(tmp_path, ids_of("aé")[:-1], "\ufffd", end="length")
    assert (answer.read(), answer.finish_reason) == ("a", "stop")


def test_tokens_after_a_stop_string_are_never_made(tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))

    def stream() -> TokenStream:
        yield from ids_of("ab")
        raise AssertionError("one token too many")

    detokenizer = Detokenizer(tokenizer_at(tmp_path / "tokenizer.json", CHAT))
    assert Answer(stream(), detokenizer, ["b"], prompt_tokens=1).read() == "a"


def test_a_closed_answer_has_no_more_pieces(tmp_path: Path) -> None:
    answer = said(tmp_path, ids_of("abc"))
    next(answer)
    answer.close()
    assert list(answer) == []
    assert (answer.text, answer.finish_reason) == ("a", "cancelled")


def test_milliseconds_are_those_of_the_token_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only the engine moves: 100 ms for the first token, 10 ms for all the others."""
    now = [50.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))

    def stream() -> TokenStream:
        now[0] += 0.1
        for token in ids_of("abc"):
            yield token
            now[0] += 0.01
        return "stop"

    detokenizer = Detokenizer(tokenizer_at(tmp_path / "tokenizer.json", CHAT))
    answer = Answer(stream(), detokenizer, (), prompt_tokens=1)
    for _ in answer:
        now[0] += 7  # the reader's own time is nobody's phase
    rounded = {phase: round(ms, 6) for phase, ms in answer.milliseconds.items()}
    assert rounded == {"prefill": 100, "decode": 30}


# Stop strings, however the text is cut


def up_to_first(text: str, stop: Sequence[str]) -> str:
    """The definition: character by character, until one stop string is complete."""
    for end in range(len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@given(
    text=st.text("abc", max_size=20),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=20),
)
@example(text="abcd", stop=["bc", "abcd"], cuts=[])
def test_stop_strings_at_any_cut(text: str, stop: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    filter_, shown = StopStrings(stop), ""
    expected = up_to_first(text, stop)
    for left, right in itertools.pairwise(edges):
        shown += filter_.push(text[left:right])
        assert expected.startswith(shown)  # at no time is a part of a stop string shown
        if filter_.found:
            break
    else:
        shown += filter_.flush()
    assert shown == expected
    assert filter_.found == (expected != text)
