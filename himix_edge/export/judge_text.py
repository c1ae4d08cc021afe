"""The text that a quantized bundle is judged on: what its calibration never saw.

Three kinds, in this order:

    given      a file of the user's
    shapes     of a model of the shapes world, which can say nothing else: questions about scenes
               that are drawn for this alone, and the right answers, which are what is predicted
    shipped    `assets/judge/*.txt`, about 8,000 tokens of plain English of our own: a story,
               instructions, dialogue, technical prose, letters, lists and numbers, descriptions of
               pictures
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from himix_edge.bundle.files import BundleFiles
from himix_edge.bundle.quality import TOKEN_BY_TOKEN
from himix_edge.contract import TOKENIZER
from himix_edge.data.text_lines import text_lines
from himix_edge.errors import ConfigError
from himix_edge.export.expected import Array
from himix_edge.models.standin import BLIND_NOTICE
from himix_edge.runtimes.chat import user_message
from himix_edge.runtimes.preprocess import pixel_values
from himix_edge.runtimes.tokenizer import Tokenizer
from himix_edge.shapes.benchmark import NOTICE as SHAPES_NOTICE
from himix_edge.shapes.benchmark import held_out_scene
from himix_edge.shapes.render import render

ASSETS = Path(__file__).parents[1] / "assets" / "judge"
PROMPTS = {32: 16, 256: 4, 1024: 1}  # tokens of a prompt: how many such prompts are read
STEPPED = (256, 2)  # token by token: as long, so many
MOST_CHOSEN = 512  # logits of a prompt, evenly spread: a long one's would fill the memory
UNKNOWN = 0.1  # of a text, in tokens or characters: more of it is no text for a vocabulary
SCENES, FIRST_SCENE = 24, 1_000_000  # far from those that `eval` counts answers on


@dataclass(frozen=True)
class Passage:
    """Tokens that are read at once, or one by one.

    Attributes:
        ids: all of them; the last is only predicted.
        chosen: the places of the tokens after which the next one is predicted.
        picture: which of the text's own pictures is in the cache; None is any, or none.
    """

    ids: list[int]
    chosen: list[int]
    picture: int | None = None

    @property
    def targets(self) -> list[int]:
        return [self.ids[place + 1] for place in self.chosen]


@dataclass(frozen=True)
class JudgeText:
    """What is read, in which ways.

    Attributes:
        described: for people.
        sha256: of the text.
        ways: passages by way, `TOKEN_BY_TOKEN` being one; empty where there is nothing to read.
        reason: why there is nothing.
        pictures: the text's own, each [1, 3, H, W], which have to be in the cache; none otherwise.
        stand_in: of a model that sees nothing: tokens that are read nowhere else, to stand in the
            image's slots.
    """

    described: str
    sha256: str
    ways: dict[str, list[Passage]]
    reason: str = ""
    pictures: tuple[Array, ...] = ()
    stand_in: tuple[int, ...] = ()


def judge_text(files: BundleFiles, given: Path | None, asked: Sequence[str]) -> JudgeText:
    """The text for a bundle.

    Args:
        files: of the bundle.
        given: a text file.
        asked: what calibration asked, word for word: the judge asks none of it.

    Raises:
        ConfigError: a file that can't be read, that the vocabulary lacks the words of, or that is
            too short.
    """
    tokenizer = Tokenizer.from_bundle(files)
    if given is not None:
        text = "\n".join(line for _, line in text_lines(given))
        ids, problem = _encoded(files, tokenizer, text)
        least = min(PROMPTS) + _stand_in_tokens(files)
        if not problem and len(ids) < least:
            problem = f"{len(ids)} tokens, too few"
        if problem:
            raise ConfigError(
                f"{given} is no text to judge this bundle with",
                expected=f"{least} tokens or more, some thousands for true figures, in words that "
                "the bundle's vocabulary has",
                found=problem,
                fix="give another --judge-text",
            )
        return _plain_text(files, tokenizer, given.name, text, ids)
    if files.manifest.notice == SHAPES_NOTICE:
        return _questions(files, tokenizer, asked)
    text = shipped_text()
    ids, problem = _encoded(files, tokenizer, text)
    if problem:
        reason = f"of the text that comes with himix-edge, {problem}; give your own: --judge-text"
        return JudgeText("nothing", "", {}, reason)
    return _plain_text(files, tokenizer, "the text that comes with himix-edge", text, ids)


def shipped_text() -> str:
    """All of `assets/judge`, one after the other."""
    return "\n\n".join(
        path.read_text(encoding="utf-8").strip() for path in sorted(ASSETS.glob("*.txt"))
    )


def spread(ids: Sequence[int], length: int, count: int) -> list[list[int]]:
    """At most `count` parts of that length, evenly spread over all, none over another."""
    count = min(count, len(ids) // length)
    if count == 0:
        return []
    starts = [(2 * i + 1) * (len(ids) - count * length) // (2 * count) + i * length
              for i in range(count)]  # fmt: skip
    return [list(ids[start : start + length]) for start in starts]


def _plain_text(
    files: BundleFiles, tokenizer: Tokenizer, name: str, text: str, ids: list[int]
) -> JudgeText:
    begin, room = _begin(tokenizer), _room(files)
    described = f"{name}, {len(ids):,} tokens of which a part is read"
    stand_in: list[int] = []
    if kept := _stand_in_tokens(files):
        ids, stand_in = ids[:-kept], ids[-kept:]

    def passages(length: int, count: int) -> list[Passage]:
        if length > room:
            return []
        parts = spread(ids, length - len(begin), count)
        return [_passage([*begin, *part], len(begin)) for part in parts]

    ways = {f"prompts of {n:,} tokens": passages(n, count) for n, count in PROMPTS.items()}
    longest = max((n for n in (STEPPED[0], min(PROMPTS)) if n <= min(room, len(ids))), default=0)
    ways[TOKEN_BY_TOKEN] = passages(longest, STEPPED[1]) if longest else []
    ways = {way: read for way, read in ways.items() if read}
    return JudgeText(described, _digest(text), ways, stand_in=tuple(stand_in))


def _stand_in_tokens(files: BundleFiles) -> int:
    """How many of a text's tokens stand in the image's slots."""
    manifest = files.manifest
    return manifest.config.image_slots if manifest.notice == BLIND_NOTICE else 0


def _room(files: BundleFiles) -> int:
    """How many tokens a cache holds beside an image, or what stands for one."""
    config, slots = files.manifest.config, files.manifest.cache_slots
    room = config.max_text_tokens - _stand_in_tokens(files)
    return room if slots is None else min(room, slots - config.image_slots)


def _passage(ids: list[int], begin: int) -> Passage:
    """All places from the first token of the text on, or so many of them as are kept."""
    places = np.arange(max(begin - 1, 0), len(ids) - 1)
    step = -(-len(places) // MOST_CHOSEN)
    return Passage(ids, [int(place) for place in places[::-1][::step][::-1]])


def _questions(files: BundleFiles, tokenizer: Tokenizer, asked: Sequence[str]) -> JudgeText:
    """Scenes, questions, right answers; an answer's tokens and its end are what is predicted."""
    pictures, passages, texts = [], [], []
    for index in range(SCENES):
        scene, questions = held_out_scene(FIRST_SCENE + index)
        pictures.append(pixel_values(render(scene), files.manifest.config.preprocess))
        for question in questions:
            if question.text in asked:
                continue
            prompt = tokenizer.encode_chat([user_message(question.text)])
            end = files.manifest.config.decoder.eos_token_ids[:1]
            ids = [*prompt, *tokenizer.encode(question.answer), *end]
            passages.append(Passage(ids, list(range(len(prompt) - 1, len(ids) - 1)), index))
            texts.append(f"{question.text} {question.answer}")
    described = (
        f"{len(passages)} questions about {SCENES} scenes of the model's own world and the right "
        "answers"
    )
    ways = {"questions and answers as prompts": passages, TOKEN_BY_TOKEN: passages}
    return JudgeText(described, _digest("\n".join(texts)), ways, pictures=tuple(pictures))


