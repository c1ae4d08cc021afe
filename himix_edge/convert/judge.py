"""How close a converted model comes to its teacher: next tokens, and whole answers.

Next tokens are compared along the teacher's greedy answer, which both models are given, so that
every position has the same text before it. Whole answers are each model's own.

The teacher is the source as it came. Where it finds a token the likeliest that the student never
says, its answer ends and the two disagree; KL is between the distributions over the tokens that the
student may say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from himix_edge.convert.teacher import Teacher, features_of
from himix_edge.errors import CheckpointError, ConfigError, PromptError
from himix_edge.models.decoder import KV
from himix_edge.models.himix import HiMix
from himix_edge.runtimes.tokenizer import Tokenizer

MAX_ANSWER_TOKENS = 64
JUDGE = "judge"  # the name that `Watch` is called with

Watch = Callable[[str, int, int, str], None]  # name, done, total, what there is to say


class Asked(Protocol):
    """A prompt, and the right answer if it is known; see `questions.Question`."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> str | None: ...


Picture = tuple[Path, NDArray[np.float32]]  # a file, and its pixel_values [1, 3, H, W]
QuestionsFor = Callable[[str], Sequence[Asked]]  # of a picture's file name


@dataclass(frozen=True)
class Exchange:
    """One prompt about one picture.

    Attributes:
        image: the picture's file name.
        label: the right answer, where one is known.
        teacher, student: the greedy answers.
        tokens: of the teacher's answer, its end included: the positions that were compared.
        agreed: at how many of them the likeliest token is the same.
        kl: KL(teacher || student) of the next token, in nats, the mean over these positions.
        first_kl: that of the first.
    """

    image: str
    prompt: str
    label: str | None
    teacher: str
    student: str
    tokens: int
    agreed: int
    kl: float
    first_kl: float

    @property
    def same(self) -> bool:
        """Whether the answers are the same word for word."""
        return self.teacher.split() == self.student.split()

    @property
    def teacher_right(self) -> bool:
        return self.label is not None and _is_answer(self.teacher, self.label)

    @property
    def student_right(self) -> bool:
        return self.label is not None and _is_answer(self.student, self.label)


@dataclass(frozen=True)
class Judgement:
    """All exchanges, and what they come to. A figure by token counts every token alike."""

    exchanges: tuple[Exchange, ...]

    @property
    def tokens(self) -> int:
        return sum(exchange.tokens for exchange in self.exchanges)

    @property
    def kl(self) -> float:
        """Mean over all tokens of all of the teacher's answers, in nats."""
        return sum(exchange.kl * exchange.tokens for exchange in self.exchanges) / self.tokens

    @property
    def first_kl(self) -> float:
        """Mean over the first tokens of the answers, in nats."""
        return sum(exchange.first_kl for exchange in self.exchanges) / len(self.exchanges)

    @property
    def agreement(self) -> float:
        """Share of all tokens at which the likeliest is the same."""
        return sum(exchange.agreed for exchange in self.exchanges) / self.tokens

    @property
    def same(self) -> int:
        """How many answers are the same word for word."""
        return sum(exchange.same for exchange in self.exchanges)

    @property
    def labelled(self) -> int:
        return sum(exchange.label is not None for exchange in self.exchanges)

    @property
    def teacher_right(self) -> int:
        return sum(exchange.teacher_right for exchange in self.exchanges)

    @property
    def student_right(self) -> int:
        return sum(exchange.student_right for exchange in self.exchanges)


