from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from himix_edge.config import ProjectionConfig
from himix_edge.convert import distil as distil_module
from himix_edge.convert.answers import greedy_answers
from himix_edge.convert.distil import Distillation, DistilSettings, distil, outcome_of
from himix_edge.convert.questions import prompt_encoder
from himix_edge.convert.teacher import Teacher, TeacherSource, student_config, student_of
from himix_edge.data.questions import Question, Questions
from himix_edge.errors import ConfigError, TrainingError
from himix_edge.models.decoder import KV
from himix_edge.models.himix import HiMix
from himix_edge.runtimes.tokenizer import Tokenizer
from himix_edge.training import loop
from himix_edge.training.data import NO_LOSS
from himix_edge.training.loop import StepWatch
from tests.models.reference import random_tensor, randomized
from tests.tiny import CHAT_TEMPLATE, tiny_config, tiny_model, tiny_tokenizer
from tests.tolerances import DISTIL_LOSS, HALF_GRADIENTS, REPLAYED_LOSS, UNDERFLOW

CONFIG = tiny_config("vanilla")
PREFIX = (5, 6, 7)
SETTINGS = DistilSettings(steps=6, images=2, questions=2, seed=1, learning_rate=1e-2)
ASKED = (Question("How many?"), Question("describe"), Question("Is there a small circle?"))
UNLABELLED = Questions(ASKED, {})
LABELLED = Questions((Question("How many?", "a large blue square."),), {})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(5)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    json = tiny_tokenizer().to_str()
    return prompt_encoder(
        TeacherSource("tiny", "llava", "", "", CONFIG, {}, PREFIX, json, CHAT_TEMPLATE)
    )


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(tiny_model(CONFIG), PREFIX)


def student_for(teacher: Teacher, connector_size: int | None = None) -> HiMix:
    """With projections at random, which a fit would have found."""
    projection = ProjectionConfig(connector_size=connector_size, bias=True)
    student = student_of(teacher, student_config(teacher, (), projection))
    randomized(cast(nn.Module, student.injection.layers))
    return student


def ignore(*_: object) -> None:
    pass


def weights_of(student: HiMix) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Run:
    """`distil` with most of its arguments chosen."""

    def __init__(self, teacher: Teacher, files: list[Path], tokenizer: Tokenizer) -> None:
        self.teacher, self.files, self.tokenizer = teacher, files, tokenizer

    def __call__(
        self,
        student: HiMix,
        state: Path,
        watch: StepWatch = ignore,
        questions: Questions = UNLABELLED,
        settings: DistilSettings = SETTINGS,
        teacher: Teacher | None = None,
    ) -> HiMix:
        teacher = teacher or self.teacher
        distil(teacher, student, self.files, questions, self.tokenizer, settings, state, watch)
        return student

    def task(self, student: HiMix, questions: Questions = UNLABELLED) -> Distillation:
        task = Distillation(self.teacher, student, self.files, questions, self.tokenizer, SETTINGS)
        task.trained.requires_grad_(True)
        return task


@pytest.fixture(scope="module")
def run(teacher: Teacher, files: list[Path], tokenizer: Tokenizer) -> Run:
    return Run(teacher, files, tokenizer)


def log_softmax(row: NDArray[np.float64]) -> NDArray[np.float64]:
    return cast(NDArray[np.float64], row - np.log(np.exp(row).sum()))


def test_the_loss_is_that_of_its_definition() -> None:
    given, wanted = random_tensor(2, 5, 11, seed=1).requires_grad_(), random_tensor(2, 5, 11)
    labels = torch.tensor([[NO_LOSS, 3, 4, 5, NO_LOSS], [NO_LOSS, NO_LOSS, 9, NO_LOSS, NO_LOSS]])
    outcome = outcome_of(given, wanted, labels, torch.tensor([False, True]))
    ours, theirs = given.detach().double().numpy(), wanted.double().numpy()
    means, agreed = [], []
    for row, tokens in ((0, (1, 2, 3)), (1, (2,))):
        losses = []
        for t in tokens:
            p, q = log_softmax(theirs[row, t]), log_softmax(ours[row, t])
            loss = float((np.exp(p) * (p - q)).sum())
            losses.append(loss - (q[labels[row, t]] if row == 1 else 0.0))
            agreed.append(p.argmax() == q.argmax())
        means.append(np.mean(losses))
    assert outcome.loss.item() == pytest.approx(np.mean(means), rel=0, abs=DISTIL_LOSS)
    assert outcome.right == {"agreement": pytest.approx(np.mean(agreed), abs=DISTIL_LOSS)}


