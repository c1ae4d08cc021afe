"""One question from the command line: the answer on stdout, streamed or as JSON."""

from __future__ import annotations

import sys

from himix_edge.console import print_json, printable
from himix_edge.runtimes.image_sources import ImageSource
from himix_edge.runtimes.model import Model
from himix_edge.runtimes.sampling import SamplingOptions


def print_answer(
    model: Model,
    source: ImageSource,
    prompt: str,
    options: SamplingOptions,
    *,
    as_json: bool,
    resize: str | None = None,
    system: str | None = None,
) -> None:
    """Answers, and says on stderr who does, and what may make the answer doubtful.

    Args:
        resize, system: see `Model.encode` and `Model.chat`.
        as_json: print one JSON object when done: the text, token counts, milliseconds by phase.

    Raises:
        HimixError: whatever `Model.encode` and `Model.generate` raise.
    """
    manifest = model.manifest
    image = model.encode(source, resize=resize)
    answer = model.generate(image, prompt, options, system=system)
    for obstacle in model.passed_over:
        print(printable(f"On {model.device}, because {obstacle}"), file=sys.stderr)
    name = manifest.name if model.device == "cpu" else f"{manifest.name}, on {model.device}"
    said = " ".join(filter(None, (f"Model: {name}.", manifest.notice)))
    print(printable(said), file=sys.stderr)
    for notice in image.notices:
        print(f"Note: {notice}", file=sys.stderr)
    for piece in answer:
        if not as_json:
            print(printable(piece), end="", flush=True)
    if not as_json:
        print(flush=True)
        return
    result = {
        "model": manifest.name,
        "device": model.device,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "image_tokens": image.kv.slots,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": answer.tokens,
        "notices": image.notices,
        "milliseconds": {
            phase: round(ms, 3)
            for phase, ms in {**image.milliseconds, **answer.milliseconds}.items()
        },
    }
    print_json(result)
