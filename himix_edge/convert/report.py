"""What a conversion came to: plain data, the very object of the JSON file, the page and the card.

Unexplained variance is a share of 1, KL in nats a token, operations are FLOPs, memory bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from himix_edge import __version__
from himix_edge.analysis.costs import cost
from himix_edge.config import HiMixConfig
from himix_edge.convert.blame import Blame
from himix_edge.convert.fit import Fit
from himix_edge.convert.judge import Exchange, Judgement

TEXT_TOKENS = 64  # of the prompt whose operations are counted


@dataclass(frozen=True)
class Operations:
    """What one image and one prompt cost the decoder, before and after: FLOPs.

    What the prompt's fixed beginning costs the vanilla model is counted: it runs with each image
    anew, unless a server keeps it.

    Attributes:
        text_tokens: of the prompt, all after the image.
        image_slots: P + N, what is ahead of it.
        before: the connector, and all P + N + M tokens through the decoder.
        after: the image's keys and values from its features, and M tokens through the decoder.
    """

    text_tokens: int
    image_slots: int
    before: int
    after: int

    @classmethod
    def of(cls, teacher: HiMixConfig, student: HiMixConfig) -> Operations:
        """Counted as the paper does, encoder apart; of a shorter prompt if 64 tokens don't fit."""
        text = min(TEXT_TOKENS, student.max_text_tokens)
        whole = cost(teacher, text, student.image_slots).decoder
        before = cost(teacher, text).connectors + whole
        after = cost(student, text)
        return cls(
            text,
            student.image_slots,
            before.total,
            (after.connectors + after.decoder).total,
        )


@dataclass(frozen=True)
class Conversion:
    """All there is to tell.

    Attributes:
        name, family, licence: of what was converted, as in `TeacherSource`.
        teacher, student: what it was, and what it became.
        options: the conversion's, by name.
        fitted: how close the closed-form fit came.
        distilled: how close distilling came; None without.
        distil_steps: how many steps that took; 0 without.
        blame: of the finished model.
        seconds: by phase, in order.
        peak_memory: of the process, in bytes.
    """

    name: str
    family: str
    licence: str
    teacher: HiMixConfig
    student: HiMixConfig
    options: Mapping[str, Any]
    fit: Fit
    fitted: Judgement
    distilled: Judgement | None
    distil_steps: int
    blame: Blame
    seconds: Mapping[str, float]
    peak_memory: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        fit = dataclasses.asdict(self.fit)
        operations = Operations.of(self.teacher, self.student)
        report: dict[str, Any] = _plain(
            {
                "himix_edge": __version__,
                "source": {"name": self.name, "family": self.family, "licence": self.licence},
                "config": self.student.to_dict(),
                "options": dict(self.options),
                "pictures": {name: fit.pop(name) for name in ("images", "held_out", "skipped")},
                "fit": fit,
                "judgements": {
                    "fitted": judgement_dict(self.fitted),
                    "distilled": judgement_dict(self.distilled) if self.distilled else None,
                },
                "distil_steps": self.distil_steps,
                "blame": dataclasses.asdict(self.blame),
                "operations": dataclasses.asdict(operations),
                "seconds": dict(self.seconds),
                "peak_memory": self.peak_memory,
            }
        )
        return report


def judgement_dict(judgement: Judgement) -> dict[str, Any]:
    """The figures, and every exchange."""
    return {
        "kl": judgement.kl,
        "first_kl": judgement.first_kl,
        "agreement": judgement.agreement,
        "tokens": judgement.tokens,
        "answers": len(judgement.exchanges),
        "same": judgement.same,
        "labelled": judgement.labelled,
        "teacher_right": judgement.teacher_right,
        "student_right": judgement.student_right,
        "exchanges": [_exchange_dict(exchange) for exchange in judgement.exchanges],
    }


def last_judgement(report: Mapping[str, Any]) -> dict[str, Any]:
    """Of the finished model: as distilled, or else as fitted."""
    judgements: dict[str, Any] = report["judgements"]
    judgement: dict[str, Any] = judgements["distilled"] or judgements["fitted"]
    return judgement


def _exchange_dict(exchange: Exchange) -> dict[str, Any]:
    right = None if exchange.label is None else exchange.student_right
    return {**dataclasses.asdict(exchange), "same": exchange.same, "right": right}


def _plain(value: Any) -> Any:
    """As JSON would give it back: tuples as lists."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value
