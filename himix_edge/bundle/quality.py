"""How far a quantized bundle is from the one in floats: the record, and how it is said.

It stands in the manifest, as `Quantization.cost["quality"]`. Growth of perplexity is what counts: a
model of the same answers has none. `MAX_GROWTH` is the most that is written without --force.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from himix_edge.contract import Quantization
from himix_edge.errors import ConfigError
from himix_edge.plain import dataclass_from_dict

MAX_GROWTH = 0.10
Verdict = Literal["kept", "forced", "not judged"]
TOKEN_BY_TOKEN = "token by token"


@dataclass(frozen=True)
class Way:
    """One way in which a text was read, by both bundles.

    Attributes:
        text: how it came: "prompts of 32 tokens" and so on, or "token by token".
        cache: what was in the cache before it: "nothing", "an image" and so on.
        graph: of the quantized bundle, that read it.
        tokens: how many were predicted.
        perplexity_before, perplexity: of the bundle in floats, and of the quantized one.
        divergence: Kullback-Leibler, of the quantized distribution from that in floats: the mean
            over tokens, in nats.
        agreement: the share of tokens of which both find the same likeliest.
        by_chance: whether the bundle in floats knows no more of the text than chance does, so that
            its perplexity says nothing.
    """

    text: str
    cache: str
    graph: str
    tokens: int
    perplexity_before: float
    perplexity: float
    divergence: float
    agreement: float
    by_chance: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.perplexity_before < math.inf and self.perplexity >= 0):
            raise ConfigError("no perplexity", found=f"{self.perplexity_before}")

    @property
    def growth(self) -> float:
        """Of the perplexity: 0.1 is 10 %."""
        return self.perplexity / self.perplexity_before - 1

    @property
    def name(self) -> str:
        after = "nothing in the cache" if self.cache == "nothing" else f"after {self.cache}"
        return f"{self.text}, {after}"


@dataclass(frozen=True)
class Feature:
    """An output of the quantized vision graph against the one in floats, at worst over pictures.

    Attributes:
        error: the largest difference of a value, over the largest magnitude.
        cosine: of the whole.
        token_cosine, token: the least of a single image token, and which token that is.
    """

    error: float
    cosine: float
    token_cosine: float
    token: int


@dataclass(frozen=True)
class Quality:
    """The judgement of a quantized bundle.

    Attributes:
        text: what was read, for people.
        sha256: of that text; "" where there is none.
        limit: the growth of perplexity that was allowed.
        verdict: "kept", the limit in each way; "forced", it was not, and --force wrote the bundle;
            or "not judged".
        reason: why it was not judged; "" otherwise.
        ways: empty where nothing could be measured.
    """

    text: str
    sha256: str
    limit: float
    verdict: Verdict
    reason: str
    ways: tuple[Way, ...]

    @property
    def judged(self) -> list[Way]:
        """The ways whose perplexity means something."""
        return [way for way in self.ways if not way.by_chance]

    def worst(self, *, prompts: bool = True, tokens: bool = True) -> Way | None:
        """The way whose perplexity grew most, of those that were judged."""
        ways = [way for way in self.judged if (tokens if way.text == TOKEN_BY_TOKEN else prompts)]
        return max(ways, key=lambda way: way.growth, default=None)


def quality_of(quantization: Quantization | None) -> Quality | None:
    """The judgement in a manifest; None where there is none that this version can read."""
    if quantization is None:
        return None
    try:
        return dataclass_from_dict(Quality, quantization.cost.get("quality"))
    except ConfigError:
        return None


def percent(share: float) -> str:
    """ "+1.2 %" """
    return f"{share:+.1%}".replace("%", " %")


def summary(quality: Quality | None) -> str:
    """One line."""
    if quality is None:
        return "quality not measured"
    if quality.verdict == "not judged":
        return f"quality not judged: {quality.reason}"
    worst = quality.worst()
    if worst is None:
        return "quality not measured"
    least = min(way.agreement for way in quality.judged)
    said = (
        f"perplexity {percent(worst.growth)} at worst ({worst.name}); the likeliest token is the "
        f"same in {least:.1%} at least"
    )
    if quality.verdict == "forced":
        return f"TOO MUCH IS LOST, written by --force all the same: {said}"
    return said


def cost_table(quantization: Quantization | None) -> str:
    """What a quantized bundle's manifest says of its cost, for people; "" of no other bundle."""
    if quantization is None:
        return ""
    quality, lines = quality_of(quantization), []
    lines.append(summary(quality))
    if quality and quality.ways:
        lines += ["", f"read: {quality.text}", "", *_rows(quality.ways)]
    if vision := _vision_line(features_of(quantization)):
        lines += ["", vision]
    accuracy = quantization.cost.get("accuracy", {})
    for kind, share in accuracy.get("quantized", {}).items():
        lines.append(f"{kind:27}{share:.1%}, before {accuracy['before'][kind]:.1%}")
    return "\n".join(lines)


def features_of(quantization: Quantization | None) -> dict[str, Feature]:
    """By output, how close the vision graph came; none where it is as exported."""
    found = quantization.cost.get("vision") if quantization else None
    try:
        return {
            str(name): dataclass_from_dict(Feature, feature)
            for name, feature in (found.items() if isinstance(found, dict) else ())
        }
    except ConfigError:
        return {}


def _vision_line(features: dict[str, Feature]) -> str:
    if not features:
        return ""
    name = min(features, key=lambda one: features[one].token_cosine)
    worst = features[name]
    whole = min(feature.cosine for feature in features.values())
    return (
        f"the image's keys and values: cosine {whole:.5f} at worst; of single tokens "
        f"{worst.token_cosine:.5f} at worst, token {worst.token} in {name}"
    )


def _rows(ways: Sequence[Way]) -> list[str]:
    head = ("", "perplexity", "before", "growth", "KL, nats", "same likeliest")
    rows = [head]
    for way in ways:
        growth = "chance" if way.by_chance else percent(way.growth)
        figures = f"{way.perplexity:,.2f}", f"{way.perplexity_before:,.2f}", growth
        rows.append((way.name, *figures, f"{way.divergence:.4f}", f"{way.agreement:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
