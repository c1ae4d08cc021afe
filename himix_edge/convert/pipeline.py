"""A conversion from end to end: the folder of a vanilla model in, a HiMix checkpoint out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from himix_edge.convert.blame import blamed
from himix_edge.convert.card import model_card
from himix_edge.convert.distil import DistilSettings, distil
from himix_edge.convert.fit import Fit, FitOptions, fitted
from himix_edge.convert.images import Calibration
from himix_edge.convert.judge import Judgement, encoded, judged
from himix_edge.convert.page import page
from himix_edge.convert.questions import prompt_encoder
from himix_edge.convert.report import Conversion
from himix_edge.convert.source import teacher_from_folder, teacher_from_source
from himix_edge.convert.teacher import Teacher, TeacherSource, student_config, student_of
from himix_edge.data.questions import Question, Questions
from himix_edge.errors import ConfigError
from himix_edge.export.phases import Phases
from himix_edge.files import (
    Kind,
    refuse_foreign_folder,
    refuse_overlap,
    sole_writer,
    work_folder,
)
from himix_edge.models.checkpoints import (
    CHECKPOINT,
    CONVERSION_FILES,
    Checkpoint,
    write_checkpoint,
)
from himix_edge.models.himix import HiMix
from himix_edge.models.weights import HeldWeight, Weights
from himix_edge.plotting import require_plots
from himix_edge.replacing import entries
from himix_edge.runtimes.tokenizer import Tokenizer
from himix_edge.training.state import damaged
from himix_edge.training.tasks import Outcome

REPORT, PAGE = CONVERSION_FILES  # beside the weights
STATE = ".state"  # what an interrupted conversion goes on from: a folder beside the checkpoint
FIT_STATE, DISTIL_STATE = "fit.safetensors", "distil.safetensors"
QUESTIONS_A_PICTURE = 3  # that answers are compared on
WEIGHING_PROMPTS = 8  # whose attention weighs the image tokens

Precision = Literal["float32", "float16", "bfloat16"]
Watch = Callable[[str, int, int, str], None]  # name, done, total, what there is to say


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert.

    Attributes:
        fit: what the projections see.
        distil: steps of training after the fit; 0 is without.
        distil_images: pictures a step.
        judge: how many of the pictures held out answers are compared on.
        dtype: what the teacher computes in; sums, projections and losses are wider.
        device: of torch, such as "cpu" or "cuda".
        batch: pictures that run through the teacher at once.
    """

    fit: FitOptions = field(default_factory=FitOptions)
    distil: int = 0
    distil_images: int = 12
    judge: int = 16
    dtype: Precision = "float32"
    device: str = "cpu"
    batch: int = 4

    def __post_init__(self) -> None:
        for name, least in (("distil", 0), ("distil_images", 1), ("judge", 1), ("batch", 1)):
            if (value := getattr(self, name)) < least:
                raise ConfigError(
                    f"{name} is invalid", expected=f"{least} or more", found=str(value)
                )
        _require_device(self.device)


def convert(
    source: str | Path, pictures: Path, output: Path, options: ConvertOptions, watch: Watch
) -> Conversion:
    """Writes the checkpoint folder `output`, whole or not at all; its report lies within.

    The same call goes on where an interrupted one stopped.

    Args:
        source: as `teacher_from_folder` takes it. It is only read.
        pictures: a folder of calibration pictures, perhaps with questions about them.

    Raises:
        CheckpointError: a source that can't be converted.
        ConfigError: options, pictures or questions that don't do.
        ExportError: a chat template that can't be rendered.
        TrainingError: the state beside `output` is another conversion's.
        DependencyError: a package that the report needs is not installed.
        OutputError: a place that can't be written, or a folder of someone else's.
    """
    require_plots()
    if Path(source).is_dir():
        refuse_overlap(output, Path(source))
    refuse_foreign_folder(output, CHECKPOINT)
    with sole_writer(output):
        state = work_folder(output, STATE)
        refuse_foreign_folder(state, STATE_KIND)
        conversion = _convert(source, pictures, output, options, watch, state)
        _remove_state(state)
    return conversion


