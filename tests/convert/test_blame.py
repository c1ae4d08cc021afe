"""Only what was spoilt is blamed, layer, part and head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from himix_edge.convert.blame import BLAME, Blame, blamed
from himix_edge.convert.judge import judged
from himix_edge.convert.teacher import Teacher
from himix_edge.errors import ConfigError
from himix_edge.models.himix import HiMix
from tests import tolerances
from tests.convert.pairs import (
    QUESTIONS,
    exact_caches,
    questions_for,
    random_student,
    silent,
    tiny_encoder,
    tiny_pictures,
    tiny_teacher,
)


def blame_of(teacher: Teacher, student: HiMix, folder: Path, **sizes: int) -> Blame:
    tokenizer = tiny_encoder(folder)
    return blamed(teacher, student, tiny_pictures(3), questions_for, tokenizer, silent, **sizes)


@pytest.mark.parametrize("part", [0, 1], ids=["keys", "values"])
def test_a_spoilt_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    teacher = tiny_teacher()
    student = random_student(teacher)
    exact_caches(monkeypatch, teacher, student, {1: part})
    blame = blame_of(teacher, student, tmp_path, most_pictures=2, worst_layers=1)
    spoilt, whole = (blame.keys, blame.values)[:: -1 if part else 1]
    assert spoilt[1] > 1e-3
    assert whole == (0, 0)
    assert spoilt[0] == 0
    assert (blame.all_keys, blame.all_values)[part] == spoilt[1]
    assert (blame.all_keys, blame.all_values)[1 - part] == 0
    assert blame.pictures == 2
    [weak] = blame.heads
    heads, others = (weak.keys, weak.values)[:: -1 if part else 1]
    assert weak.layer == 1
    assert heads == (0, spoilt[1])  # it was the second head alone
    assert others == (0, 0)


def test_keys_and_values_of_all_layers_are_the_student(tmp_path: Path) -> None:
    """A layer's part against the same mixture put together by hand."""
    teacher = tiny_teacher()
    student = random_student(teacher)
    runs: list[tuple[str, int, int]] = []
    tokenizer, [picture] = tiny_encoder(tmp_path), tiny_pictures(1)
    blame = blamed(
        teacher,
        student,
        [picture],
        questions_for,
        tokenizer,
        lambda name, done, total, _: runs.append((name, done, total)),
        max_tokens=1,
    )
    total = 2 * (1 + 2 + 2 * 2)
    assert runs == [(BLAME, done, total) for done in range(1, total + 1)]
    assert {weak.layer for weak in blame.heads} == {0, 1}

    pixels = torch.from_numpy(picture[1])
    replayed = teacher.replayed(teacher.image_cache(teacher.model.vision(pixels)))
    projected = student.encode(pixels)
    ids = torch.tensor([tokenizer.encode_turn(tokenizer.chat.first, QUESTIONS[0].prompt)])

    def last(cache: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        from himix_edge.models.decoder import KV

        logits, _ = student.decode(ids, [KV(*kv) for kv in cache])
        return logits[0, -1].double().softmax(-1)

    p = last([(kv.key, kv.value) for kv in replayed])
    values = last([(kv.key, own.value) for kv, own in zip(replayed, projected, strict=True)])
    first = last([(projected[0].key, replayed[0].value), (replayed[1].key, replayed[1].value)])
    for found, q in ((blame.all_values, values), (blame.keys[0], first)):
        kl = float((p * (p / q).log()).sum())
        assert kl > 1e-3
        assert found == pytest.approx(kl, rel=0, abs=tolerances.JUDGED_KL)


def test_the_worst_layer_comes_first(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    blame = blame_of(teacher, random_student(teacher), tmp_path, max_tokens=2)
    lost = [key + value for key, value in zip(blame.keys, blame.values, strict=True)]
    assert [weak.layer for weak in blame.heads] == sorted((0, 1), key=lambda i: -lost[i])
    assert blame.pictures == 3  # all there are


def test_it_is_about_the_same_model_as_the_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that is spoilt in the values, their KL is the judge's own of that question."""
    teacher, tokenizer = tiny_teacher(), tiny_encoder(tmp_path)
    student = random_student(teacher)
    exact_caches(monkeypatch, teacher, student, {0: 1, 1: 1})
    blame = blamed(teacher, student, tiny_pictures(1), questions_for, tokenizer, silent, 1, 5)
    whole = judged(teacher, student, tiny_pictures(1), questions_for, tokenizer, silent, 5)
    expected = whole.exchanges[0].kl
    assert blame.all_values == pytest.approx(expected, rel=0, abs=tolerances.JUDGED_KL)


def test_nothing_to_look_at(tmp_path: Path) -> None:
    teacher, tokenizer = tiny_teacher(), tiny_encoder(tmp_path)
    student = random_student(teacher)
    with pytest.raises(ConfigError, match="nothing to find"):
        blamed(teacher, student, [], questions_for, tokenizer, silent)
    with pytest.raises(ConfigError, match="1 or more"):
        blame_of(teacher, student, tmp_path, most_pictures=0)
