"""A `tokenizer.json` from a stranger: looked through before the tokenizers package reads it.

That package is written in Rust. A few files make it panic, which no `except Exception` sees, or end
the process; others take hours or gigabytes. What is let through here can at worst panic.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import tokenizers

from himix_edge.split_patterns import check_pattern

MAX_BYTES = 64 << 20  # Gemma's has 33 MB
# Of its JSON, counted in its text. Gemma's has 0.5 million lists and 2.6 million quotes.
MAX_COUNTS = {b",": 8_000_000, b"[": 2_000_000, b"{": 1_000_000, b'"': 8_000_000}
MAX_ADDED = 1 << 16  # tokens beside the vocabulary; Gemma's has 6,000
MAX_ADDED_TEXT = 2_000_000  # characters of them all
MAX_TOKEN = 2048  # characters of one token; the longest in use have 256
MAX_UNIGRAM_TEXT = 8_000_000  # characters of a Unigram's vocabulary, each a table; mT5's has 1.6
MAX_WORD = 256  # characters of a word that WordPiece takes apart, by all its parts; BERT's is 100
MAX_WRITTEN = 256  # characters that a rule puts in place of others
MAX_GROWTH = 1000  # times, of a text, by all rules together
MAX_STEPS = 100  # of a normalizer, a pre-tokenizer, a decoder or a template
MAX_ID = (1 << 32) - 1
# By how much some normalizers lengthen a text, at most.
GROWTH = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "ByteLevel": 4}


class Read(NamedTuple):
    """What a tokenizer.json holds.

    Attributes:
        tokenizer: without padding and truncation.
        special: ids that are not shown.
        size: one more than the largest id.
        longest: characters of its longest token.
        growth: by how much its normalizer lengthens a text, at most.
        keeps_text: whether each character of a text is in a token, and no token is in their place.
    """

    tokenizer: tokenizers.Tokenizer
    special: frozenset[int]
    size: int
    longest: int
    growth: int
    keeps_text: bool


def read_tokenizer_json(data: bytes | str) -> Read:
    """Reads a tokenizer.json that may be anybody's.

    Raises:
        ValueError: it is none, or asks for more than any real one; the message says what.
    """
    data = data.encode() if isinstance(data, str) else data
    with _as_value_error():
        found = _json(data)
        growth = _check(found)
        added = found.get("added_tokens") or []
        model, vocab = found["model"], _vocabulary(found["model"])
        names = [*vocab, *(token["content"] for token in added)]
        ids = [*_model_ids(model), *(token["id"] for token in added), *_template_ids(found)]
        with panics_as_exceptions():
            tokenizer = tokenizers.Tokenizer.from_str(data.decode())
            tokenizer.no_truncation()
            tokenizer.no_padding()
        return Read(
            tokenizer,
            frozenset(token["id"] for token in added if token["special"]),
            1 + max(ids),
            max(map(len, names)),
            growth,
            _keeps_text(found),
        )


@contextlib.contextmanager
def panics_as_exceptions() -> Iterator[None]:
    """Around every call of tokenizers: a panic of its Rust, no Exception otherwise, as one.

    Raises:
        ValueError: in place of a panic.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise ValueError(_first_line(error)) from error