class Replay(nn.Module):
    """The teacher's own keys and values, turned: what no projections could better."""

    def __init__(self, teacher: Teacher, like: nn.Module) -> None:
        super().__init__()
        self.teacher, self.inputs, self.layers = teacher, like.inputs, like.layers

    def forward(self, features: Tensor, _: nn.Module) -> list[KV]:
        cache = self.teacher.replayed(self.teacher.image_cache(features))
        return [KV(*(part.requires_grad_() for part in kv)) for kv in cache]


@pytest.mark.parametrize("questions", [UNLABELLED, LABELLED], ids=["own answers", "labels"])
def test_a_student_with_the_teachers_cache_has_nothing_to_learn(
    run: Run, questions: Questions
) -> None:
    student = student_for(run.teacher)
    student.injection = Replay(run.teacher, student.injection)
    outcome = run.task(student, questions).outcome(0)
    if questions is UNLABELLED:
        assert abs(outcome.loss.item()) < REPLAYED_LOSS, UNDERFLOW
    else:  # the cross-entropy of the labels alone is left
        assert outcome.loss.item() > 1.0
    assert outcome.right == {"agreement": 1.0}
    worse = run.task(student_for(run.teacher), questions).outcome(0)
    assert worse.loss.item() > outcome.loss.item() + 1e-3


