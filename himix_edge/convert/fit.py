"""The projections of a HiMix model in closed form, from what a vanilla model makes of pictures.

All that the image contributes is, per layer, its keys before rotary embedding and its values. HiMix
says that they are linear in the vision features; so here is the linear map that comes closest:
ridge regression over calibration pictures, from sums that one pass over them collects.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from himix_edge.config import ProjectionConfig
from himix_edge.convert.attention import token_weights
from himix_edge.convert.images import Calibration
from himix_edge.convert.moments import Moments
from himix_edge.convert.sums import CurvePoint, Part, Sums, batches, fingerprint
from himix_edge.convert.teacher import Teacher, features_of
from himix_edge.errors import ConfigError
from himix_edge.models.decoder import KV
from himix_edge.models.himix import HiMix
from himix_edge.models.injection import HiMixInjection

Watch = Callable[[str, int, int, str], None]  # name, done, total, what there is to say

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of the inputs' mean variance
ROWS_PER_INPUT = 2  # image tokens, at least, for each input of the projections


@dataclass(frozen=True)
class FitOptions:
    """What the projections see, and how the fit weighs what it sees.

    Attributes:
        joined_layers: of the encoder, whose hidden states stand beside the features.
        neighbourhood: 3 puts the eight patches around beside each patch's own features.
        connector: puts the teacher's connector's output beside the features.
        weighting: "attention" weighs each image token, in each layer, by the attention that the
            prompts pay to it there; unexplained variances are then weighted, too.
    """

    joined_layers: tuple[int, ...] = ()
    neighbourhood: Literal[1, 3] = 1
    connector: bool = True
    weighting: Literal["none", "attention"] = "none"

    def projection(self, teacher: Teacher) -> ProjectionConfig:
        """What the student's config says of it."""
        size = teacher.model.config.decoder.hidden_size if self.connector else None
        return ProjectionConfig(self.neighbourhood, connector_size=size, bias=True)


@dataclass(frozen=True)
class Fit:
    """How close the projections came.

    Attributes:
        keys, values: the variance of the teacher's keys (before rotary embedding) and values that
            the projections don't explain, 0..1, by layer, in the pictures held out.
        trained_keys, trained_values: the same in those it was fitted on.
        penalty: of `PENALTIES`, the best in the pictures held out, for the model as a whole.
        images, held_out: how many pictures it was fitted on, and judged by.
        rows: image tokens it was fitted on.
        curve: by the number of pictures, up to all.
        skipped: files that could not be read, by name, with the reason.
    """

    keys: tuple[float, ...]
    values: tuple[float, ...]
    trained_keys: tuple[float, ...]
    trained_values: tuple[float, ...]
    penalty: float
    images: int
    held_out: int
    rows: int
    curve: tuple[CurvePoint, ...]
    skipped: dict[str, str]


def fitted(
    teacher: Teacher,
    student: HiMix,
    calibration: Calibration,
    prompts: Sequence[Sequence[int]],
    options: FitOptions,
    state: Path,
    batch: int,
    watch: Watch,
) -> Fit:
    """Writes the projections of a student, of `student_of` with the options' own projection.

    One pass over the pictures, those held out first. An interrupted run goes on from the state on
    disk, which is written once a minute and at the end, and comes to the same projections.

    Args:
        prompts: token ids of what follows an image; looked at only if weighted by attention.
        state: a file that holds the sums; it stays.
        batch: pictures that run through the teacher at once.
        watch: called after each batch.

    Raises:
        ConfigError: too few pictures, or no prompts to weigh by.
        TrainingError: the state is another run's, or corrupt; sums that are not finite.
        OutputError: the state can't be written; the one before it stays.
    """
    if options.weighting == "attention" and not all(prompts or [[]]):
        raise ConfigError(
            "there is nothing to weigh image tokens by",
            expected="a prompt or more",
            fix="write some into the calibration folder's prompts.txt, a line each",
        )
    weighted = options.weighting == "attention"
    sums = _empty_sums(teacher, student, calibration, prompts, options, state)
    held_out, trained = sums.parts
    _require_pictures(student, calibration, len(calibration.part(held_out=False)))
    if state.exists():
        sums.load(calibration)
    for part in sums.parts:
        total = len(calibration.part(part.held_out))
        for paths, pixels in batches(calibration, part, batch):
            _add(part.sums, teacher, student, pixels, prompts if weighted else ())
            part.images += len(paths)
            part.files = calibration.part(part.held_out).index(paths[-1]) + 1
            said = _mark(sums, student) if not part.held_out else ""
            sums.save_if_due(calibration)
            watch(part.name, part.files, total, said)
        if not part.images:
            raise _none_readable(part, calibration)
    _require_pictures(student, calibration, trained.images)
    penalty, point = best_fit(trained.sums, held_out.sums, trained.images)
    if not sums.curve or sums.curve[-1].images < trained.images:
        sums.curve.append(point)
    sums.save(calibration)
    own = _write(student, trained.sums, penalty)
    return Fit(
        keys=point.keys,
        values=point.values,
        trained_keys=tuple(keys for keys, _ in own),
        trained_values=tuple(values for _, values in own),
        penalty=penalty,
        images=trained.images,
        held_out=held_out.images,
        rows=trained.images * student.config.vision.num_image_tokens,
        curve=tuple(sums.curve),
        skipped=calibration.skipped,
    )


