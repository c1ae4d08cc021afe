"""The model card of a converted checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from himix_edge.convert import tables
from himix_edge.convert.plots import mean
from himix_edge.convert.report import last_judgement

LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # as in the front matter of a Hugging Face card
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#|~])")


def model_card(report: Mapping[str, Any]) -> str:
    """The card as Markdown, of `Conversion.to_dict`."""
    source = report["source"]
    name, family = _plain(source["name"]), _plain(source["family"])
    return f"""\
{_front_matter(source["licence"])}# {name} as HiMix

Converted from {name} (family: {family}) by himix-edge {report["himix_edge"]}. The vision encoder
and the decoder are that model's, weight for weight{_trained(report)}. What is new are two linear
maps a layer, from the vision features to the keys and values that the image has there; so the image
never runs through the decoder. {tables.operations(report)}

## How it was made

The maps were fitted in closed form, by ridge regression, to the keys and values that the vanilla
model itself has for the pictures of a calibration folder{_distilled(report)}.

{_table(("what", "which"), tables.how(report))}

## How close it is

Measured on pictures of the same folder that were held out, greedy answers, in PyTorch. Next tokens
are compared along the vanilla model's own answers.

{_table(*_headed(tables.closeness(report)))}

{_unexplained(report)}

## What is not proven

These figures hold for pictures and questions like those of the calibration folder, and for no
others. No public benchmark was run. What the vanilla model does with several pictures, with video
or with pictures cut into tiles was not measured, and is lost: this model sees one picture, whole.
Its errors and its bias are this model's too. Before you rely on it, compare the answers in the
conversion's report, and ask it about pictures of your own:

    himix-edge export --checkpoint CHECKPOINT -o BUNDLE
    himix-edge run PICTURE "a question" --bundle BUNDLE

## Licence

{_licence(source["licence"], name)}
"""


def _front_matter(licence: str) -> str:
    """What model hubs read; without a word on the licence where none is known."""
    if not licence:
        return ""
    said = licence.lower() if LICENCE_ID.fullmatch(licence.lower()) else "other"
    return f"---\nlicense: {said}\n---\n\n"


def _licence(licence: str, name: str) -> str:
    if not licence:
        return (
            f"That of {name}, whose folder doesn't say which. Find out before you pass this model "
            "on: it holds that model's weights."
        )
    return f"That of {name}, whose weights this model holds: {_plain(licence)}."


def _trained(report: Mapping[str, Any]) -> str:
    return "" if report["distil_steps"] else ", and nothing was trained"


def _distilled(report: Mapping[str, Any]) -> str:
    if not (steps := report["distil_steps"]):
        return ""
    return (
        f", and then trained for {steps:,} steps towards its next-token distributions, all else "
        "frozen"
    )


def _unexplained(report: Mapping[str, Any]) -> str:
    fit, judged = report["fit"], last_judgement(report)
    keys, values = (
        f"{mean(fit[part]):.2%} of the {part}' variance (at most {max(fit[part]):.2%})"
        for part in ("keys", "values")
    )
    return (
        f"Unexplained by the fit, in the mean over the layers: {keys}, {values}. "
        f"{judged['tokens']:,} tokens of {judged['answers']:,} answers were compared."
    )


def _headed(rows: Sequence[tables.Row]) -> tuple[tables.Row, Sequence[tables.Row]]:
    return rows[0], rows[1:]


def _table(head: tables.Row, rows: Sequence[tables.Row]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(_plain(cell) for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Someone else's words on one line, none of them a mark of Markdown's."""
    return MARKDOWN.sub(r"\\\1", " ".join(text.split()))
