"""The judge against formulas in numpy over one long forward pass, and against students it knows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from himix_edge.convert.judge import JUDGE, Exchange, Judgement, encoded, greedy, judged
from himix_edge.convert.teacher import Teacher
from himix_edge.data.questions import Question
from himix_edge.errors import CheckpointError, ConfigError, PromptError
from himix_edge.models.himix import HiMix
from tests import tolerances
from tests.convert.pairs import (
    CHAT,
    PREFIX_IDS,
    QUESTIONS,
    exact_caches,
    questions_for,
    random_student,
    silent,
    tiny_encoder,
    tiny_pictures,
    tiny_teacher,
)

Pixels = NDArray[np.float32]
Logits = Callable[[list[int]], NDArray[np.float64]]

MOST = 6


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def vanilla_logits(teacher: Teacher, pixels: Pixels, text: list[int]) -> NDArray[np.float64]:
    """One pass over all there is, no cache: prefix, image, text. [M, V]"""
    decoder = teacher.model.decoder
    prefix, words = (decoder.model.embed_tokens(torch.tensor([ids])) for ids in (PREFIX_IDS, text))
    image = teacher.connector(teacher.model.vision(torch.from_numpy(pixels)))
    whole = torch.cat((prefix, image, words), dim=1)
    hidden, _ = decoder.model(whole, torch.arange(whole.shape[1])[None], None)
    return np.asarray(decoder.logits(hidden)[0, 3 + 4 :].double().numpy())


def himix_logits(student: HiMix, pixels: Pixels, text: list[int]) -> NDArray[np.float64]:
    """[M, V]"""
    return np.asarray(student(torch.from_numpy(pixels), torch.tensor([text]))[0].double().numpy())


def longest_answer(logits: Logits, prompt: list[int]) -> list[int]:
    answer: list[int] = []
    while len(answer) < MOST and answer[-1:] != [0]:
        answer.append(int(logits([*prompt, *answer])[-1].argmax()))
    return answer


def test_it_follows_the_formulas(tmp_path: Path) -> None:
    teacher, tokenizer = tiny_teacher(), tiny_encoder(tmp_path)
    student = random_student(teacher)
    seen: list[tuple[str, int]] = []

    def watch(name: str, done: int, _total: int, _said: str) -> None:
        seen.append((name, done))

    pictures = tiny_pictures()
    judgement = judged(teacher, student, pictures, questions_for, tokenizer, watch, MOST)
    assert seen == [(JUDGE, done) for done in (1, 2, 3, 4)]
    cases = [(path, pixels, question) for path, pixels in pictures for question in QUESTIONS]
    kls: list[float] = []
    hits: list[bool] = []
    firsts: list[float] = []
    for (path, pixels, question), exchange in zip(cases, judgement.exchanges, strict=True):
        ids = tokenizer.encode_turn(CHAT.first, question.prompt)
        models: list[Logits] = [
            functools.partial(vanilla_logits, teacher, pixels),
            functools.partial(himix_logits, student, pixels),
        ]
        answers = [longest_answer(logits, ids) for logits in models]
        text = [*ids, *answers[0][:-1]]
        p, q = (softmax(logits(text)[len(ids) - 1 :]) for logits in models)
        kl = (p * np.log(p / q)).sum(-1)
        same = p.argmax(-1) == q.argmax(-1)
        assert (exchange.image, exchange.prompt) == (path.name, question.prompt)
        assert exchange.label == question.answer
        assert exchange.kl == pytest.approx(kl.mean(), rel=0, abs=tolerances.JUDGED_KL)
        assert exchange.first_kl == pytest.approx(kl[0], rel=0, abs=tolerances.JUDGED_KL)
        assert (exchange.tokens, exchange.agreed) == (len(kl), same.sum())
        assert exchange.teacher == tokenizer.decode(answers[0])
        assert exchange.student == tokenizer.decode(answers[1])
        kls += list(kl)
        hits += list(same)
        firsts.append(kl[0])
    assert 0.1 < np.mean(kls) < 10  # a student that knows nothing is far off
    assert judgement.kl == pytest.approx(np.mean(kls), rel=0, abs=tolerances.JUDGED_KL)
    assert judgement.first_kl == pytest.approx(np.mean(firsts), rel=0, abs=tolerances.JUDGED_KL)
    assert judgement.agreement == pytest.approx(np.mean(hits), rel=0, abs=1e-12)


def test_an_answer_ends_with_an_end_token(tmp_path: Path) -> None:
    teacher, tokenizer = tiny_teacher(), tiny_encoder(tmp_path)
    [(_, pixels)] = tiny_pictures(1)
    prompt = encoded("How many?", tokenizer, random_student(teacher))
    cache = teacher.image_cache(teacher.model.vision(torch.from_numpy(pixels)))
    long = greedy(teacher.model, prompt, cache, MOST)
    assert len(long) == MOST
    at = long.index(long[2])
    decoder = dataclasses.replace(teacher.model.config.decoder, eos_token_ids=(long[2],))
    teacher.model.config = dataclasses.replace(teacher.model.config, decoder=decoder)
    assert greedy(teacher.model, prompt, cache, MOST) == long[: at + 1]


def test_a_student_with_the_teachers_cache_is_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_teacher()
    student = random_student(teacher)
    exact_caches(monkeypatch, teacher, student, {})
    tokenizer = tiny_encoder(tmp_path)
    judgement = judged(teacher, student, tiny_pictures(), questions_for, tokenizer, silent, MOST)
    assert judgement.kl == pytest.approx(0, rel=0, abs=tolerances.REPLAYED_KL)
    assert judgement.agreement == 1
    assert judgement.same == len(judgement.exchanges) == 4


def test_a_half_precision_teacher_under_projections_in_full(tmp_path: Path) -> None:
    whole = tiny_teacher()
    student = random_student(whole)
    full = judged(
        whole, student, tiny_pictures(1), questions_for, tiny_encoder(tmp_path), silent, 1
    )
    half = tiny_teacher()
    half.model.to(torch.bfloat16)
    half.prefix = half._prefix()
    student = random_student(half)
    rough = judged(
        half, student, tiny_pictures(1), questions_for, tiny_encoder(tmp_path), silent, 1
    )
    assert rough.kl == pytest.approx(full.kl, rel=0, abs=tolerances.HALF_KL)


def exchange(teacher: str, student: str, label: str | None, **figures: float) -> Exchange:
    counted = {"tokens": 4, "agreed": 2, "kl": 1.0, "first_kl": 3.0, **figures}
    return Exchange("a.png", "?", label, teacher, student, **counted)  # type: ignore[arg-type]


def test_what_is_counted() -> None:
    judgement = Judgement(
        (
            exchange("A cat.", "a cat", "A cat", tokens=6, agreed=3, kl=2.0, first_kl=1.0),
            exchange("a  dog ", "a dog", "a cat"),
            exchange("", "", None, agreed=4, kl=0.0),
        )
    )
    assert judgement.tokens == 14
    assert judgement.kl == pytest.approx((12 + 4) / 14, rel=0, abs=1e-12)
    assert judgement.first_kl == pytest.approx(7 / 3, rel=0, abs=1e-12)
    assert judgement.agreement == pytest.approx(9 / 14, rel=0, abs=1e-12)
    assert judgement.same == 2  # of words: blanks do not count, case and full stops do
    assert (judgement.labelled, judgement.teacher_right, judgement.student_right) == (2, 1, 1)


def test_nothing_to_judge_by(tmp_path: Path) -> None:
    teacher, tokenizer = tiny_teacher(), tiny_encoder(tmp_path)
    student = random_student(teacher)
    with pytest.raises(ConfigError, match="nothing to judge"):
        judged(teacher, student, [], questions_for, tokenizer, silent)
    with pytest.raises(ConfigError, match="nothing to judge"):
        judged(teacher, student, tiny_pictures(), lambda _name: (), tokenizer, silent)


def test_a_prompt_that_is_too_long(tmp_path: Path) -> None:
    teacher, long = tiny_teacher(), Question("How many objects? " * 80)
    with pytest.raises(PromptError, match=r"too long.*249 tokens"):
        judged(
            teacher,
            random_student(teacher),
            tiny_pictures(),
            lambda _name: (long,),
            tiny_encoder(tmp_path),
            silent,
        )


def test_answers_end_with_the_context(tmp_path: Path) -> None:
    teacher, tokenizer = tiny_teacher(), tiny_encoder(tmp_path)
    prompt = "z"
    while (room := 249 - len(tokenizer.encode_turn(CHAT.first, prompt))) > 5:
        prompt += "z"
    question = Question(prompt)
    assert 0 < room <= 5
    judgement = judged(
        teacher, random_student(teacher), tiny_pictures(1), lambda _: (question,), tokenizer, silent
    )
    assert judgement.exchanges[0].tokens == room


def test_logits_that_are_no_numbers(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    student = random_student(teacher)
    teacher.model.decoder.model.norm.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        judged(teacher, student, tiny_pictures(), questions_for, tiny_encoder(tmp_path), silent)
