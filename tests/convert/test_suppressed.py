"""LLaVA-OneVision's <image>, whose row of the embedding becomes `image_newline`, is never said.

`image_newline` is long enough here that, in the head as well, it is often the likeliest of all.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from himix_edge.config import ProjectionConfig
from himix_edge.convert.answers import greedy_answers, rows_of
from himix_edge.convert.blame import blamed
from himix_edge.convert.distil import outcome_of
from himix_edge.convert.judge import Judgement, encoded, greedy, judged
from himix_edge.convert.questions import prompt_encoder
from himix_edge.convert.source import teacher_from_folder, teacher_from_source
from himix_edge.convert.teacher import Teacher, TeacherSource, student_config, student_of
from himix_edge.data.questions import Question
from himix_edge.models.himix import HiMix
from himix_edge.models.huggingface import EMBEDDING
from himix_edge.training.data import NO_LOSS
from tests import tolerances
from tests.convert.llava import image_id, llava_model, processor, tokenizer
from tests.convert.pairs import exact_caches, silent, tiny_pictures

IMAGE = image_id("llava_onevision")
ASKED = (Question("How many objects?"), Question("describe"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TeacherSource:
    folder = tmp_path_factory.mktemp("onevision")
    model = llava_model("llava_onevision")
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[IMAGE] = 0  # as never trained: transformers never says it
        newline = model.model.image_newline
        newline.copy_(torch.randn(len(newline), generator=torch.Generator().manual_seed(1)))
        newline.mul_(4 * rows.norm(dim=1).mean() / newline.norm())
    model.save_pretrained(folder)
    processor("llava_onevision").save_pretrained(folder)
    tokenizer("llava_onevision").save_pretrained(folder)
    return teacher_from_folder(folder)


@pytest.fixture
def teacher(source: TeacherSource) -> Teacher:
    return teacher_from_source(source)


def forgetful(student: HiMix) -> HiMix:
    """Without the mask, as a converted model was that said <image>."""
    decoder = dataclasses.replace(student.config.decoder, suppressed_token_ids=())
    student.config = dataclasses.replace(student.config, decoder=decoder)
    student.decoder = copy.copy(student.decoder)  # of the same weights
    student.decoder.config = decoder
    return student


def exact_student(teacher: Teacher, patch: pytest.MonkeyPatch) -> HiMix:
    """One with the teacher's very cache: all that is left to differ is the head."""
    student = student_of(teacher, student_config(teacher, (), ProjectionConfig()))
    exact_caches(patch, teacher, student, {})
    return student


def report(teacher: Teacher, student: HiMix, source: TeacherSource) -> Judgement:
    return judged(
        teacher, student, tiny_pictures(), lambda _: ASKED, prompt_encoder(source), silent, 12
    )


def test_a_report_sees_a_head_that_says_another_models_token(
    source: TeacherSource, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = report(teacher, exact_student(teacher, monkeypatch), source)
    assert right.agreement == 1
    assert right.same == len(right.exchanges) == 4
    assert right.kl == pytest.approx(0, rel=0, abs=tolerances.REPLAYED_KL)
    wrong = report(teacher, forgetful(exact_student(teacher, monkeypatch)), source)
    assert wrong.agreement < 0.95
    assert wrong.kl > 0.1
    assert wrong.same < 4


def test_a_source_that_says_it_itself_is_disagreed_with(
    source: TeacherSource, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer ends there, as what follows is no model's; the figures stay numbers."""
    student = exact_student(teacher, monkeypatch)
    teacher.head_rows[IMAGE] = 9 * teacher.model.decoder.head[5]
    judgement = report(teacher, student, source)
    ended = [exchange for exchange in judgement.exchanges if exchange.tokens < 12]
    assert ended
    assert all(exchange.agreed == exchange.tokens - 1 for exchange in ended)
    assert judgement.kl == pytest.approx(0, rel=0, abs=tolerances.REPLAYED_KL)


def test_the_weak_layers_are_found_without_it(
    source: TeacherSource, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = exact_student(teacher, monkeypatch)
    encoder = prompt_encoder(source)
    found = blamed(teacher, student, tiny_pictures(), lambda _: ASKED, encoder, silent)
    assert max(found.keys + found.values) < 1e-6


def test_the_teachers_answers_are_the_sources(source: TeacherSource, teacher: Teacher) -> None:
    """What distillation learns from: one by one, and many at once."""
    tokenizer = prompt_encoder(source)
    prompts = [encoded(question.prompt, tokenizer, teacher.model) for question in ASKED]
    [(_, pixels)] = tiny_pictures(1)
    cache = teacher.image_cache(teacher.model.vision(torch.from_numpy(pixels)))
    both = greedy_answers(teacher, prompts, rows_of(cache, torch.zeros(2, dtype=torch.int64)))
    assert both == [greedy(teacher, prompt, cache, 32) for prompt in prompts]
    assert not any(IMAGE in answer for answer in both)
    teacher.head_rows[IMAGE] = 9 * teacher.model.decoder.head[5]
    ended = greedy(teacher, prompts[0], cache, 32)
    assert ended.index(IMAGE) == len(ended) - 1
    assert greedy_answers(teacher, prompts[:1], cache) == [ended]


def test_distilling_does_not_learn_from_it(teacher: Teacher) -> None:
    """The loss of equal models is none, though the one gives <image> some probability."""
    hidden = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    decoder = teacher.model.decoder
    given = decoder.logits(hidden).requires_grad_()
    wanted: Tensor = decoder.logits(hidden).detach().clone()
    wanted[..., IMAGE] = 3.0
    labels = torch.tensor([[NO_LOSS, 5, 6]])
    unlabelled = torch.tensor([False])
    outcome = outcome_of(given, decoder.suppressed(wanted), labels, unlabelled)
    assert abs(float(outcome.loss.detach())) < tolerances.REPLAYED_LOSS
    outcome.loss.backward()
    assert given.grad is not None
    assert bool(given.grad.isfinite().all())


def test_the_source_keeps_its_own_row(source: TeacherSource, teacher: Teacher) -> None:
    assert source.config.decoder.suppressed_token_ids == (IMAGE,)
    assert source.config.decoder.tie_word_embeddings
    assert not source.head_rows[IMAGE].read().any()
    assert source.weights[EMBEDDING].read()[IMAGE].any()
    assert "decoder.lm_head.weight" not in source.weights  # what is written is no larger
    assert torch.equal(teacher.head_rows[IMAGE], torch.zeros(64))