def _convert(
    source: str | Path,
    pictures: Path,
    output: Path,
    options: ConvertOptions,
    watch: Watch,
    state: Path,
) -> Conversion:
    phases = Phases(None)
    phases.begin("reading the model", 0.0)
    opened = teacher_from_folder(source)
    calibration = Calibration(pictures, opened.config.preprocess)
    questions, tokenizer = Questions.read(pictures), prompt_encoder(opened)
    watch("reading the model", 0, 1, opened.name)
    teacher = teacher_from_source(opened, getattr(torch, options.dtype), options.device)
    config = student_config(teacher, options.fit.joined_layers, options.fit.projection(teacher))
    work = _Work(teacher, student_of(teacher, config), calibration, questions, tokenizer, watch)
    watch("reading the model", 1, 1, opened.name)

    phases.begin("fitting", 0.0)
    fit = work.fitted(options, state / FIT_STATE)
    phases.begin("judging", 0.0)
    judgement, distilled = work.judged(options.judge), None
    if options.distil:
        phases.begin("distilling", 0.0)
        settings = DistilSettings(options.distil, options.distil_images)
        work.distil(settings, state / DISTIL_STATE)
        phases.begin("judging again", 0.0)
        distilled = work.judged(options.judge)
    phases.begin("looking for weak layers", 0.0)
    blame = blamed(
        teacher, work.student, work.held_out(options.judge), work.asked, tokenizer, watch
    )
    costs = phases.finish()
    conversion = Conversion(
        name=opened.name,
        family=opened.family,
        licence=opened.licence,
        teacher=opened.config,
        student=config,
        options=_plain(options),
        fit=dataclasses.replace(fit, skipped=calibration.skipped),
        fitted=judgement,
        distilled=distilled,
        distil_steps=options.distil,
        blame=blame,
        seconds={cost.phase: cost.seconds for cost in costs},
        peak_memory=max(cost.peak_bytes for cost in costs),
    )
    report = conversion.to_dict()
    files = {path.name: path for path in calibration.part(held_out=True)}
    beside = {REPORT: json.dumps(report, indent=2) + "\n", PAGE: page(report, files)}
    write_checkpoint(
        output,
        checkpoint_of(opened, work.student, model_card(report)),
        beside,
        lambda part: watch("writing", round(100 * part), 100, str(output)),
    )
    return conversion


def checkpoint_of(source: TeacherSource, student: HiMix, card: str) -> Checkpoint:
    """The converted model: encoder and decoder as the source has them, projections in fp32."""
    kept: Weights = {
        name: weight for name, weight in source.weights.items() if not name.startswith("injection.")
    }
    new = {
        f"injection.{name}": HeldWeight(tensor)
        for name, tensor in student.injection.state_dict().items()
    }
    return Checkpoint(
        name=f"{source.name.rsplit('/', 1)[-1]}-himix",
        notice=source.notice,
        config=student.config,
        weights={**kept, **new},
        tokenizer_json=source.tokenizer_json,
        chat_template=source.chat_template,
        model_card=card,
        files={},
        chat=source.chat,
    )


@dataclass(frozen=True)
class _Work:
    """What every phase of a conversion looks at."""

    teacher: Teacher
    student: HiMix
    calibration: Calibration
    questions: Questions
    tokenizer: Tokenizer
    watch: Watch

    def fitted(self, options: ConvertOptions, state: Path) -> Fit:
        weighted = options.fit.weighting != "none"
        return fitted(
            self.teacher,
            self.student,
            self.calibration,
            self._weighing_prompts() if weighted else [],
            options.fit,
            state,
            options.batch,
            self.watch,
        )

    def judged(self, pictures: int) -> Judgement:
        def watch(name: str, done: int, _: int, said: str) -> None:
            self.watch(name, done, pictures * QUESTIONS_A_PICTURE, said)

        held_out = self.held_out(pictures)
        return judged(self.teacher, self.student, held_out, self.asked, self.tokenizer, watch)

    def distil(self, settings: DistilSettings, state: Path) -> None:
        unreadable = self.calibration.skipped
        files = [
            path for path in self.calibration.part(held_out=False) if path.name not in unreadable
        ]

        def watch(step: int, outcome: Outcome) -> None:
            said = f"KL and cross-entropy {float(outcome.loss):.4f}"
            self.watch("distilling", step, settings.steps, said)

        parts = (self.teacher, self.student, files, self.questions, self.tokenizer)
        distil(*parts, settings, state, watch)

    def held_out(self, pictures: int) -> islice[Any]:
        """The first of the pictures held out."""
        return islice(self.calibration.pictures(held_out=True), pictures)

    def asked(self, name: str) -> tuple[Question, ...]:
        """What answers are compared on, of all that is asked about a picture."""
        return self.questions.for_image(name)[:QUESTIONS_A_PICTURE]

    def _weighing_prompts(self) -> list[list[int]]:
        own = [self.questions.for_image(path.name) for path in self.calibration.files]
        texts = list(dict.fromkeys(asked.prompt for each in own for asked in each))
        return [encoded(text, self.tokenizer, self.student) for text in texts[:WEIGHING_PROMPTS]]


STATE_FILES = (FIT_STATE, DISTIL_STATE, damaged(FIT_STATE), damaged(DISTIL_STATE))


def _not_of_a_state(folder: Path) -> str | None:
    """What in a folder is not of a conversion, and so may not go when that is done."""
    strangers = (path.name for path in sorted(entries(folder)) if path.name not in STATE_FILES)
    return next((f"{name} in it is not a conversion's" for name in strangers), None)


STATE_KIND = Kind("conversion's state", _not_of_a_state)


def _remove_state(folder: Path) -> None:
    """But for what someone else has put there since."""
    for name in STATE_FILES:
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _plain(options: ConvertOptions) -> dict[str, Any]:
    """Flat, as the report has it."""
    data = dataclasses.asdict(options)
    return {**data.pop("fit"), **data}


def _require_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ConfigError(
            f"torch can't compute on {device!r}",
            expected="a device that it has, such as cpu or cuda",
            found=next(iter(str(error).splitlines()), type(error).__name__),
            fix="use --device cpu, or install a torch for that device",
        ) from error
