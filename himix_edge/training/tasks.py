"""What the recipe learns, one after the other; each is a loss as a function of the step.

    encoder      pretraining: the encoder learns to say what each patch shows (labels.py)
    language     pretraining: the decoder learns to answer from a perfect eye's symbols
    projections  the paper's first stage: only what carries the image into the decoder is trained
    finetune     the paper's second stage: that and the decoder; the encoder stays frozen
    practice     more of the second stage, on questions that it leaves hard

The two pretrainings stand in for a pretrained CLIP and a pretrained language model; their heads and
symbol projections are thrown away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from himix_edge.config import HiMixConfig
from himix_edge.models.decoder import KV
from himix_edge.models.himix import HiMix
from himix_edge.models.injection import INJECTIONS
from himix_edge.training.data import (
    NO_LOSS,
    TextBatch,
    image_batch,
    label_batch,
    scene_batch,
    text_batch,
)
from himix_edge.training.labels import CLASSES, SYMBOLS, Labels

Kinds = Sequence[str]  # of the questions that are asked about each scene
TaskName = Literal["encoder", "language", "projections", "finetune", "practice"]
GROUND_WEIGHT = 0.1  # of a patch without an object, against 1 for one with
CENTRE_WEIGHT = 3.0  # of the patch that holds an object's centre
PLACE_WEIGHT = 5.0  # of the distance to the centre, in image widths, against the class losses


@dataclass(frozen=True)
class Outcome:
    """One batch's loss, and how often the model was right, by kind."""

    loss: Tensor
    right: dict[str, float]


class Task(Protocol):
    """What is trained (the parameters that move), and the loss of a batch."""

    @property
    def trained(self) -> nn.Module: ...

    def outcome(self, scenes: int, kinds: Kinds, rng: np.random.Generator) -> Outcome: ...


def task_from_name(name: TaskName, model: HiMix, tokenizer: Tokenizer, seed: int) -> Task:
    """The task over a model that is frozen but for what the task trains.

    Args:
        seed: of the weights that a pretraining throws away in the end.
    """
    model.requires_grad_(False)
    with seeded(seed):
        if name == "encoder":
            return EncoderTask(model)
        if name == "language":
            return LanguageTask(model, tokenizer)
        return AnswerTask(model, tokenizer, with_decoder=name != "projections")


class EncoderTask:
    """Dense supervision: each patch tells its object's shape, colour, size, ranks and place."""

    def __init__(self, model: HiMix) -> None:
        self.config = model.config
        self.encoder = model.vision
        self.head = nn.Linear(model.config.vision.hidden_size, SYMBOLS)
        self.trained = nn.ModuleDict({"vision": self.encoder, "head": self.head})

    def outcome(self, scenes: int, kinds: Kinds, rng: np.random.Generator) -> Outcome:
        batch = scene_batch(rng, scenes)
        said = self.head(self.encoder(image_batch(batch, self.config, rng)))  # [B, N, SYMBOLS]
        return _dense_outcome(said, label_batch(batch, self.config))