def test_only_the_projections_move_and_come_nearer(run: Run, tmp_path: Path) -> None:
    student = student_for(run.teacher, connector_size=32)
    before, losses = weights_of(student), list[float]()
    settings = dataclasses.replace(SETTINGS, steps=60, images=5, questions=3)
    run(student, tmp_path / "s", lambda _, o: losses.append(float(o.loss)), settings=settings)
    moved = {
        ".".join(name.split(".")[:2])
        for name, tensor in student.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert moved == {"injection.layers", "injection.inputs"}
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert not any(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_the_teachers_answers_are_those_it_gives_one_at_a_time(prefix: tuple[int, ...]) -> None:
    """Against all tokens fed anew for every further one, no cache of text."""
    ends = (209, 241, 259, 266)
    teacher = Teacher(tiny_model(tiny_config("vanilla", eos_token_ids=ends)), prefix)
    prompts = [[1, 40, 2], [1, 50, 60, 2], [1, 41, 2], [2]]
    cache = teacher.image_cache(random_tensor(len(prompts), 4, 32))
    answers = greedy_answers(teacher, prompts, cache)
    lengths = set()
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        own, text = [KV(*(part[i : i + 1] for part in kv)) for kv in cache], list(prompt)
        for token in answer:
            text.append(int(teacher.logits(torch.tensor([text]), own)[0, -1].argmax()))
            assert text[-1] == token
        assert not set(answer[:-1]) & set(ends)
        assert answer[-1] in ends or len(answer) == 32
        lengths.add(len(answer))
    assert len(lengths) > 1


def test_an_answer_ends_where_the_context_does() -> None:
    config = tiny_config("vanilla", max_position_embeddings=20, eos_token_ids=())
    teacher = Teacher(tiny_model(config), PREFIX)  # 20 - 3 - 4 - 4 are left
    [answer] = greedy_answers(
        teacher, [[1, 40, 41, 2]], teacher.image_cache(random_tensor(1, 4, 32))
    )
    assert len(answer) == 9


def test_labels_are_the_answers_tokens_and_an_end(run: Run) -> None:
    task = run.task(student_for(run.teacher), LABELLED)
    _, asked = task._batch(0)
    expected = [*tiny_tokenizer().encode("a large blue square.").ids, 0]
    assert task._answer(asked[0]) == expected
    task.outcome(0)
    assert task.answers == {}


def test_every_picture_comes_once_in_a_round(run: Run) -> None:
    task = run.task(student_for(run.teacher))
    seen = [file for step in range(5) for file in task._batch(step)[0]]
    assert sorted(seen[:5]) == sorted(seen[5:]) == run.files
    assert seen[:5] != seen[5:]
    assert task._batch(3) == task._batch(3)
    assert {len(task._batch(step)[1]) for step in range(5)} == {4}


@pytest.mark.parametrize("interrupted_after", [1, 4])
def test_an_interrupted_run_ends_with_the_same_weights(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_after: int
) -> None:
    straight = weights_of(run(student_for(run.teacher), tmp_path / "straight"))
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)

    def interrupt(step: int, _: object) -> None:
        if step == interrupted_after + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(student_for(run.teacher), tmp_path / "s", interrupt)
    steps: list[int] = []
    resumed = run(student_for(run.teacher), tmp_path / "s", lambda step, _: steps.append(step))
    assert steps == list(range(interrupted_after + 1, SETTINGS.steps + 1))
    assert same_weights(weights_of(resumed), straight)
    assert not list(tmp_path.glob(".*"))


def test_what_was_answered_once_is_not_asked_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = Questions(ASKED[:2], {})
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    asked: list[int] = []

    def counted(teacher: Teacher, prompts: list[list[int]], cache: Any) -> list[list[int]]:
        asked.append(len(prompts))
        return greedy_answers(teacher, prompts, cache)

    def interrupt(step: int, _: object) -> None:
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(distil_module, "greedy_answers", counted)
    with pytest.raises(KeyboardInterrupt):
        run(student_for(run.teacher), tmp_path / "s", interrupt, questions)
    assert asked == [4, 4, 2]  # five pictures, two prompts each
    run(student_for(run.teacher), tmp_path / "s", ignore, questions)
    assert asked == [4, 4, 2]


def test_the_state_of_another_run_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    state, other = tmp_path / "s", Teacher(copy.deepcopy(run.teacher.model), PREFIX)
    with torch.no_grad():
        next(other.connector.parameters())[0, 0] += 1
    run(student_for(run.teacher), state)
    faster = dataclasses.replace(SETTINGS, learning_rate=0.5)
    for changes, message in (
        ({"settings": faster}, "expected settings.learning_rate 0.5, found"),
        ({"questions": LABELLED}, r"expected pictures\.sha256"),
        ({"teacher": other}, r"expected teacher\.sha256"),
    ):
        with pytest.raises(TrainingError, match=f"another run: {message}"):
            run(student_for(run.teacher), state, **cast(Any, changes))
    with pytest.raises(TrainingError, match=r"another run.*student\.projection\.connector_size 32"):
        run(student_for(run.teacher, connector_size=32), state)


def test_a_loss_that_is_no_number_ends_the_run(run: Run, tmp_path: Path) -> None:
    student = student_for(run.teacher)
    with torch.no_grad():
        cast(Any, student.injection).layers[0].v_proj.bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match="the loss of the distillation at step 0 is nan"):
        run(student, tmp_path / "s")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_in_half_precision_gives_nearly_the_same_gradients(
    run: Run, dtype: torch.dtype
) -> None:
    half = Run(Teacher(tiny_model(CONFIG).to(dtype), PREFIX), run.files, run.tokenizer)
    gradients = []
    for each in (run, half):
        task = each.task(student_for(each.teacher), LABELLED)
        task.outcome(0).loss.backward()
        found = [cast(Tensor, parameter.grad).flatten() for parameter in task.trained.parameters()]
        assert all(gradient.dtype == torch.float32 for gradient in found)
        gradients.append(torch.cat(found))
    exact, rounded = gradients
    error = (exact - rounded).norm() / exact.norm()
    assert float(error) < HALF_GRADIENTS


def test_gradients_too_small_for_float16_are_not_lost() -> None:
    wanted = random_tensor(4, 6, 300).half()
    labels = torch.full((4, 6), 7)
    gradients = []
    for dtype in (torch.float32, torch.float16):
        given = (wanted + 1e-2 * random_tensor(4, 6, 300, seed=1)).half().to(dtype)
        outcome_of(given.requires_grad_(), wanted, labels, torch.zeros(4) > 0).loss.backward()
        gradients.append(cast(Tensor, given.grad).float() / distil_module.GRADIENT_SCALE)
    exact, half = gradients
    assert float(exact.abs().median()) < torch.finfo(torch.float16).smallest_normal / 100
    error = float((half - exact).norm() / exact.norm())
    assert error < UNDERFLOW, error


def test_nothing_to_distil_on_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to distil on"):
        Run(run.teacher, [], run.tokenizer)(student_for(run.teacher), tmp_path / "s")


@pytest.mark.parametrize("name", ["steps", "images", "questions", "learning_rate"])
def test_settings_that_are_off_are_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{name} is invalid: expected a positive number, found 0"
    ):
        DistilSettings(**{"steps": 1, name: 0})
