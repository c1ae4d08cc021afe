"""A corpus of small tokenizer.json files of every kind, and the mutations that are made of them."""

from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
TEXTS = ("a red circle", "   ", "naïve 東京 🙂\n\n", "aaaaaaaaaaaaaaaaaaaaaaaaaaaa!", "<end>a<unk>")
LETTERS = "abcdefghijklmnopqrstuvwxyz "
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 255, 2**16, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, 10**30,
    0.5, -1e308, 1e308, "", "a", " ", "é", "\x00", "x" * 300, "a" * 5000, "(a+)+$", "(", "[", ".*",
    "\\s+", "(?=", "a{1000}{1000}", "\\p{L}+", [], {}, [[]], ["a", 1], {"type": "Sequence"},
    {"String": ""}, {"String": "a"}, {"Regex": "(a|a)*b"}, {"Fixed": 2**40}, "BPE", "Unigram",
    "WordPiece", "/////w==", "AAAA", "BAAAAAAAAABhYQA=",
)  # fmt: skip
INSERTED = (b"", b"[" * 3000, b"\xff", b'"', b"0", b"}", b",")
LISTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def corpus() -> list[Json]:
    """Descriptions of tokenizers, as json.loads gives them."""
    return [
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added(len(_names(model))),
            "normalizer": normalizer,
            "pre_tokenizer": pre,
            "post_processor": post,
            "decoder": decoder,
            "model": model,
        }
        for model in _models()
        for normalizer, pre, post, decoder in _pipelines()
    ]


def _names(model: Json) -> list[str]:
    vocab = model["vocab"]
    return list(vocab) if isinstance(vocab, dict) else [pair[0] for pair in vocab]


def _added(first: int) -> list[Json]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": first, "content": "<end>", "special": True, **flags},
        {"id": first + 1, "content": "<user>", "special": False, **flags, "normalized": True},
    ]


def _models() -> Iterator[Json]:
    names = ["<unk>", *LETTERS, "▁", "Ġ", "ab", "re", "red", "##e", "##ed", "<0x41>", "<0xC3>"]
    vocab = {name: i for i, name in enumerate(names)}
    yield {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    yield {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [["r", "e"], ["re", "d"], ["a", "b"]],
    }
    yield {
        "type": "WordPiece",
        "unk_token": "<unk>",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": vocab,
    }
    scores = [[name, -float(i)] for i, name in enumerate(names)]
    yield {"type": "Unigram", "unk_id": 0, "vocab": scores, "byte_fallback": True}


def _pipelines() -> Iterator[tuple[Any, Any, Any, Any]]:
    charsmap = base64.b64encode((4).to_bytes(4, "little") + bytes(4) + b"a\0").decode()
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    yield None, None, None, None
    yield (
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        None,
        None,
        {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    )
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    pattern = {"pattern": {"Regex": "\\s+(?!\\S)|\\p{L}+|\\s+"}}
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<end>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {"<end>": {"id": "<end>", "ids": [3], "tokens": ["<end>"]}},
    }
    yield (
        {"type": "NFC"},
        {"type": "Sequence", "pretokenizers": [{**split, **pattern}, level]},
        template,
        level,
    )
    meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    yield {"type": "Precompiled", "precompiled_charsmap": charsmap}, meta, None, meta
    bert = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    }
    post = {"type": "BertProcessing", "sep": ["<end>", 3], "cls": ["<unk>", 0]}
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    yield bert, {"type": "BertPreTokenizer"}, post, decoder
    yield (
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "FixedLength", "length": 3},
        {**template, "type": "TemplateProcessing"},
        {"type": "CTC", "pad_token": "<unk>", "word_delimiter_token": "▁", "cleanup": True},
    )


def mutated(files: list[Json], seed: int) -> tuple[str, bytes]:
    """What was done, and the file; the same for the same seed."""
    rng = random.Random(seed)
    data = copy.deepcopy(rng.choice(files))
    done = [_change(data, rng, files) for _ in range(rng.choice((1, 1, 2, 3)))]
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5).encode(errors="replace")
    if rng.random() < 0.15:
        at, done = rng.randrange(len(text)), [*done, "bytes"]
        text = (
            text[:at] + rng.choice((b"", b"[" * 3000, b"\xff", b'"', b"0", b"}", b",")) + text[at:]
        )
    return "; ".join(done), text


def _change(data: Json, rng: random.Random, files: list[Json]) -> str:
    """One change of a value, or of a part of the tokenizer for another's."""
    if rng.random() < 0.25:
        name = rng.choice(("normalizer", "pre_tokenizer", "post_processor", "decoder", "model"))
        part = copy.deepcopy(rng.choice(files)[name])
        lists = {
            "normalizer": "normalizers",
            "pre_tokenizer": "pretokenizers",
            "decoder": "decoders",
        }
        if name in lists and part and rng.random() < 0.5:
            part = {"type": "Sequence", LISTS[name]: [part] * rng.choice((1, 2, 30, 200))}
        data[name] = part
        return f"another {name}"
    places = list(_places(data, rng))
    holder, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.15:
        del holder[key]
        return f"no {key}"
    if kind < 0.25 and isinstance(holder, list):
        holder += [copy.deepcopy(holder[key])] * rng.choice((1, 10, 1000))
        return f"more of {key}"
    if kind < 0.35 and isinstance(holder, dict):
        holder[rng.choice(("x", "", "a" * 3000, "type", "id"))] = holder[key]
        return f"{key} by another name"
    holder[key] = copy.deepcopy(rng.choice(VALUES))
    return f"{key} = {holder[key]!r}"[:60]


def _places(data: Any, rng: random.Random) -> Iterator[tuple[Any, Any]]:
    """All places of values; of a vocabulary's a few, so that they are not nearly all."""
    items = list(data.items() if isinstance(data, dict) else enumerate(data))
    for key, value in items if len(items) < 25 else rng.sample(items, 2):
        yield data, key
        if isinstance(value, (dict, list)):
            yield from _places(value, rng)
