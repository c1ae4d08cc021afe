"""Judges a quantized bundle against the one in floats, on text that calibration never saw.

A text is read as prompts of several lengths, and token by token, through the very graphs and
kernels that a device reads it with; with nothing in the cache, and with an image in it. An image's
keys and values are each bundle's own, of pictures that calibration never saw either. Where the
projections are random, an image is noise, and what a decoder does with noise tells nothing: then a
text stands in the image's slots, as the decoder in floats computes it, and the judged text goes on
after it.

How much is read (`judge_text.PROMPTS`) keeps a judgement to minutes for models of a billion
weights. A model that knows no more of the text than chance has no perplexity to lose: its ways are
marked, its divergence and agreement are measured on the shortest prompts alone, and it is not
judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from himix_edge.bundle.quality import (
    MAX_GROWTH,
    TOKEN_BY_TOKEN,
    Quality,
    Verdict,
    Way,
    percent,
)
from himix_edge.contract import DECODER_GRAPH, PREFILL_GRAPH, VISION_GRAPH, Manifest
from himix_edge.errors import ExportError, QualityError
from himix_edge.export.expected import Array
from himix_edge.export.judge_text import JudgeText
from himix_edge.export.reading import (
    Contents,
    Reader,
    Sums,
    read_at_once,
    read_token_by_token,
)
from himix_edge.export.recipes import Recipe, WeightChoice
from himix_edge.export.sessions import VisionSession, packed_session

CHANCE = 0.5  # of the vocabulary: a perplexity above is of a model that knows nothing of a text
NOTHING, IMAGE, STAND_IN = "nothing", "an image", "a text in the image's slots"


@dataclass(frozen=True)
class Bundles:
    """The two that are compared.

    Attributes:
        before, after: folders: in floats, and quantized.
        manifest: of the one in floats.
        recipe: by which the other was made.
    """

    before: Path
    after: Path
    manifest: Manifest
    recipe: Recipe

    @property
    def prompt_graph(self) -> str:
        """Of the quantized bundle."""
        return PREFILL_GRAPH if (self.after / PREFILL_GRAPH).is_file() else DECODER_GRAPH


@dataclass(frozen=True)
class _State:
    """What is in the cache: for each picture, of either bundle."""

    name: str
    before: Sequence[Contents]
    after: Sequence[Contents]

    def of(self, number: int) -> tuple[Contents, Contents]:
        """Those of a picture; where they are used up, from the first on again."""
        place = number % len(self.before)
        return self.before[place], self.after[place]


def measured_ways(
    bundles: Bundles,
    text: JudgeText,
    pictures: Sequence[Array],
    progress: Callable[[float], None] = lambda _: None,
) -> list[Way]:
    """Reads the text in all its ways.

    Args:
        pictures: each [1, 3, H, W]; a text may bring its own, or what stands for them.

    Raises:
        ExportError: a graph that ONNX Runtime can't run, or that gives what is no number.
    """
    config = bundles.manifest.config
    packed = bundles.recipe.open_session is packed_session
    images = None if text.stand_in else _images(bundles, text.pictures or pictures)
    before = Reader(bundles.before / DECODER_GRAPH, config, packed=False)
    prompts = Reader(bundles.after / bundles.prompt_graph, config, packed=packed)
    tokens = prompts
    if bundles.prompt_graph != DECODER_GRAPH:
        tokens = Reader(bundles.after / DECODER_GRAPH, config, packed=packed)
    states = [] if text.pictures or not bundles.recipe.decoder else [
        _State(NOTHING, [Contents()], [Contents()])
    ]  # fmt: skip
    states.append(images or _stand_in(before, text.stand_in))
    ways: list[Way] = []
    for state in states:
        for name, passages in text.ways.items():
            by_token = name == TOKEN_BY_TOKEN
            if ways and all(way.by_chance for way in ways) and (by_token or ways[0].text != name):
                continue
            progress(len(ways) / (len(states) * len(text.ways)))
            sums = Sums()
            for number, passage in enumerate(passages):
                one, other = state.of(number if passage.picture is None else passage.picture)
                expected = read_at_once(before, passage, one)
                found = (
                    read_token_by_token(prompts, tokens, passage, other)
                    if by_token
                    else read_at_once(prompts, passage, other)
                )
                sums.add(expected, found, passage.targets)
            graph = DECODER_GRAPH if by_token else bundles.prompt_graph
            ways.append(_way(name, state.name, graph, sums, config.decoder.vocab_size))
    return ways


def judgement(text: JudgeText, ways: Sequence[Way], *, force: bool) -> Quality:
    """What follows from the figures.

    Args:
        force: whether a bundle that lost too much may be written all the same.
    """
    verdict, reason = "kept", text.reason
    judged = [way for way in ways if not way.by_chance]
    if ways and not judged:
        least = min(way.perplexity_before for way in ways)
        reason = (
            f"in floats it knows no more of the text than chance (perplexity {least:,.0f}), as a "
            "model of random weights does"
        )
    if not judged:
        verdict = "not judged"
    elif force and any(way.growth > MAX_GROWTH for way in judged):
        verdict = "forced"
    said: Verdict = verdict  # type: ignore[assignment]
    return Quality(text.described, text.sha256, MAX_GROWTH, said, reason, tuple(ways))


def refuse_loss(quality: Quality, output: Path, choice: WeightChoice) -> None:
    """Lets a bundle pass that kept the limit, or that was forced, or could not be judged.

    Raises:
        QualityError: the way whose perplexity grew most, and what to do.
    """
    worst = quality.worst()
    if quality.verdict != "kept" or worst is None or worst.growth <= quality.limit:
        return
    raise QualityError(
        f"{output} is not written, as it would lose too much of the model",
        expected=f"a perplexity that grows by at most {quality.limit:.0%}".replace("%", " %"),
        found=f"{worst.perplexity:,.2f} from {worst.perplexity_before:,.2f}, "
        f"{percent(worst.growth)}, on {worst.name}",
        fix=f"{_better(choice, quality)}, or write it all the same with --force",
    )


def _better(choice: WeightChoice, quality: Quality) -> str:
    """What to choose instead."""
    without = [way for way in quality.judged if way.cache == NOTHING]
    kept = without and all(way.growth <= quality.limit for way in without)
    if choice.vision and (choice.decoder is None or kept):
        return "leave out --vision"
    if choice.head == "int4":
        return "use --head int8"
    if choice.decoder == "int4":
        smaller = "" if choice.block_size == 32 else "--block-size 32, or "
        return f"use {smaller}--decoder int8"
    return "leave the decoder as it is"


def _way(name: str, cache: str, graph: str, sums: Sums, vocabulary: int) -> Way:
    means = [total / sums.tokens for total in (sums.loss_before, sums.loss, sums.divergence)]
    if not all(map(math.isfinite, means)):
        raise ExportError(
            f"{graph} gives what is no number",
            expected="finite logits",
            found=f"others on {name}, with {cache} in the cache",
            fix="quantize another way",
        )
    before, after = (math.exp(min(mean, 700.0)) for mean in means[:2])
    by_chance = before > CHANCE * vocabulary
    agreement = sums.same / sums.tokens
    return Way(name, cache, graph, sums.tokens, before, after, means[2], agreement, by_chance)


def _images(bundles: Bundles, pictures: Sequence[Array]) -> _State:
    """Each bundle's own keys and values."""
    config, recipe = bundles.manifest.config, bundles.recipe

    def contents(session: VisionSession) -> Iterator[Contents]:
        for pixels in pictures:
            yield Contents(session.encode(pixels), config.text_offset)

    before = list(contents(VisionSession(bundles.before / VISION_GRAPH, config)))
    if recipe.vision is None:
        return _State(IMAGE, before, before)
    quantized = VisionSession(bundles.after / VISION_GRAPH, config, recipe.open_session)
    return _State(IMAGE, before, list(contents(quantized)))


def _stand_in(before: Reader, ids: Sequence[int]) -> _State:
    """A text's keys and values, computed in floats, ahead of the text that is judged."""
    cache = before.start(Contents(), len(ids))
    before.read(ids, [len(ids) - 1], cache)
    contents = [Contents([part[:, :, : len(ids)] for part in cache.tensors], len(ids))]
    return _State(STAND_IN, contents, contents)
