"""What the teacher itself answers, many questions at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from himix_edge.convert.teacher import Teacher
from himix_edge.models.decoder import KV

MAX_ANSWER_TOKENS = 32


@torch.no_grad()
def greedy_answers(
    teacher: Teacher, prompts: Sequence[list[int]], cache: list[KV]
) -> list[list[int]]:
    """The teacher's likeliest tokens after each of T prompts, up to and with one that ends them.

    Args:
        cache: per layer [T, Hkv, P + N, D], the image of each prompt.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):  # those of a length go together
        alike = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        rows = torch.tensor(alike, device=teacher.device)
        input_ids = torch.tensor([prompts[i] for i in alike], device=teacher.device)
        for i, answer in zip(alike, _greedy(teacher, input_ids, rows_of(cache, rows)), strict=True):
            answers[i] = answer
    return answers


def _greedy(teacher: Teacher, input_ids: Tensor, cache: list[KV]) -> list[list[int]]:
    """The same after prompts of one length [T, M]."""
    config, device = teacher.model.config.decoder, teacher.device
    room = config.max_position_embeddings - cache[0].key.shape[2] - input_ids.shape[1]
    ends = torch.tensor(config.last_token_ids, dtype=torch.int64, device=device)
    over = torch.zeros(len(input_ids), dtype=torch.bool, device=device)
    chosen: list[Tensor] = []
    while len(chosen) < min(MAX_ANSWER_TOKENS, room) and not over.all():
        logits, cache = teacher.decode(input_ids, cache)
        input_ids = logits[:, -1:].argmax(-1)  # [T, 1]
        chosen.append(input_ids)
        over |= torch.isin(input_ids[:, 0], ends)
    return [_ended(row, config.last_token_ids) for row in torch.cat(chosen, 1).tolist()]


def _ended(tokens: list[int], ends: Sequence[int]) -> list[int]:
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]


def rows_of(cache: list[KV], rows: Tensor) -> list[KV]:
    """[B, Hkv, S, D] -> [T, Hkv, S, D]: for each text, what is there of its image."""
    return [KV(*(part[rows] for part in kv)) for kv in cache]
