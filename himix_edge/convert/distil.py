"""The projections trained a little more, towards the teacher's own next-token distributions.

Nothing else moves: encoder and decoder are the teacher's. The optimizer is that of the paper's
first stage (table 7) but for its learning rate, the loop and its state those of `training/loop.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from himix_edge.convert.answers import greedy_answers, rows_of
from himix_edge.convert.judge import encoded
from himix_edge.convert.teacher import Teacher, features_of
from himix_edge.data.pictures import pictures
from himix_edge.data.questions import Question, Questions
from himix_edge.errors import ConfigError
from himix_edge.models.decoder import KV
from himix_edge.models.himix import HiMix
from himix_edge.models.injection import HiMixInjection
from himix_edge.runtimes.tokenizer import Tokenizer
from himix_edge.training.data import NO_LOSS, padded
from himix_edge.training.loop import Plan, StepWatch, optimize
from himix_edge.training.tasks import Outcome

GRADIENT_SCALE = 1024.0  # within the decoder: small gradients are lost in float16


@dataclass(frozen=True)
class DistilSettings:
    """How long the projections are trained, and on what.

    Attributes:
        images: a step's.
        questions: about each of them, at most.
        learning_rate: the highest, reached after the warm-up. The paper's 1e-3 is for projections
            that begin at random; after a fit it undoes more than it mends. On the shapes world,
            26 steps without labels bring a KL divergence of 0.0183 on 40 held-out scenes to 0.0177
            with 3e-5, 0.0175 with 1e-4, 0.0197 with 3e-4, 0.038 with 1e-3 and 0.066 with 3e-3.
    """

    steps: int
    images: int = 12
    questions: int = 9
    seed: int = 0
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("steps", "images", "questions", "learning_rate"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ConfigError(
                    f"{name} is invalid", expected="a positive number", found=str(value)
                )
        if self.seed < 0:
            raise ConfigError("seed is invalid", expected="0 or more", found=str(self.seed))


def distil(
    teacher: Teacher,
    student: HiMix,
    files: Sequence[Path],
    questions: Questions,
    tokenizer: Tokenizer,
    settings: DistilSettings,
    state: Path,
    watch: StepWatch,
) -> None:
    """Trains the student's projections, from the state on disk if there is one.

    The loss is the KL divergence from the teacher's next-token distribution to the student's over
    the tokens of an answer: the labelled one, where the question has one, and there the
    cross-entropy of its tokens besides; else the teacher's own, greedy, up to an end token or
    MAX_ANSWER_TOKENS. It is the mean of each answer, then of all answers.

    Every batch is a function of the seed and the step, and what the teacher once answered is kept
    in the state: an interrupted run that goes on ends with the very weights.

    Args:
        student: made by `student_of`; its `injection` is trained in place, in fp32, but for the
            prefix, which is exact.
        files: the pictures, all of which can be read.
        tokenizer: see `questions.prompt_encoder`.
        state: a file; of the same student's, fitted alike, which is for the caller to see to.
        watch: called with the number of steps done, and what the last came to; "agreement" is the
            share of tokens that both find the likeliest.

    Raises:
        ConfigError: no pictures.
        PromptError: a question that the context can't hold.
        TrainingError: the state on disk is another run's, or the loss is no longer a number.
        ImageError: a file that is no picture.
        OutputError: the state can't be written.
    """
    if not files:
        raise ConfigError("there is nothing to distil on", expected="one picture or more")
    task = Distillation(teacher, student, files, questions, tokenizer, settings)
    try:
        optimize(
            task.trained,
            task.outcome,
            Plan("the distillation", settings.steps, settings.learning_rate),
            task.run,
            state,
            watch,
            task.answers,
        )
    finally:
        task.trained.requires_grad_(False)


@dataclass(frozen=True)
class Asked:
    """A question about one picture of a batch.

    Attributes:
        picture: its number in the batch.
        name: of its file.
        prompt: the question in tokens, within the chat template.
    """

    picture: int
    name: str
    question: Question
    prompt: list[int]


class Distillation:
    """What is trained, and what the batch of a step comes to.

    Attributes:
        trained: the projections, and a connector if there is one.
        answers: the teacher's own so far, in tokens, by picture and by prompt.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: HiMix,
        files: Sequence[Path],
        questions: Questions,
        tokenizer: Tokenizer,
        settings: DistilSettings,
    ) -> None:
        self.teacher, self.student = teacher, student
        self.files, self.questions, self.settings = files, questions, settings
        self.tokenizer = tokenizer
        injection = cast(HiMixInjection, student.injection)
        self.trained = nn.ModuleDict({"inputs": injection.inputs, "layers": injection.layers})
        self.answers: dict[str, dict[str, list[int]]] = {}

    @property
    def run(self) -> dict[str, Any]:
        """All that decides the weights in the end, but those in the beginning."""
        asked = {
            file.name: [(question.prompt, question.answer) for question in self._about(file)]
            for file in self.files
        }
        return {
            "settings": dataclasses.asdict(self.settings),
            "student": self.student.config.to_dict(),
            "teacher": {"dtype": str(self.teacher.dtype), "sha256": _fingerprint(self.teacher)},
            "pictures": {
                "count": len(self.files),
                "sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
            },
        }

    def outcome(self, step: int) -> Outcome:
        """The loss of a step's batch."""
        files, asked = self._batch(step)
        theirs, features = self._features(files)
        cache = self.teacher.image_cache(theirs)
        self._have_answered(asked, cache)
        texts = padded([(each.prompt, self._answer(each)) for each in asked])
        input_ids, labels = (torch.from_numpy(part).to(self.teacher.device) for part in texts)
        of = self._pictures_of(asked)
        with torch.no_grad():
            wanted = self.teacher.logits(input_ids, rows_of(cache, of))  # [T, M, V]
            wanted = self.student.decoder.suppressed(wanted)  # of what the student may say
        given = self.student.decode_texts(input_ids, rows_of(self._image(features), of))
        labelled = torch.tensor([each.question.answer is not None for each in asked])
        return outcome_of(given, wanted, labels, labelled.to(self.teacher.device))

    def _batch(self, step: int) -> tuple[list[Path], list[Asked]]:
        """The pictures of a step, each once in every round, and some questions about each."""
        seed, count = self.settings.seed, len(self.files)
        rng, size = np.random.default_rng([seed, step]), min(self.settings.images, count)
        files: list[Path] = []
        asked: list[Asked] = []
        for picture in range(size):
            turn, place = divmod(step * size + picture, count)
            order = np.random.default_rng([seed, turn, 1]).permutation(count)
            file = self.files[order[place]]
            questions = self._about(file)
            most = min(self.settings.questions, len(questions))
            chosen = [questions[i] for i in rng.choice(len(questions), most, replace=False)]
            asked += [Asked(picture, file.name, each, self._prompt(each)) for each in chosen]
            files.append(file)
        return files, asked

    def _about(self, file: Path) -> tuple[Question, ...]:
        return self.questions.for_image(file.name)

    def _prompt(self, question: Question) -> list[int]:
        return encoded(question.prompt, self.tokenizer, self.student)

    @torch.no_grad()
    def _features(self, files: list[Path]) -> tuple[Tensor, Tensor]:
        """X_v [B, N, d_v] of the teacher and of the student."""
        pixels = np.concatenate(list(pictures(files, self.student.config.preprocess)))
        return features_of(self.teacher, self.student, torch.from_numpy(pixels))

    def _image(self, features: Tensor) -> list[KV]:
        """What the student's projections write, in the decoder's type."""
        image: list[KV] = self.student.injection(features.float(), self.student.decoder)
        for part in chain.from_iterable(image):
            part.register_hook(lambda gradient: gradient / GRADIENT_SCALE)
        return [KV(*(part.to(self.teacher.dtype) for part in kv)) for kv in image]

    def _have_answered(self, asked: list[Asked], cache: list[KV]) -> None:
        """Asks the teacher what it was never asked before, and has no label."""
        new = {
            (each.name, each.question.prompt): each  # a small album's picture may come twice
            for each in asked
            if each.question.answer is None
            and each.question.prompt not in self.answers.get(each.name, {})
        }
        if new:
            prompts = [each.prompt for each in new.values()]
            images = rows_of(cache, self._pictures_of(list(new.values())))
            answers = greedy_answers(self.teacher, prompts, images)
            for (name, prompt), answer in zip(new, answers, strict=True):
                self.answers.setdefault(name, {})[prompt] = answer

    def _answer(self, asked: Asked) -> list[int]:
        """The label, as far as the context can hold it, or else what the teacher said."""
        if asked.question.answer is None:
            return self.answers[asked.name][asked.question.prompt]
        words = self.tokenizer.encode(asked.question.answer)
        room = self.student.config.max_text_tokens - len(asked.prompt)
        return [*words, *self.student.config.decoder.eos_token_ids[:1]][:room]

    def _pictures_of(self, asked: list[Asked]) -> Tensor:
        return torch.tensor([each.picture for each in asked], device=self.teacher.device)


def outcome_of(given: Tensor, wanted: Tensor, labels: Tensor, labelled: Tensor) -> Outcome:
    """The loss of T texts, and the share of answer tokens that both find the likeliest.

    Args:
        given, wanted: logits [T, M, V] of the student and of the teacher.
        labels: [T, M], the answers' tokens; NO_LOSS where there is none.
        labelled: [T], whether an answer is known to be right.
    """
    answered = labels != NO_LOSS
    ours = given[answered].float()  # [K, V], K tokens in all answers
    ours.register_hook(lambda gradient: gradient * GRADIENT_SCALE)
    ours, theirs = ours.log_softmax(-1), wanted[answered].float().log_softmax(-1)
    losses = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    right = labelled[:, None].expand_as(labels)[answered]
    losses = losses + right * F.nll_loss(ours, labels[answered], reduction="none")
    shares = (answered / answered.sum(1, keepdim=True))[answered] / len(labels)
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    return Outcome((losses * shares).sum(), {"agreement": agreement.item()})


def _fingerprint(teacher: Teacher) -> str:
    """The sha256 of the connector's weights: by these, two teachers of one config differ."""
    digest = hashlib.sha256()
    for parameter in teacher.connector.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