@contextlib.contextmanager
def _as_value_error() -> Iterator[None]:
    """Whatever a bad file makes of the code below, or of tokenizers, which raises Exceptions."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"it has no {error}") from error
    except Exception as error:
        raise ValueError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _json(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
    for sign, most in MAX_COUNTS.items():
        if data.count(sign) > most:
            raise ValueError(f"it has more than {most:,} of {sign.decode()}")
    found = json.loads(data.decode(), object_pairs_hook=_unique)
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise ValueError("it has no model")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a name that comes twice, two readers may take one each."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice in one of its objects")
    return found


def _check(found: dict[str, Any]) -> int:
    """Refuses what no real file has; returns the growth of a text in the normalizer."""
    for place in ("pre_tokenizer", "post_processor", "decoder"):
        _check_steps(found, place)
    growth = math.prod(_check_steps(found, "normalizer"))
    if growth > MAX_GROWTH:
        raise ValueError(f"its normalizer may make a text {growth:,} times as long")
    padding = found.get("padding")
    if padding is not None and isinstance(padding["strategy"], dict):
        _at_most(padding["strategy"]["Fixed"], 1_000_000, "padding")
    _check_model(found["model"])
    _check_added(found.get("added_tokens") or [])
    return growth


def _check_steps(found: dict[str, Any], place: str) -> list[int]:
    """For each step, by how much it may lengthen a text."""
    steps = list(_steps(found.get(place)))
    if len(steps) > MAX_STEPS:
        raise ValueError(f"its {place} has more than {MAX_STEPS} steps")
    return [_check_step(step) for step in steps]


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """All objects within a part, itself included."""
    waiting = [part]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _check_step(step: dict[str, Any]) -> int:
    """Refuses a step of an endless kind; returns by how much it lengthens a text."""
    kind = step.get("type")
    if "precompiled_charsmap" in step:
        return _check_charsmap(step["precompiled_charsmap"])
    for name in ("content", "prepend", "replacement", "prefix", "suffix", "pad_token"):
        if isinstance(step.get(name), str):
            _at_most(len(step[name]), MAX_WRITTEN, name)
    for name in ("start", "stop"):
        if name in step:
            _at_most(step[name], MAX_WRITTEN, name)
    if isinstance(step.get("Regex"), str):
        check_pattern(step["Regex"])
    if kind == "FixedLength" and step.get("length") == 0:
        raise ValueError("it cuts a text into pieces of no length")
    if kind == "Replace":
        replaced = step["pattern"].get("String")
        if replaced == "":
            raise ValueError("it replaces nothing by something")
        return max(1, 1 + len(step["content"]) if replaced is None else len(step["content"]))
    return GROWTH.get(str(kind), 3 if kind == "BertNormalizer" else 1)


def _check_charsmap(text: str) -> int:
    """A sentencepiece map: the size of a trie, the trie, and texts that end in NUL."""
    data = base64.b64decode(text, validate=True)
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or size % 4 or size > len(data) - 4:
        raise ValueError("its precompiled_charsmap is cut off")
    longest = max(map(len, data[4 + size :].split(b"\0")))
    _at_most(longest, MAX_WRITTEN, "a text of precompiled_charsmap")
    return max(longest, 1)


def _check_model(model: dict[str, Any]) -> None:
    vocab = _vocabulary(model)
    longest = max(map(len, vocab), default=0)
    _at_most(longest, MAX_TOKEN, "a token")
    if isinstance(model["vocab"], list):
        _at_most(sum(map(len, vocab)), MAX_UNIGRAM_TEXT, "a vocabulary")
    if "max_input_chars_per_word" in model:
        _at_most(model["max_input_chars_per_word"], MAX_WORD, "max_input_chars_per_word")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if isinstance(model.get(name), str):
            _at_most(len(model[name]), MAX_WRITTEN, name)
    if prefix := model.get("continuing_subword_prefix"):
        for merge in model.get("merges") or []:  # cut off by its length, whatever stands there
            second = merge.split(" ")[-1] if isinstance(merge, str) else merge[1]
            if not second.startswith(prefix):
                raise ValueError(f"the second part of a merge lacks {prefix!r}")


def _check_added(added: list[dict[str, Any]]) -> None:
    _at_most(len(added), MAX_ADDED, "the number of added tokens")
    lengths = [len(token["content"]) for token in added]
    _at_most(max(lengths, default=0), MAX_TOKEN, "an added token")
    _at_most(sum(lengths), MAX_ADDED_TEXT, "all added tokens")


def _at_most(size: int, most: int, name: str) -> None:
    if size > most:
        raise ValueError(f"{name} is {size:,}, at most {most:,} is allowed")


def _vocabulary(model: dict[str, Any]) -> list[str]:
    vocab = model["vocab"]
    names = list(vocab) if isinstance(vocab, dict) else [pair[0] for pair in vocab]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("its vocabulary has a token that is no text")
    return names


def _model_ids(model: dict[str, Any]) -> Iterable[int]:
    vocab = model["vocab"]
    return vocab.values() if isinstance(vocab, dict) else range(len(vocab))  # Unigram's is a list


def _template_ids(found: dict[str, Any]) -> Iterator[int]:
    """Ids that a post-processor writes around a text."""
    for step in _steps(found.get("post_processor")):
        if isinstance(ids := step.get("ids"), list):
            _at_most(len(ids), MAX_STEPS, "the number of ids of a template's token")
            yield from ids
        for name in ("sep", "cls"):
            if isinstance(pair := step.get(name), list):
                yield pair[1]


def _keeps_text(found: dict[str, Any]) -> bool:
    """Byte-level BPE and nothing that takes from a text: GPT-2's kind, Qwen's and Llama 3's."""
    model, steps = found["model"], list(_steps(found.get("pre_tokenizer")))
    kinds = {step.get("type") for step in steps}
    return (
        found.get("normalizer") is None
        and model.get("type") == "BPE"
        and "ByteLevel" in kinds
        and kinds <= {"Sequence", "Split", "ByteLevel", "Digits", None}
        and all(step.get("behavior") != "Removed" for step in steps)
        and all(byte in model["vocab"] for byte in tokenizers.pre_tokenizers.ByteLevel.alphabet())
        and not any(t.get("lstrip") or t.get("rstrip") for t in found.get("added_tokens") or [])
    )