class LanguageTask:
    """Questions answered from symbols: the image's place in the cache filled by a perfect eye.

    The symbols enter as vision features do, through an injection of the model's own design, so that
    the decoder learns to read its cache; no picture is drawn.
    """

    def __init__(self, model: HiMix, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer, self.model = model.config, tokenizer, model
        self.eye = INJECTIONS[model.config.design](SYMBOLS, model.config)
        self.trained = nn.ModuleDict({"decoder": model.decoder, "eye": self.eye})

    def outcome(self, scenes: int, kinds: Kinds, rng: np.random.Generator) -> Outcome:
        batch = scene_batch(rng, scenes)
        symbols = torch.from_numpy(label_batch(batch, self.config).symbols())
        texts = text_batch(batch, kinds, self.tokenizer, rng)
        return _answer_outcome(self.model, self.eye(symbols, self.model.decoder), texts)


class AnswerTask:
    """The paper's two stages: answers about real pictures, the encoder frozen."""

    def __init__(self, model: HiMix, tokenizer: Tokenizer, *, with_decoder: bool) -> None:
        self.model, self.tokenizer = model, tokenizer
        parts = {"injection": model.injection}
        self.trained = nn.ModuleDict(parts | ({"decoder": model.decoder} if with_decoder else {}))

    def outcome(self, scenes: int, kinds: Kinds, rng: np.random.Generator) -> Outcome:
        batch = scene_batch(rng, scenes)
        with torch.no_grad():
            features = self.model.vision(image_batch(batch, self.model.config, rng))
        texts = text_batch(batch, kinds, self.tokenizer, rng)
        return _answer_outcome(
            self.model, self.model.injection(features, self.model.decoder), texts
        )


def _answer_outcome(model: HiMix, image: list[KV], texts: TextBatch) -> Outcome:
    """Cross-entropy of the answers' tokens: the mean of each answer, then of all answers.

    An answer counts as right if every token is the likeliest one, given those before it.
    """
    logits = model.decode_texts(texts.input_ids, image)  # [B * Q, M, V]
    losses = F.cross_entropy(
        logits.transpose(1, 2), texts.labels, ignore_index=NO_LOSS, reduction="none"
    )
    given = texts.labels == NO_LOSS
    loss = (losses.sum(1) / (~given).sum(1)).mean()
    with torch.no_grad():
        right = ((logits.argmax(-1) == texts.labels) | given).all(1).tolist()
    return Outcome(loss, _share_right(texts.kinds, right))


def _dense_outcome(said: Tensor, labels: Labels) -> Outcome:
    """Cross-entropy of every class label and the distance to the centre, weighted by patch.

    "right" is judged where objects' centres lie, but for "centre" itself, judged everywhere.
    """
    classes = torch.from_numpy(labels.classes)  # [B, N, C]
    covered, centre = classes[..., 0] > 0, classes[..., -1] > 0
    weight = torch.where(covered, 1.0, GROUND_WEIGHT) + centre * (CENTRE_WEIGHT - 1)
    weight = weight / weight.sum()
    *logits, place = said.split([*CLASSES.values(), 2], dim=-1)
    distance = (place - torch.from_numpy(labels.place)).abs().sum(-1)
    loss = PLACE_WEIGHT * (distance * weight * covered).sum()
    right, everything = {}, centre.clone()
    for i, (name, each) in enumerate(zip(CLASSES, logits, strict=True)):
        losses = F.cross_entropy(each.permute(0, 2, 1), classes[..., i], reduction="none")
        loss = loss + (losses * weight).sum()
        hit = each.detach().argmax(-1) == classes[..., i]
        right[name] = float(
            hit.all(1).float().mean() if name == "centre" else hit[centre].float().mean()
        )
        everything &= hit
    right["object"] = float(everything[centre].float().mean())
    return Outcome(loss, right)


def _share_right(kinds: list[str], right: list[bool]) -> dict[str, float]:
    each: dict[str, list[bool]] = {}
    for kind, value in zip(kinds, right, strict=True):
        each.setdefault(kind, []).append(value)
    return {kind: sum(values) / len(values) for kind, values in each.items()}


def initialised_model(config: HiMixConfig, seed: int) -> HiMix:
    """A model with random weights from a seed.

    The encoder's position embedding starts as sines and cosines of the patch's row and column: that
    which patch is next to which need not be learned first.
    """
    with seeded(seed):
        model = HiMix(config)
    for module in model.decoder.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
    side = config.vision.image_size // config.vision.patch_size
    positions = model.vision.model.embeddings.position_embedding.weight
    with torch.no_grad():
        positions[1:] = _grid_sines(side, config.vision.hidden_size) * positions.std() * 2
    return model


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers from a seed, and afterwards as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _grid_sines(side: int, width: int) -> Tensor:
    """[side * side, width]: a quarter each of sin and cos of the row and of the column."""
    frequencies = torch.pi * torch.linspace(0.25, side / 2, width // 4) / side
    steps = torch.arange(side, dtype=torch.float32)[:, None] * frequencies  # [side, width / 4]
    axis = torch.cat((steps.sin(), steps.cos()), dim=1)
    rows, columns = axis.repeat_interleave(side, 0), axis.repeat(side, 1)
    return torch.cat((rows, columns), dim=1)