def _begin(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts ahead of every text, BOS for one."""
    with_special, plain = (
        tokenizer.encode("a", add_special_tokens=special) for special in (True, False)
    )
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def _encoded(files: BundleFiles, tokenizer: Tokenizer, text: str) -> tuple[list[int], str]:
    """The ids, and what is wrong with them; "" if nothing."""
    try:
        ids = tokenizer.encode(text)
    except Exception as error:  # noqa: BLE001 (of words that it lacks, `tokenizers` raises these)
        return [], f"the vocabulary lacks words: {next(iter(str(error).splitlines()), 'an error')}"
    if max(ids, default=0) >= files.manifest.config.decoder.vocab_size:
        return [], "tokens that the decoder has no embedding of"
    if not ids:
        return [], "" if not text.strip() else "none of it is in the vocabulary"
    unknown = _unknown_id(files)
    missing = sum(token == unknown for token in ids) / len(ids)
    lost = 1 - len("".join(tokenizer.decode(ids).split())) / max(len("".join(text.split())), 1)
    if (share := max(missing, lost)) > UNKNOWN:
        return [], f"{share:.0%} is not in the vocabulary"
    return ids, ""


def _unknown_id(files: BundleFiles) -> int | None:
    model = json.loads(files.read(TOKENIZER))["model"]
    if model.get("unk_id") is not None:  # Unigram's
        return int(model["unk_id"])
    vocabulary = model.get("vocab")
    found = vocabulary.get(model.get("unk_token")) if isinstance(vocabulary, dict) else None
    return None if found is None else int(found)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
