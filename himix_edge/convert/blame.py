"""Where a converted model loses what its teacher knew: which layers, keys or values, which heads.

One part of the image's cache at a time is the student's, all the rest the teacher's own, turned to
where a HiMix model has it. What that costs is the KL of the next token from the teacher, along the
teacher's greedy answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from himix_edge.convert.judge import (
    Picture,
    QuestionsFor,
    Watch,
    both_caches,
    divergences,
    encoded,
    greedy,
    log_probabilities,
)
from himix_edge.convert.teacher import Teacher
from himix_edge.errors import ConfigError
from himix_edge.models.decoder import KV
from himix_edge.models.himix import HiMix
from himix_edge.runtimes.tokenizer import Tokenizer

BLAME = "blame"  # the name that `Watch` is called with
PICTURES, ANSWER_TOKENS, WORST_LAYERS = 4, 16, 2

Cache = list[KV]
Mixture = Callable[[Cache, Cache], Cache]  # of the teacher's and the student's


@dataclass(frozen=True)
class HeadBlame:
    """What each key-value head of a layer loses by itself, by keys and by values."""

    layer: int
    keys: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Blame:
    """Mean KL from the teacher, in nats a token, of mixed caches.

    Attributes:
        keys, values: by layer, when only its keys (values) are the student's.
        all_keys, all_values: when those of all layers are.
        heads: of the layers that lose most, the worst first.
        pictures: how many were looked at, with a question each.
    """

    keys: tuple[float, ...]
    values: tuple[float, ...]
    all_keys: float
    all_values: float
    heads: tuple[HeadBlame, ...]
    pictures: int


@torch.inference_mode()
def blamed(
    teacher: Teacher,
    student: HiMix,
    pictures: Iterable[Picture],
    questions_for: QuestionsFor,
    tokenizer: Tokenizer,
    watch: Watch,
    most_pictures: int = PICTURES,
    max_tokens: int = ANSWER_TOKENS,
    worst_layers: int = WORST_LAYERS,
) -> Blame:
    """Tries every layer's keys and values by themselves, and every head's of the worst layers.

    That is 2 (L + 1 + worst_layers Hkv) runs of the decoder a picture, each over one short text.

    Args:
        pictures: that the fit has not seen; the first `most_pictures` are used, with the first
            question about each.
        max_tokens: at which the teacher's answers are cut off.

    Raises:
        CheckpointError: logits that are not finite.
        ConfigError: no picture with a question, or fewer than one asked for.
        PromptError: a prompt that the positions don't suffice for.
    """
    if min(most_pictures, max_tokens) < 1:
        raise ConfigError("pictures and tokens are off", expected="1 or more of each")
    cases = [
        _case(teacher, student, picture, questions_for, tokenizer, max_tokens)
        for picture in islice(pictures, most_pictures)
        if questions_for(picture[0].name)
    ]
    if not cases:
        raise ConfigError(
            "there is nothing to find the weak layers with",
            expected="a held-out picture and a question about it",
            fix="add pictures to the calibration folder",
        )
    layers, heads = range(len(cases[0].teachers)), student.config.decoder.num_key_value_heads
    worst = min(worst_layers, len(layers))
    runs, done = 2 * (1 + len(layers) + worst * heads), 0

    def loss(mixture: Mixture) -> float:
        nonlocal done
        done += 1
        found = sum(_divergence(student, case, mixture) for case in cases) / len(cases)
        watch(BLAME, done, runs, f"KL {found:.4f}")
        return found

    def by_head(layer: int) -> HeadBlame:
        keys, values = (
            tuple(loss(one_head(layer, part, head)) for head in range(heads)) for part in (0, 1)
        )
        return HeadBlame(layer, keys, values)

    all_keys, all_values = (loss(one_part(layers, part)) for part in (0, 1))
    keys, values = (tuple(loss(one_part([layer], part)) for layer in layers) for part in (0, 1))
    by_loss = sorted(layers, key=lambda layer: keys[layer] + values[layer], reverse=True)
    weakest = tuple(by_head(layer) for layer in by_loss[:worst])
    return Blame(keys, values, all_keys, all_values, weakest, len(cases))


def one_part(layers: Iterable[int], part: int) -> Mixture:
    """The student's keys (part 0) or values (1) in these layers, the teacher's elsewhere."""
    chosen = set(layers)

    def mixed(teachers: Cache, students: Cache) -> Cache:
        return [
            _with_part(kv, part, students[layer][part]) if layer in chosen else kv
            for layer, kv in enumerate(teachers)
        ]

    return mixed


def one_head(layer: int, part: int, head: int) -> Mixture:
    """One key-value head's keys (part 0) or values (1) in one layer, the teacher's elsewhere."""

    def mixed(teachers: Cache, students: Cache) -> Cache:
        tensor = teachers[layer][part].clone()
        tensor[:, head] = students[layer][part][:, head]
        kvs = list(teachers)
        kvs[layer] = _with_part(kvs[layer], part, tensor)
        return kvs

    return mixed


class _Case(NamedTuple):
    """One question about one picture, and what the teacher says."""

    teachers: Cache  # replayed
    students: Cache
    text: Tensor  # [1, M], the answer but for its last token included
    first: int  # whose logits are the answer's first token
    expected: Tensor  # [tokens, V], log probabilities


def _case(
    teacher: Teacher,
    student: HiMix,
    picture: Picture,
    questions_for: QuestionsFor,
    tokenizer: Tokenizer,
    max_tokens: int,
) -> _Case:
    path, pixel_values = picture
    own, students = both_caches(teacher, student, pixel_values)
    prompt = encoded(questions_for(path.name)[0].prompt, tokenizer, student)
    most = min(max_tokens, student.config.max_text_tokens - len(prompt))
    answer = greedy(teacher, prompt, own, most)
    text = torch.tensor([[*prompt, *answer[:-1]]], device=teacher.device)
    teachers, first = teacher.replayed(own), len(prompt) - 1
    # The replayed cache's own logits, so that a part which is the teacher's loses nothing at all.
    expected = log_probabilities(student.decode(text, teachers)[0][0, first:])
    return _Case(teachers, students, text, first, expected)


def _divergence(student: HiMix, case: _Case, mixture: Mixture) -> float:
    logits, _ = student.decode(case.text, mixture(case.teachers, case.students))
    found = log_probabilities(logits[0, case.first :])
    return float(divergences(case.expected, found).mean())


def _with_part(kv: KV, part: int, tensor: Tensor) -> KV:
    return KV(tensor, kv.value) if part == 0 else KV(kv.key, tensor)
