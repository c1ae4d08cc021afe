"""A vanilla model's prompts: its own template and tokenizer, and the ids ahead of the image.

On the device the ids ahead of the image stand in the vision graph, with their keys and values:
they must be the same whatever is asked.
"""

from __future__ import annotations

import dataclasses
import datetime

from himix_edge.contract import ImagePlace
from himix_edge.errors import BundleError, CheckpointError, PromptError
from himix_edge.export.reference import tokenizer_from_texts
from himix_edge.models.chat_files import ChatFiles
from himix_edge.runtimes.chat import assistant_message, user_message

TRIALS = (
    [user_message("What is it?")],
    [user_message("Où?"), assistant_message("Here."), user_message("  {{ 1 }}\n")],
)
ANOTHER_DAY = datetime.datetime(2001, 2, 3, 4, 5, 6)


def place_image(files: ChatFiles, place: ImagePlace) -> ChatFiles:
    """The same files, with the image's place and the ids that the template writes ahead of it.

    Args:
        place: without `prefix_ids`.

    Raises:
        CheckpointError: a template that can't be rendered, that writes no image or several, or
            whose text ahead of the image depends on the conversation or on the date.
    """
    chat = dataclasses.replace(files.chat, image=place)
    try:
        tokenizer = tokenizer_from_texts(files.tokenizer_json, files.chat_template, chat)
        prefixes = [
            tokenizer.split_at_image(tokenizer.chat.render(trial), place)[0] for trial in TRIALS
        ]
        other_day = tokenizer.chat.render(TRIALS[0], ANOTHER_DAY)
        dated = tokenizer.split_at_image(other_day, place)[0]
    except (BundleError, PromptError) as error:
        raise CheckpointError(
            f"the model's prompts can't be split at the image: {error.failed}",
            expected=error.expected,
            found=error.found,
            fix="give the folder a chat_template.jinja that writes the image once, and first",
        ) from error
    first, *others = prefixes
    if any(other != first for other in others):
        raise CheckpointError(
            "the text ahead of the image depends on the conversation",
            expected=f"the ids {first} in every turn",
            found=str(others[0]),
            fix="give the folder a chat_template.jinja whose text ahead of the image is fixed",
        )
    if dated != first:
        raise CheckpointError(
            "the text ahead of the image depends on the date",
            expected="the same on every day",
            found="strftime_now ahead of the image",
            fix="give the folder a chat_template.jinja with a fixed date, or none",
        )
    place = dataclasses.replace(place, prefix_ids=tuple(first))
    return dataclasses.replace(files, chat=dataclasses.replace(chat, image=place))


def prefix_ids_of(files: ChatFiles) -> tuple[int, ...]:
    """The ids ahead of the image; none where the template knows text alone."""
    return files.chat.image.prefix_ids if files.chat.image else ()