def best_fit(trained: Moments, held_out: Moments, images: int) -> tuple[float, CurvePoint]:
    """The penalty that leaves least unexplained in the pictures held out, and what it leaves."""
    points = {}
    for penalty in PENALTIES:
        layers = [
            unexplained(held_out, layer, weight, bias)
            for layer, (weight, bias) in enumerate(trained.ridge(penalty))
        ]
        keys, values = zip(*layers, strict=True)
        points[penalty] = CurvePoint(images, keys, values)
    best = min(points, key=lambda penalty: sum(points[penalty].keys + points[penalty].values))
    return best, points[best]


def unexplained(sums: Moments, layer: int, weight: Tensor, bias: Tensor) -> tuple[float, float]:
    """The part of the keys' variance, and of the values', that a layer's map leaves over."""
    error, variance = sums.errors(layer, weight, bias)
    smallest = torch.finfo(variance.dtype).tiny
    keys, values = (
        float(left.sum().clamp_min(0) / whole.sum().clamp_min(smallest))
        for left, whole in zip(error.chunk(2), variance.chunk(2), strict=True)
    )
    return keys, values


def _mark(sums: Sums, student: HiMix) -> str:
    """One more point of the curve, where one is due; what there is to say of the last one."""
    held_out, trained = sums.parts
    images = trained.images
    due = images & (images - 1) == 0 and images >= _least_images(student)
    if due:
        sums.curve.append(best_fit(trained.sums, held_out.sums, images)[1])
    if not sums.curve:
        return ""
    last = sums.curve[-1]
    mean = sum(last.keys + last.values) / (2 * len(last.keys))
    return f"{mean:.2%} unexplained after {last.images} pictures"


@torch.no_grad()
def _add(
    sums: Moments,
    teacher: Teacher,
    student: HiMix,
    pixels: Tensor,
    prompts: Sequence[Sequence[int]],
) -> None:
    own, features = features_of(teacher, student, pixels)
    cache = teacher.image_cache(own)
    weights = token_weights(teacher, cache, prompts).flatten(1) if prompts else None  # [L, B * N]
    x = _injection(student).inputs(features.float())
    targets = [_rows(kv) for kv in teacher.image_targets(cache)]
    sums.add(x.flatten(0, 1), targets, weights)


def _rows(kv: KV) -> Tensor:
    """[B * N, 2 Hkv D]: a token's keys, then its values."""
    parts = [part.transpose(1, 2).flatten(2).flatten(0, 1) for part in kv]
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def _write(student: HiMix, sums: Moments, penalty: float) -> list[tuple[float, float]]:
    """Puts the maps in their places; returns what each leaves unexplained of the sums."""
    left = []
    for i, (weight, bias) in enumerate(sums.ridge(penalty)):
        layer: Any = _injection(student).layers[i]  # VisionProjections; ModuleList forgets it
        for linear, rows, constants in zip(
            (layer.k_proj, layer.v_proj), weight.chunk(2), bias.chunk(2), strict=True
        ):
            linear.weight.copy_(rows)
            linear.bias.copy_(constants)
        left.append(unexplained(sums, i, weight, bias))
    return left


def _empty_sums(
    teacher: Teacher,
    student: HiMix,
    calibration: Calibration,
    prompts: Sequence[Sequence[int]],
    options: FitOptions,
    state: Path,
) -> Sums:
    decoder = student.config.decoder
    device = torch.device("cpu") if teacher.device.type == "mps" else teacher.device  # no float64

    def part(name: str, held_out: bool) -> Part:
        weighted = options.weighting == "attention"
        outputs = 2 * decoder.num_key_value_heads * decoder.head_dim
        layers, inputs = decoder.num_hidden_layers, _inputs(student)
        sums = Moments(layers, inputs, outputs, weighted=weighted, device=device)
        return Part(name, held_out, sums)

    run = {
        "options": dataclasses.asdict(options),
        "prompts": [list(prompt) for prompt in prompts] if options.weighting != "none" else [],
        "pictures": {path.name: path.stat().st_size for path in calibration.files},
        "config": student.config.to_dict(),
        "teacher": fingerprint(teacher),
    }
    return Sums((part("held out", True), part("fitted", False)), state, run)


def _require_pictures(student: HiMix, calibration: Calibration, images: int) -> None:
    least, rows = _least_images(student), ROWS_PER_INPUT * _inputs(student)
    if images >= least:
        return
    skipped = len(calibration.skipped)
    raise ConfigError(
        f"{calibration.folder} has too few pictures",
        expected=f"{least} to fit on, and one in eight beside them held out: projections of "
        f"{_inputs(student)} inputs take {rows} image tokens",
        found=f"{images} to fit on" + (f" ({skipped} files can't be read)" if skipped else ""),
    )


def _none_readable(part: Part, calibration: Calibration) -> ConfigError:
    names = [path.name for path in calibration.part(part.held_out)]
    return ConfigError(
        f"of the pictures {part.name} none can be read",
        expected=f"one or more of {', '.join(names[:3])}" + (", ..." if names[3:] else ""),
        found=calibration.skipped[names[0]],
        fix="put readable pictures in their place",
    )


def _least_images(student: HiMix) -> int:
    rows = ROWS_PER_INPUT * _inputs(student)
    return math.ceil(rows / student.config.vision.num_image_tokens)


def _inputs(student: HiMix) -> int:
    config = student.config
    return config.projection.input_size(config.vision.feature_size)


def _injection(student: HiMix) -> HiMixInjection:
    return cast(HiMixInjection, student.injection)