@torch.inference_mode()
def judged(
    teacher: Teacher,
    student: HiMix,
    pictures: Iterable[Picture],
    questions_for: QuestionsFor,
    tokenizer: Tokenizer,
    watch: Watch,
    max_tokens: int = MAX_ANSWER_TOKENS,
) -> Judgement:
    """Asks both models everything about each picture; the encoder runs once a picture.

    Args:
        student: over the teacher's own encoder and decoder, as `student_of` makes it.
        pictures: that the fit has not seen.
        watch: called after each exchange with how many there were; the total is not known (0).
        max_tokens: at which an answer is cut off.

    Raises:
        CheckpointError: logits that are not finite.
        ConfigError: no picture, or no question about any.
        PromptError: a prompt that the positions don't suffice for.
    """
    exchanges: list[Exchange] = []
    for path, pixel_values in pictures:
        teachers, students = both_caches(teacher, student, pixel_values)
        for question in questions_for(path.name):
            prompt = encoded(question.prompt, tokenizer, student)
            most = min(max_tokens, student.config.max_text_tokens - len(prompt))
            answers = [
                greedy(model, prompt, cache, most)
                for model, cache in ((teacher, teachers), (student, students))
            ]
            text = torch.tensor([[*prompt, *answers[0][:-1]]], device=teacher.device)
            first = len(prompt) - 1  # whose logits are the answer's first token
            said = teacher.logits(text, teachers)[0, first:]
            expected = log_probabilities(student.decoder.suppressed(said))
            found = log_probabilities(student.decode(text, students)[0][0, first:])
            kl = divergences(expected, found)  # [tokens]
            exchanges.append(
                Exchange(
                    image=path.name,
                    prompt=question.prompt,
                    label=question.answer,
                    teacher=tokenizer.decode(answers[0]),
                    student=tokenizer.decode(answers[1]),
                    tokens=len(answers[0]),
                    agreed=int((said.argmax(-1).cpu() == found.argmax(-1)).sum()),
                    kl=float(kl.mean()),
                    first_kl=float(kl[0]),
                )
            )
            judgement = Judgement(tuple(exchanges))
            watch(JUDGE, len(exchanges), 0, f"{judgement.agreement:.1%} of tokens agree")
    if not exchanges:
        raise ConfigError(
            "there is nothing to judge a conversion by",
            expected="a held-out picture and a question about it",
            fix="add pictures to the calibration folder",
        )
    return Judgement(tuple(exchanges))


def both_caches(
    teacher: Teacher, student: HiMix, pixel_values: NDArray[np.float32]
) -> tuple[list[KV], list[KV]]:
    """What a picture [1, 3, H, W] leaves in the cache of each: per layer [1, Hkv, P + N, D].

    In the teacher's dtype, whatever that of the projections is; the positions are each one's own.
    """
    features, joined = features_of(teacher, student, torch.from_numpy(pixel_values))
    weight = next(student.injection.parameters())
    image = student.injection(joined.to(weight.dtype), student.decoder)
    students = [KV(*(part.to(teacher.dtype) for part in kv)) for kv in image]
    return teacher.image_cache(features), students


def encoded(prompt: str, tokenizer: Tokenizer, student: HiMix) -> list[int]:
    """The ids of all that follows the image, up to the answer.

    Raises:
        PromptError: more than the positions suffice for.
    """
    ids = tokenizer.encode_turn(tokenizer.chat.first, prompt)
    if len(ids) >= student.config.max_text_tokens:
        raise PromptError(
            f"the prompt {prompt[:40]!r} is too long",
            expected=f"less than the {student.config.max_text_tokens} tokens of the context",
            found=str(len(ids)),
            fix="shorten it in the calibration folder",
        )
    return ids


def greedy(
    model: HiMix | Teacher, prompt: Sequence[int], past: list[KV], max_tokens: int
) -> list[int]:
    """The likeliest tokens after a prompt, up to one that ends the answer, which is included.

    Args:
        past: a cache of the model's own, with nothing in it but the prefix and the image.
    """
    device, ends = past[0].key.device, model.config.decoder.last_token_ids
    step, answer = list(prompt), list[int]()
    while True:
        logits, past = model.decode(torch.tensor([step], device=device), past)
        answer.append(int(logits[0, -1].argmax()))
        if len(answer) >= max_tokens or answer[-1] in ends:
            return answer
        step = answer[-1:]


def log_probabilities(logits: Tensor) -> Tensor:
    """Of logits [M, V], in float64 on the CPU.

    Raises:
        CheckpointError: some are not finite.
    """
    wide = logits.cpu().double()
    if not bool(wide.isfinite().all()):
        raise CheckpointError(
            "the model's logits are not finite",
            expected="numbers",
            found="an overflow, or weights that are none",
            fix="convert in float32, if it was in half precision",
        )
    return F.log_softmax(wide, -1)


def divergences(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected || found) in nats of each row of two [M, V] of log probabilities: [M]"""
    return F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)


def _is_answer(said: str, label: str) -> bool:
    """Whether the words are the label's, whatever their case, with a full stop or without."""
    words, right = (text.casefold().strip().rstrip(".").split() for text in (said, label))
    return words == right
